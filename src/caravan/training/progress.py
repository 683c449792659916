"""How far long work is, as told to whoever shows it."""

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Progress:
    """How far a piece of long work is.

    Attributes:
        task: what is being done.
        done: units done so far; it never falls within one piece of work, and ends at `total`.
        total: units in all.
        loss: the latest batch's loss, where there is one.
        rate: queries a second, where known.
        epsilon: what private trainings on the data have spent, the steps under way included.
        warning: one line to show beside it and after it; once.
    """

    task: str
    done: int
    total: int
    loss: float | None = None
    rate: float | None = None
    epsilon: float | None = None
    warning: str | None = None


Report = Callable[[Progress], None]


def prefixed(report: Report | None, prefix: str) -> Report | None:
    """Give a report that puts `prefix` before each task's name; None stays None."""
    if report is None:
        return None
    return lambda progress: report(replace(progress, task=prefix + progress.task))
