"""The rates that settings leave open: chosen before a stage starts, kept for a resume, written down."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from caravan.config import Config
from caravan.data.records import Example
from caravan.errors import ConfigError
from caravan.model.retriever import Retriever
from caravan.training.checkpoint import Checkpoint, Snapshot
from caravan.training.features import FeatureStore
from caravan.training.progress import Report
from caravan.training.rate import automatic, choose_rates, with_rates
from caravan.training.trainer import Stage


def settle_rates(
    config: Config,
    stage: Stage,
    retriever: Retriever,
    examples: Sequence[Example],
    passages: Sequence[Example],
    *,
    store: FeatureStore,
    report: Report | None,
    kept: Checkpoint | None,
) -> tuple[Config, dict[str, Any]]:
    """Put numbers in place of a stage's "auto".

    Args:
        config: all settings.
        stage: about to start.
        retriever: at its start.
        examples: queries to choose on; none of a federation, which chooses on what every owner has.
        passages: what documents say of themselves.
        store: where vectors are kept.
        report: called as the work goes on.
        kept: where the choice is kept, and taken from if it is there, so that a training that is taken up again goes
            on with the rate it began with.

    Returns:
        The settings, and how the rates came about; nothing where none was open.

    Raises:
        ConfigError: there is nothing to choose on.
        StorageError: what was kept cannot be trusted.
    """
    names = automatic(config.training, stage)
    if not names:
        return config, {}
    if not examples and not passages:
        raise ConfigError(
            f'training.{stage}.{names[0]} = "auto" is chosen on passages of documents, as clients keep their queries, '
            f"and there are none (training.passages = {config.training.passages}); set it to a number"
        )
    snapshot = kept.load() if kept else None
    if snapshot is None:
        choice = choose_rates(
            retriever,
            examples,
            stage,
            config.training,
            passages=passages,
            seed=config.seed,
            store=store,
            report=report,
        )
        snapshot = Snapshot(values={"rates": choice.rates, "record": choice.to_dict()})
        if kept:
            kept.save(snapshot)
    training = with_rates(config.training, stage, snapshot.values["rates"])
    return replace(config, training=training), snapshot.values["record"]
