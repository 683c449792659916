"""What every test of a federation needs."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def garbage_is_collected_quickly() -> Iterator[None]:
    """Flower's Bulyan collects garbage once for each client: seconds a round, with all of torch to look through."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
