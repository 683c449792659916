"""What holds for all tests."""

from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is no bug: tests judge results, not times.
settings.register_profile("caravan", deadline=None)
settings.load_profile("caravan")


@pytest.fixture(autouse=True)
def ledger_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for the privacy ledger: what a test spends is no other test's, and no user's."""
    folder = tmp_path_factory.mktemp("ledger") / "ledger"
    monkeypatch.setenv("CARAVAN_LEDGER", str(folder))
    return folder
