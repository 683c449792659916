"""A whole experiment: data, training, rivals, measures, saved folder; and saved retrievers side by side."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caravan.app.comparison import Comparison, measure_latency
from caravan.app.learning import Experiment
from caravan.config import Config, changed, config_from_dict
from caravan.data.dataset import Dataset
from caravan.errors import StorageError
from caravan.model.retriever import Retriever
from caravan.storage import check_destination, load, save
from caravan.training.features import FeatureStore, default_cache
from caravan.training.progress import Report
from caravan.training.trainer import Stage


def run_experiment(
    config: Config, out: str | Path, *, resume: bool = False, report: Report | None = None
) -> tuple[Comparison | None, Retriever]:
    """Read data, train, measure beside the rivals, and save: what `caravan train` does.

    Args:
        config: all settings.
        out: folder of the saved retriever; snapshots lie beside it in `OUT.checkpoint` until it is saved.
        resume: take up the snapshots.
        report: called as the work goes on.

    Returns:
        The comparison, or None where the data has no held-out queries, and the retriever.

    Raises:
        CaravanError: see `Experiment`; nothing saved before is touched.
    """
    out = Path(out)
    check_destination(out)
    dataset = Dataset.from_config(config.data, seed=config.seed)
    experiment = Experiment(dataset, config, report=report, checkpoint=checkpoint_folder(out), resume=resume)
    comparison = start_comparison(experiment) if len(dataset.test) or len(dataset.validation) else None
    prefix = "federated " if experiment.federated else ""

    def on_stage(stage: Stage, retriever: Retriever, seconds: float) -> None:
        if comparison is not None:
            comparison.add_retriever(prefix + stage, retriever, seconds=seconds)

    retriever = experiment.run(on_stage)
    if comparison is not None:
        retriever.record["latency"] = measure_latency(retriever, comparison.texts)
    save_result(retriever, comparison, out)
    experiment.clear_checkpoint()
    return comparison, retriever


def checkpoint_folder(out: str | Path) -> Path:
    """Where the snapshots of a training lie whose result goes to `out`: `OUT.checkpoint`, beside it."""
    place = Path(os.path.abspath(out))  # noqa: PTH100 - unlike resolve, a link stays where it is; "." gets a name
    return place.parent / f"{place.name}.checkpoint"


def start_comparison(experiment: Experiment) -> Comparison:
    """A comparison on the experiment's data, with the rivals measured if the settings ask for them."""
    comparison = Comparison(experiment.dataset, experiment.config, store=experiment.store, report=experiment.report)
    if experiment.config.evaluation.baselines:
        comparison.add_baselines(experiment.backbone)
    return comparison


def save_result(retriever: Retriever, comparison: Comparison | None, out: str | Path) -> None:
    """Save a retriever with the measures of its comparison in its record.

    Raises:
        StorageError: the folder cannot be written.
    """
    if comparison is not None:
        retriever.record["metrics"] = comparison.to_dict()
        retriever.record["metrics_split"] = comparison.split
    save(retriever, out)


def compare_saved(
    folders: Sequence[str],
    data: str | None,
    settings: Mapping[str, Any] | None = None,
    *,
    baselines: bool | None = None,
    report: Report | None = None,
) -> tuple[Comparison, dict[str, float]]:
    """Measure saved retrievers, and the rivals, on the same queries.

    Args:
        folders: what `save` wrote; the first one's record says how its data was read.
        data: what to compare on; the first retriever's training data if None.
        settings: settings to change, by dotted key.
        baselines: whether the rivals are measured too; as recorded if None.
        report: called as the work goes on.

    Returns:
        The comparison, and the last retriever's latency, see `measure_latency`.

    Raises:
        DataError: a retriever was trained on other documents than the data set's.
        StorageError: a folder is no retriever.
    """
    # All of them before anything is computed: a folder that is no retriever is to be known at once.
    retrievers = _load_all(folders)
    first = retrievers[0]
    changes = dict(settings or {})
    if data is not None:
        # Files named for the training data say nothing about other data.
        others = {"data.documents": None, "data.validation": None, "data.test": None}
        changes = {**others, **changes, "data.path": data}
    if baselines is not None:
        changes["evaluation.baselines"] = baselines
    config = recorded_settings(first, folders[0], changes)
    dataset = Dataset.from_config(config.data, seed=config.seed)
    comparison = Comparison(dataset, config, store=FeatureStore(default_cache()), report=report)
    names = _names(folders)
    for name, retriever in zip(names, retrievers, strict=True):
        comparison.check_catalogue(name, retriever)
    if config.evaluation.baselines:
        comparison.add_baselines(first.encoder.backbone)
    for name, retriever in zip(names, retrievers, strict=True):
        seconds = retriever.record.get("seconds")
        comparison.add_retriever(name, retriever, seconds=float(seconds) if isinstance(seconds, int | float) else 0.0)
    return comparison, measure_latency(retrievers[-1], comparison.texts)


def recorded_settings(retriever: Retriever, folder: str, changes: Mapping[str, Any]) -> Config:
    """The settings that a saved retriever was trained with, some of them changed.

    Args:
        retriever: as loaded; one that was made without settings has the defaults.
        folder: where it was loaded from, for messages.
        changes: settings to change, by dotted key.

    Raises:
        ConfigError: a setting is unknown or not allowed.
        StorageError: what was saved are no settings.
    """
    values: Any = retriever.record.get("config") or Config(backbone=retriever.encoder.backbone.config).to_dict()
    if not isinstance(values, dict) or not isinstance(values.get("data"), dict):
        raise StorageError(f"{folder}/training.json: config holds no settings; restore the file, or train again")
    return config_from_dict(changed(values, changes), source=f"{folder}/training.json")


def _load_all(folders: Sequence[str]) -> list[Retriever]:
    """Load retrievers; those on the same frozen model share one copy of it."""
    loaded: list[Retriever] = []
    for folder in folders:
        retriever = load(folder)
        encoder = retriever.encoder
        for other in (one.encoder.backbone for one in loaded):
            if other.hash == encoder.backbone.hash and other.config == encoder.backbone.config:
                encoder.backbone = other
        loaded.append(retriever)
    return loaded


def _names(folders: Sequence[str]) -> list[str]:
    """The folders' names, or their paths where two have the same name."""
    names = [Path(os.path.abspath(folder)).name for folder in folders]  # noqa: PTH100 - "." gets a name
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
