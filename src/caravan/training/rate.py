"""The automatic learning rate: the step that lowers the loss most along the direction in which the optimizer moves."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from caravan.config import AUTO, AdapterStageConfig, HeadStageConfig, TrainingConfig
from caravan.data.records import Example
from caravan.model.retriever import Retriever
from caravan.training.features import FeatureStore
from caravan.training.landscape import Direction, Landscape, inner
from caravan.training.progress import Progress, Report
from caravan.training.stages import Stage

_MOST_BATCHES, _FEWEST_BATCHES = 32, 4  # Adam's first moment averages over as much noise as 19 batches in a half would
_STEPS_A_BATCH = 40  # of training: a batch costs about two steps, so some per cent of it
_CURVED = 4  # one batch in so many is curved along: the direction needs many, its curvature few
_SHARE = 0.5  # of the best step: three quarters of what it gains, with the whole distance to where the gain is gone
_TINY = 1e-8  # Adam's epsilon


@dataclass(frozen=True)
class Line:
    """The loss along one direction s of the optimizer, as a parabola.

    Attributes:
        slope: g·s, nats a unit of learning rate.
        curvature: sᵀHs.
        rate: the learning rate that follows; the default where the parabola has no minimum ahead.
        found: whether it had one.
    """

    slope: float
    curvature: float
    rate: float
    found: bool


@dataclass(frozen=True)
class Choice:
    """The rates that were chosen for a stage, and from what.

    Attributes:
        stage: "head" or "adapter".
        rates: by the name of the setting, of those that were "auto".
        lines: the parabolas they come from, by the same names.
        batches: how many were looked at.
        loss: mean over them before training, nats.
    """

    stage: Stage
    rates: dict[str, float]
    lines: dict[str, Line]
    batches: int
    loss: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the record: the rates by name, and what they were found with."""
        lines = {name: asdict(line) for name, line in self.lines.items()}
        return {**self.rates, "lines": lines, "batches": self.batches, "loss": self.loss}


def automatic(config: TrainingConfig, stage: Stage) -> list[str]:
    """Name the rates of a stage that are "auto"."""
    names = ["learning_rate", "head_learning_rate"] if stage == "adapter" else ["learning_rate"]
    return [name for name in names if getattr(getattr(config, stage), name) == AUTO]


def with_rates(config: TrainingConfig, stage: Stage, rates: dict[str, float]) -> TrainingConfig:
    """Give settings in which a stage has the rates that were chosen."""
    if stage == "head":
        return replace(config, head=replace(config.head, **rates))
    return replace(config, adapter=replace(config.adapter, **rates))


def choose_rates(
    retriever: Retriever,
    examples: Sequence[Example],
    stage: Stage,
    config: TrainingConfig,
    *,
    passages: Sequence[Example] = (),
    seed: int = 0,
    store: FeatureStore | None = None,
    report: Report | None = None,
) -> Choice:
    """Choose the peak rates that a stage's settings leave open ("auto"), where the retriever stands.

    A step of size eta along s changes the loss by -eta g·s + eta²/2 sᵀHs, least at eta* = g·s / sᵀHs; the choice is
    half of it. s is the direction in which Adam moves a parameter group: the mean gradient over the root of the mean
    squared gradient, number by number (arXiv:1412.6980); for plain SGD it is the mean gradient. This takes the place of
    1 / L in the descent lemma (`convergence.largest_rate`): L is the curvature of the worst direction, in a geometry in
    which Adam does not move. The batches are halved; each half gives the direction, the other g and H, because a
    direction that knows its own batches' noise takes it for slope.

    Args:
        retriever: adapter and head at the start of the stage, unchanged.
        examples: queries; may be empty where there are passages.
        stage: whose rates.
        config: settings of both stages.
        passages: what documents say of themselves.
        seed: decides which batches are looked at.
        store: where vectors are kept.
        report: called as the work goes on.

    Raises:
        TrainingError: there is neither an example nor a passage.
    """
    names = automatic(config, stage)
    landscape = Landscape(retriever, examples, stage, config, passages=passages, seed=seed, store=store, report=report)
    try:
        halves = _halves(landscape, getattr(config, stage).epochs)
        curved = [half[: max(1, len(half) // _CURVED)] for half in halves]
        total = sum(map(len, halves)) + 2 * sum(map(len, curved))
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if report is not None:
                report(Progress(f"choosing the {stage}'s learning rate", done, total))

        looked = []
        for half in halves:
            looked.append([landscape.slope([batch]) for batch in half])
            advance(len(half))
        slopes, curvatures = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        for part, own, other in ((curved[0], *looked), (curved[1], *reversed(looked))):
            gradient = _mean([one for _, one in own])
            direction = _direction([one for _, one in other], config.optimizer)
            for name in names:
                along = _of_group(direction, stage, name)
                slopes[name] += inner(gradient, along) / 2
                curvatures[name] += inner(along, landscape.curve(along, part)) / 2
            advance(2 * len(part))
        losses = [loss for half in looked for loss, _ in half]
    finally:
        landscape.close()
    lines = {name: _line(slopes[name], curvatures[name], stage, name) for name in names}
    rates = {name: line.rate for name, line in lines.items()}
    return Choice(stage, rates, lines, len(losses), sum(losses) / len(losses))


def _halves(landscape: Landscape, epochs: int) -> tuple[list[list[int]], list[list[int]]]:
    """Two lists of batches to look at, alike in number."""
    batches = landscape.batches
    wanted = max(_FEWEST_BATCHES, min(_MOST_BATCHES, len(batches) * epochs // _STEPS_A_BATCH))
    chosen = batches[:wanted]
    if len(chosen) < 2:
        only = chosen[0]
        chosen = [only[0::2], only[1::2] or only]
    middle = len(chosen) // 2
    return chosen[:middle], chosen[middle : 2 * middle]


def _mean(directions: Sequence[Direction]) -> Direction:
    return {name: torch.stack([one[name] for one in directions]).mean(dim=0) for name in directions[0]}


def _direction(gradients: Sequence[Direction], optimizer: str) -> Direction:
    mean = _mean(gradients)
    if optimizer == "sgd":
        return mean
    squares = _mean([{name: own.square() for name, own in one.items()} for one in gradients])
    return {name: own / (squares[name].sqrt() + _TINY) for name, own in mean.items()}


def _of_group(direction: Direction, stage: Stage, name: str) -> Direction:
    """The part of a direction that one rate moves, 0 elsewhere."""
    head = stage == "head" or name == "head_learning_rate"
    return {own: part if own.startswith("head.") == head else torch.zeros_like(part) for own, part in direction.items()}


def _line(slope: float, curvature: float, stage: Stage, name: str) -> Line:
    if slope > 0 and curvature > 0:
        return Line(slope, curvature, float(f"{_SHARE * slope / curvature:.4g}"), True)
    defaults = HeadStageConfig() if stage == "head" else AdapterStageConfig()
    return Line(slope, curvature, float(getattr(defaults, name)), False)
