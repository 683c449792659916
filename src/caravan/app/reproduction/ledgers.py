"""A ledger that counts for nobody: what an experiment's private trainings spend is not a user's budget."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

_VARIABLE = "CARAVAN_LEDGER"


@contextmanager
def own_ledger() -> Iterator[None]:
    """Have trainings write into an empty ledger that is thrown away behind them: the data are public.

    So one training's guarantee is its own alone, in whatever order and however often the experiment is run.
    """
    before = os.environ.get(_VARIABLE)
    with TemporaryDirectory() as folder:
        os.environ[_VARIABLE] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[_VARIABLE]
            else:
                os.environ[_VARIABLE] = before
