"""One training of an experiment and what it came to, and figures of several seeds as text."""

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from caravan.app.charts import Series
from caravan.app.comparison import rank_queries
from caravan.app.learning import Experiment
from caravan.app.reproduction.frame import Bench
from caravan.config import Config
from caravan.data.dataset import Dataset
from caravan.data.records import Example
from caravan.model.backbone import Backbone
from caravan.model.retriever import Retriever
from caravan.training.evaluation import Ranking, measure
from caravan.training.features import FeatureStore
from caravan.training.trainer import Stage


def train(
    bench: Bench,
    dataset: Dataset,
    config: Config,
    what: str,
    *,
    backbone: Backbone | None = None,
    store: FeatureStore | None = None,
    bootstrap: int = 1000,
) -> dict[str, Any]:
    """Train once, centrally or on clients as the settings say, and rank the test queries after each stage.

    Args:
        bench: whose work it is.
        dataset: catalogue, train and test.
        config: all settings.
        what: said while it goes on.
        backbone: the frozen model that `config` names; the bench's own if None.
        store: where vectors are kept; the user's cache if None. With an empty one the seconds hold the encoding.
        bootstrap: resamples behind the intervals.

    Returns:
        By stage ("head", "adapter"): `figures` of the test queries, and "seconds" of training up to there, the
        encoding of what the store did not have included; beside them "record", the retriever's record.
    """
    store, report = store or bench.store, bench.telling(what)
    result: dict[str, Any] = {}
    started = time.perf_counter()
    ranked = 0.0

    def on_stage(stage: Stage, retriever: Retriever, _: float) -> None:
        nonlocal ranked
        seconds = time.perf_counter() - started - ranked
        found = figures_of(retriever, dataset.test, bench, seed=config.seed, bootstrap=bootstrap)
        ranked = time.perf_counter() - started - seconds
        result[stage] = {**found, "seconds": round(seconds, 3)}

    experiment = Experiment(dataset, config, backbone=backbone or bench.model, store=store, report=report)
    retriever = experiment.run(on_stage)
    return {**result, "record": dict(retriever.record)}


def figures_of(
    retriever: Retriever, examples: Sequence[Example], bench: Bench, *, seed: int = 0, bootstrap: int = 1000
) -> dict[str, Any]:
    """Rank queries and give `figures`."""
    ranking = rank_queries(retriever, [example.text for example in examples], bench.store, bench.report)
    gold = [retriever.catalogue.gold_rows(example) for example in examples]
    return figures(ranking, gold, seed=seed, bootstrap=bootstrap)


def figures(ranking: Ranking, gold: Sequence[Sequence[int]], *, seed: int = 0, bootstrap: int = 1000) -> dict[str, Any]:
    """All measures as plain values: name to {"value", "low", "high"}, shares of 1."""
    return {name: asdict(value) for name, value in measure(ranking, gold, bootstrap=bootstrap, seed=seed).items()}


def recall_at_1(outcomes: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    """The mean over seeds of recall@1 in percent, and the means of its 95% bounds (resampling of test queries)."""
    firsts = [outcome["recall@1"] for outcome in outcomes]
    mean, low, high = (
        100 * statistics.mean(first["value"] if first[name] is None else first[name] for first in firsts)
        for name in ("value", "low", "high")
    )
    return mean, low, high


def recall_series(name: str, x: Sequence[Any], recalls: Sequence[tuple[float, float, float]]) -> Series:
    """What `recall_at_1` gave, a point each, with its bounds."""
    means, lows, highs = ([recall[place] for recall in recalls] for place in range(3))
    return Series(name=name, x=x, y=means, low=lows, high=highs)


def short_name(model: str) -> str:
    """A model's id or folder without what is before its last slash."""
    return model.rstrip("/").rsplit("/", 1)[-1]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The range over seeds as text, or "" of a single one."""
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}" if len(values) > 1 else ""


def interval(low: float, high: float, digits: int = 2) -> str:
    """Bounds as text."""
    return f"[{low:.{digits}f}, {high:.{digits}f}]"


def listed(texts: Iterable[str]) -> str:
    """Each text once, as one."""
    return "; ".join(dict.fromkeys(texts))


def seeds_text(seeds: Sequence[int]) -> str:
    """Seeds as text."""
    return ", ".join(str(seed) for seed in seeds)
