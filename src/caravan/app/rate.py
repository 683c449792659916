"""The rates that settings leave open: chosen before a stage starts, kept for a resume, written down."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from caravan.app.comparison import rank_queries
from caravan.app.race import race
from caravan.config import Config
from caravan.data.dataset import Dataset
from caravan.data.records import Example
from caravan.errors import ConfigError
from caravan.model.retriever import Retriever
from caravan.training.checkpoint import Checkpoint, Snapshot
from caravan.training.features import FeatureStore
from caravan.training.progress import Report
from caravan.training.rate import automatic, choose_rates, with_rates
from caravan.training.trainer import Stage

_FEWEST_PASSAGES = 32  # two invented label texts asked for 25 times the rate that the queries ask for

Train = Callable[[Dataset, Config, FeatureStore, Report | None], Retriever]


def settle_rates(
    config: Config,
    stage: Stage,
    retriever: Retriever,
    dataset: Dataset,
    passages: Sequence[Example],
    *,
    train: Train | None,
    store: FeatureStore,
    report: Report | None,
    kept: Checkpoint | None,
) -> tuple[Config, dict[str, Any]]:
    """Put numbers in place of a stage's "auto".

    The rates that the loss's curvature asks for (`training.rate`); the head's is then raced against its neighbours on
    queries that are held out in turn (`app.race`), because how far a head may learn its queries by heart shows on
    others only.

    Args:
        config: all settings.
        stage: about to start.
        retriever: at its start.
        dataset: whose training queries are chosen on.
        passages: what documents say of themselves.
        train: makes and trains a retriever, centrally; None of a federation, whose queries are its clients': passages
            alone are looked at, and nothing is held out.
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
    examples = dataset.train if train is not None else ()
    if not examples and len(passages) < _FEWEST_PASSAGES:
        raise ConfigError(
            f'training.{stage}.{names[0]} = "auto" is chosen on passages of documents, as clients keep their queries, '
            f"and {len(passages)} are too few (training.passages = {config.training.passages}; at least "
            f"{_FEWEST_PASSAGES}); set it to a number"
        )
    snapshot = kept.load() if kept else None
    if snapshot is None or "rates" not in snapshot.values:
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
        rates, record = choice.rates, choice.to_dict()
        if stage == "head" and train is not None and config.training.head.epochs:
            rate, told = _raced(config, rates["learning_rate"], dataset, train, store, report, kept)
            rates, record = {"learning_rate": rate}, {**record, "learning_rate": rate, **told}
        snapshot = Snapshot(values={"rates": rates, "record": record})
        if kept:
            kept.save(snapshot)
    training = with_rates(config.training, stage, snapshot.values["rates"])
    return replace(config, training=training), snapshot.values["record"]


def _raced(
    config: Config,
    rate: float,
    dataset: Dataset,
    train: Train,
    store: FeatureStore,
    report: Report | None,
    kept: Checkpoint | None,
) -> tuple[float, dict[str, Any]]:
    """The head's rate after a race, and how it went; the rate as it is where there is no race."""
    with ExitStack() as stack:
        if store.folder is None:  # every training of the race needs the vectors: compute them once for all of these
            store = FeatureStore(Path(stack.enter_context(TemporaryDirectory(prefix="caravan-"))))

        def trial(some: Sequence[Example], others: Sequence[Example], rate: float, report: Report | None) -> list[bool]:
            training = replace(with_rates(config.training, "head", {"learning_rate": rate}), mode="head")
            part = replace(dataset, train=some)
            trained = train(part, replace(config, training=training), store, report)
            rows = rank_queries(trained, [example.text for example in others], store).rows
            gold = (dataset.catalogue.gold_rows(example) for example in others)
            return [int(first) in own for first, own in zip(rows[:, 0], gold, strict=True)]

        found = race(rate, dataset.train, trial, seed=config.seed, kept=kept, report=report)
    return (rate, {}) if found is None else (found.rate, found.to_dict())
