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
_FINER = (0, -0.5, 0.5)  # the same, from the winner
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
    four folds, or when enough queries were held out. Of equals the one nearest to `rate` wins. The winner then races
    once more, with one rate on either side, halfway to its neighbours.

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
    outcomes = _Outcomes(examples, trial, seed, kept, report)
    if not outcomes.enough():
        return None
    best = outcomes.race(_around(rate, _STEPS))
    if best is not None:
        best = outcomes.race(_around(best, _FINER))
    outcomes.end()
    if best is None:
        return None
    order = sorted(outcomes.hits, key=lambda each: -len(outcomes.hits[each]))
    found = {each: (sum(outcomes.hits[each]), len(outcomes.hits[each])) for each in order}
    return Race(best, found, tuple(outcomes.diverged))


def _around(rate: float, steps: Sequence[float]) -> list[float]:
    return [float(f"{rate * 10 ** (step / 2):.4g}") for step in steps]


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
    ) -> None:
        self.examples, self.trial, self.kept, self.report = examples, trial, kept, report
        self.folds = [fold_of(example.text, seed) for example in examples]
        self.ranked = [
            [place for place, own in enumerate(self.folds) if own == fold][:_ENOUGH] for fold in range(_FOLDS)
        ]
        snapshot = kept.load() if kept else None
        self.known: dict[str, list[bool]] = snapshot.values["outcomes"] if snapshot else {}
        self.hits: dict[float, list[bool]] = {}
        self.diverged: list[float] = []
        self.done, self.total = 0, (len(_STEPS) + len(_FINER) - 1) * _FOLDS * _PARTS

    def enough(self) -> bool:
        """Whether there are different queries enough, in every fold."""
        texts: set[str] = set()
        for example in self.examples:
            texts.add(example.text)
            if len(texts) == _FEWEST:
                return all(self.ranked)
        return False

    def race(self, rates: Sequence[float]) -> float | None:
        """The rate that finds most, the first of equals; None where all diverge."""
        running, new = list(rates), [rate for rate in rates if rate not in self.hits]
        hits: dict[float, list[bool]] = {rate: [] for rate in rates}
        end = self.done + len(new) * _FOLDS * _PARTS
        for fold in range(_FOLDS):
            found = {rate: self.of(fold, rate) for rate in running}
            self.diverged += [rate for rate in running if not found[rate]]
            running = [rate for rate in running if found[rate]]
            for rate in running:
                hits[rate] += found[rate]
            leader = max(running, key=lambda rate: sum(hits[rate]), default=None)
            if leader is None:
                break
            running = [rate for rate in running if not _beaten(hits[rate], hits[leader])]
            if len(running) == 1 or len(hits[leader]) >= _ENOUGH:
                break
            ahead = sum(rate in new for rate in running) * (_FOLDS - 1 - fold) * _PARTS
            self._tell(end - ahead)
        self._tell(end)
        known = {rate: own for rate, own in hits.items() if len(own) > len(self.hits.get(rate, ()))}
        self.hits = {rate: own for rate, own in (self.hits | known).items() if rate not in self.diverged}
        return max(running, key=lambda rate: sum(hits[rate]), default=None)

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
            self._tell(self.done + _PARTS)
        return self.known[key]

    def end(self) -> None:
        """Count as done what was not needed."""
        self._tell(self.total)

    def _inside(self, progress: Progress) -> None:
        if self.report is not None and progress.task.startswith("training"):
            done = self.done + _PARTS * progress.done // progress.total
            self.report(Progress(_TASK, min(done, self.total), self.total))

    def _tell(self, done: int) -> None:
        self.done = max(self.done, min(done, self.total))  # a winner may owe folds that its first race did not need
        if self.report is not None:
            self.report(Progress(_TASK, done, self.total))
