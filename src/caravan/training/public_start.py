"""Private training from a public start: first what documents say of themselves, then the queries."""

from collections.abc import Sequence

from caravan.config import TrainingConfig
from caravan.data.records import Example
from caravan.model.retriever import Retriever
from caravan.training.checkpoint import Checkpoint
from caravan.training.features import FeatureStore
from caravan.training.private import PrivateSteps
from caravan.training.progress import Report, prefixed
from caravan.training.trainer import EpochRecord, Stage, fit


def start_on_passages(
    retriever: Retriever,
    passages: Sequence[Example],
    stage: Stage,
    config: TrainingConfig,
    *,
    seed: int,
    store: FeatureStore | None = None,
    report: Report | None = None,
) -> None:
    """Train a stage on passages alone, for as many epochs as it has, without noise: documents are public.

    Args:
        retriever: changed in place.
        passages: what documents say of themselves; without any nothing is done.
        stage: what is trained.
        config: settings of both stages.
        seed: decides the order of passages.
        store: where vectors are kept.
        report: called as the work goes on.
    """
    if passages:
        fit(retriever, passages, stage, config, seed=seed, store=store, report=prefixed(report, "passages: "))


def fit_privately(
    retriever: Retriever,
    examples: Sequence[Example],
    stage: Stage,
    config: TrainingConfig,
    *,
    seed: int,
    privacy: PrivateSteps,
    passages: Sequence[Example] = (),
    validation: Sequence[Example] = (),
    store: FeatureStore | None = None,
    report: Report | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[EpochRecord]:
    """Train a stage on passages without noise, then on queries with it; see `fit`.

    The passages' part is not in the snapshots and starts again after a kill; it costs time and no privacy.

    Returns:
        One record an epoch of the private part.
    """
    privacy.check(retriever, examples, config, passages=False)  # before the time that the passages take
    if checkpoint is None or checkpoint.load() is None:
        start_on_passages(retriever, passages, stage, config, seed=seed, store=store, report=report)
    return fit(
        retriever,
        examples,
        stage,
        config,
        seed=seed,
        privacy=privacy,
        validation=validation,
        store=store,
        report=report,
        checkpoint=checkpoint,
    )
