"""A ledger that counts for nobody: what an experiment's private trainings spend is not a user's budget."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from unittest.mock import patch


@contextmanager
def own_ledger() -> Iterator[None]:
    """Have trainings write into an empty ledger that is thrown away behind them: the data are public.

    So one training's guarantee is its own alone, in whatever order and however often the experiment is run.
    """
    with TemporaryDirectory() as folder, patch.dict(os.environ, {"CARAVAN_LEDGER": folder}):
        yield
