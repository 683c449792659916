"""What holds for all tests."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

# A busy machine is no bug: tests judge results, not times.
settings.register_profile("caravan", deadline=None)
settings.load_profile("caravan")


@pytest.fixture(scope="session", autouse=True)
def nobodys_ledger_is_written_to(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests spend must not count against the data of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARAVAN_LEDGER", str(tmp_path_factory.getbasetemp() / "ledger"))
        yield
