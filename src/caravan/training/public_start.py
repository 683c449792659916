"""The public start of a private training: what documents say of themselves, before any query."""

from collections.abc import Sequence

from caravan.config import TrainingConfig
from caravan.data.records import Example
from caravan.model.retriever import Retriever
from caravan.training.features import FeatureStore
from caravan.training.progress import Report, prefixed
from caravan.training.trainer import Stage, fit


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
