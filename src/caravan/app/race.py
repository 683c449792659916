"""A race of learning rates: which of them finds most of the queries that were held out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from caravan.data.records import Example
from caravan.data.splits import select
from caravan.errors import TrainingError
from caravan.training.checkpoint import Checkpoint, Snapshot
from caravan.training.progress import Progress, Report

_FOLDS = 4  # three quarters of the queries train: few enough trainings, and near enough to all queries
_ENOUGH = 4000  # queries held out in all: then one in a thousand shows
_FEWEST = 40  # different queries, below which one of them decides
_STEPS = (0, -1, 1, -2, 2, 3)  # half powers of ten from the rate that the loss's curvature asks for, nearest first
_TASK = "choosing the head's learning rate on held-out queries"
_PARTS = 100  # of a training, for the bar

Trial = Callable[[Sequence[Example], Sequence[Example], float, Report | None], list[bool]]


@dataclass(frozen=True)
class Race:
    """What a race came to.

    Attributes:
        rate: the learning rate that found most.
        found: by rate, those in the race for longest first: of how many held-out queries the right document came
            first, and of how many it was to.
        diverged: rates at which a training ended with numbers that are not finite.
    """

    rate: float
    found: dict[float, tuple[int, int]]
    diverged: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the record, a row a rate."""
        rows = [{"rate": rate, "found": hits, "of": of} for rate, (hits, of) in self.found.items()]
        return {"held_out": rows, **({"diverged": list(self.diverged)} if self.diverged else {})}


def race(
    rate: float,
    examples: Sequence[Example],
    trial: Trial,
    *,
    seed: int,
    kept: Checkpoint | None,
    report: Report | None,
) -> Race | None:
    """Train with rates around `rate`, a quarter of the queries held out each time, and see which finds most of those.

    A rate leaves the race when, over all folds so far, the queries that only the leader finds outnumber those that
    only it finds by more than two standard errors, the root of their sum (McNemar's test; racing as in Maron and
    Moore, Hoeffding Races, NIPS 1993); and when a training diverges at it. The race ends with one rate left, after
    four folds, or when enough queries were held out. Of equals the one nearest to `rate` wins.

    Args:
        rate: where to look first.
        examples: queries with their documents; those with the same text are held out together.
        trial: trains on its first argument with its third, and says of each query of its second whether it found its
            document first; raises TrainingError where the training diverges.
        seed: decides who is held out with whom.
        kept: where outcomes are kept, and taken from, so that what was killed goes on.
        report: called as the work goes on.

    Returns:
        None where different queries are too few, or every rate diverges.

    Raises:
        StorageError: what was kept cannot be written or trusted.
    """
    rates = [float(f"{rate * 10 ** (step / 2):.4g}") for step in _STEPS]
    outcomes = _Outcomes(examples, trial, seed, kept, report, len(rates))
    if not outcomes.enough():
        return None
    hits: dict[float, list[bool]] = {each: [] for each in rates}
    leader, running = rates[0], rates
    diverged: list[float] = []
    for fold in range(_FOLDS):
        found = {each: outcomes.of(fold, each) for each in running}
        diverged += [each for each in running if not found[each]]
        running = [each for each in running if found[each]]
        if not running:
            outcomes.go_on(0)
            return None
        for each in running:
            hits[each] += found[each]
        leader = max(running, key=lambda each: sum(hits[each]))  # the first of equals
        running = [each for each in running if not _beaten(hits[each], hits[leader])]
        over = len(running) == 1 or len(hits[leader]) >= _ENOUGH
        outcomes.go_on(0 if over else len(running) * (_FOLDS - 1 - fold))
        if over:
            break
    order = sorted((each for each in rates if hits[each] and each not in diverged), key=lambda each: -len(hits[each]))
    return Race(leader, {each: (sum(hits[each]), len(hits[each])) for each in order}, tuple(diverged))


def _beaten(own: Sequence[bool], leader: Sequence[bool]) -> bool:
    """Whether the leader is ahead by more than two standard errors."""
    lost = sum(theirs and not ours for ours, theirs in zip(own, leader, strict=True))
    won = sum(ours and not theirs for ours, theirs in zip(own, leader, strict=True))
    return lost - won > 2 * math.sqrt(lost + won)


def fold_of(text: str, seed: int) -> int:
    """The fold in which a query is held out: of its text alone, so that equal texts are on one side."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8, key=seed.to_bytes(8, signed=True)).digest()) % _FOLDS


class _Outcomes:
    """The trainings of a race: done once, kept, and shown on one bar."""

    def __init__(
        self,
        examples: Sequence[Example],
        trial: Trial,
        seed: int,
        kept: Checkpoint | None,
        report: Report | None,
        rates: int,
    ) -> None:
        self.examples, self.trial, self.kept, self.report = examples, trial, kept, report
        self.folds = [fold_of(example.text, seed) for example in examples]
        self.ranked = [
            [place for place, own in enumerate(self.folds) if own == fold][:_ENOUGH] for fold in range(_FOLDS)
        ]
        snapshot = kept.load() if kept else None
        self.known: dict[str, list[bool]] = snapshot.values["outcomes"] if snapshot else {}
        self.done, self.total = 0, rates * _FOLDS * _PARTS

    def enough(self) -> bool:
        """Whether there are different queries enough, in every fold."""
        texts: set[str] = set()
        for example in self.examples:
            texts.add(example.text)
            if len(texts) == _FEWEST:
                return all(self.ranked)
        return False

    def of(self, fold: int, rate: float) -> list[bool]:
        """Whether each query of a fold, up to `_ENOUGH`, found its document; none where the training diverged."""
        key = f"{fold}/{rate:g}"
        if key not in self.known:
            train = select(self.examples, [place for place, own in enumerate(self.folds) if own != fold])
            try:
                self.known[key] = self.trial(train, select(self.examples, self.ranked[fold]), rate, self._inside)
            except TrainingError:
                self.known[key] = []
            if self.kept:
                self.kept.save(Snapshot(values={"outcomes": self.known}))
        self.done += _PARTS
        self._tell(self.done)
        return self.known[key]

    def go_on(self, ahead: int) -> None:
        """Count as done what will not be trained: all but so many trainings."""
        self.done = self.total - ahead * _PARTS
        self._tell(self.done)

    def _inside(self, progress: Progress) -> None:
        if progress.task.startswith("training"):
            self._tell(self.done + _PARTS * progress.done // progress.total)

    def _tell(self, done: int) -> None:
        if self.report is not None:
            self.report(Progress(_TASK, done, self.total))
