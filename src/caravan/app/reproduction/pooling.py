"""Pooling: the last token's state (EOS) against the mean over tokens and the first token's state, time and accuracy."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from caravan.app.charts import Chart
from caravan.app.reproduction.findings import Claim, Findings, Table, verdict
from caravan.app.reproduction.frame import Bench, counts
from caravan.app.reproduction.trials import (
    interval,
    listed,
    recall_at_1,
    recall_series,
    seeds_text,
    short_name,
    spread,
    train,
)
from caravan.config import BackboneConfig
from caravan.data.dataset import Dataset
from caravan.model.adapter import IdentityAdapter
from caravan.model.backbone import Backbone, load_backbone
from caravan.model.encoder import Encoder

_COLUMNS = (
    *("data", "backbone", "pooling", "paper", "recall@1 %", "95%", "over seeds", "seeds"),
    *("encoding, texts/s", "head training, s"),
)
_NOTE = (
    "Head alone on vectors of the frozen model. 95%: resampling of test queries, mean over seeds. Encoding: the "
    "fastest of the passes over the same test queries, vectors of no cache."
)

Outcomes = Mapping[tuple[str, str, str], Sequence[Mapping[str, Any]]]  # by data, backbone and pooling: one a seed


def run(bench: Bench) -> Findings:
    """Train a head on each pooling's vectors, for the backbone and the small decoders that are here."""
    settings = bench.settings
    names = [bench.backbone.name, *bench.small_models(settings["models"])]
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    rows: list[list[str]] = []
    for data in bench.present(settings["datasets"]):
        dataset = bench.dataset(data, classes=settings.get("classes"), train=settings["train"], test=settings["test"])
        for name in names:
            for pooling in settings["poolings"]:
                backbone = replace(bench.backbone, name=name, pooling=pooling)
                outcomes = _outcomes(bench, dataset, backbone)
                found[data, short_name(name), pooling] = outcomes
                rows.append(_row(bench, dataset, backbone, outcomes))
    return Findings(
        claims=[_claim(bench, found, rows)],
        tables=[Table(title="Accuracy and time by pooling", columns=_COLUMNS, rows=rows, note=_NOTE)],
        charts=[_chart(data, found, settings["poolings"]) for data in dict.fromkeys(data for data, _, _ in found)],
    )


def _outcomes(bench: Bench, dataset: Dataset, backbone: BackboneConfig) -> list[dict[str, Any]]:
    """One measurement a seed; the model is only loaded where there is something left to measure."""
    loaded: list[Backbone] = []

    def model() -> Backbone:
        if not loaded:
            loaded.append(load_backbone(backbone, seed=bench.seeds[0]))
        return loaded[0]

    place = f"{dataset.name}/{short_name(backbone.name)}/{backbone.pooling}"
    # The time of encoding has nothing to do with the seed.
    speed = bench.measure(f"{place}/encoding", lambda: _speed(bench, dataset, model()))
    outcomes = []
    for seed in bench.seeds:
        work = partial(_measured, bench, dataset, backbone, model, seed)
        outcomes.append({**speed, **bench.measure(f"{place}/seed {seed}", work)})
    return outcomes


def _measured(
    bench: Bench, dataset: Dataset, backbone: BackboneConfig, model: Callable[[], Backbone], seed: int
) -> dict[str, Any]:
    what = f"{dataset.name}, {short_name(backbone.name)}, {backbone.pooling}"
    changes = {
        "training.mode": "head",
        "training.head.epochs": bench.settings["head_epochs"],
        "backbone.name": backbone.name,
        "backbone.pooling": backbone.pooling,
    }
    return train(bench, dataset, bench.config(seed, changes), what, backbone=model())["head"]


def _speed(bench: Bench, dataset: Dataset, model: Backbone) -> dict[str, float]:
    """How many test queries are encoded in a second, in the fastest of some passes."""
    encoder = Encoder(model, IdentityAdapter(model.embedding_width))
    texts = [example.text for example in dataset.test]
    passes = []
    for _ in range(bench.settings["passes"]):
        started = time.perf_counter()
        encoder.encode(texts)
        passes.append(time.perf_counter() - started)
    return {"texts_per_second": round(len(texts) / min(passes), 1)}


def _row(bench: Bench, dataset: Dataset, backbone: BackboneConfig, outcomes: Sequence[Mapping[str, Any]]) -> list[str]:
    mean, low, high = recall_at_1(outcomes)
    each = [100 * outcome["recall@1"]["value"] for outcome in outcomes]
    speed = outcomes[0]["texts_per_second"]
    seconds = statistics.mean(outcome["seconds"] for outcome in outcomes)
    return [
        *(counts(dataset), short_name(backbone.name), backbone.pooling, "-", f"{mean:.2f}", interval(low, high)),
        *(spread(each), seeds_text(bench.seeds), f"{speed:,.0f}", f"{seconds:.1f}"),
    ]


def _claim(bench: Bench, found: Outcomes, rows: Sequence[Sequence[str]]) -> Claim:
    """Last token against mean, over all data and backbones: how often, and by how much."""
    gaps: dict[str, list[float]] = {}
    for (data, name, pooling), outcomes in found.items():
        if pooling == "last" and (data, name, "mean") in found:
            gap = recall_at_1(outcomes)[0] - recall_at_1(found[data, name, "mean"])[0]
            gaps.setdefault(name, []).append(gap)
    ours = "; ".join(f"{name}: {min(each):+.2f} to {max(each):+.2f} points" for name, each in gaps.items())
    every = [gap for each in gaps.values() for gap in each]
    return Claim(
        says="The state of the end-of-sequence token serves as well as the mean over tokens",
        paper="EOS chosen, no figure",
        ours=ours or "-",
        verdict=verdict(all(gap > -0.5 for gap in every) if every else None),
        reason=(
            "Held where the last token is at most 0.5 points behind the mean on every data set and backbone here. None "
            "of these models was trained on its end token; the paper's was not available."
        ),
        data=listed(row[0] for row in rows),
        seeds=seeds_text(bench.seeds),
    )


def _chart(data: str, found: Outcomes, poolings: Sequence[str]) -> Chart:
    names = list(dict.fromkeys(name for of, name, _ in found if of == data))
    series = []
    for pooling in poolings:
        values = [recall_at_1(found[data, name, pooling]) for name in names]
        series.append(recall_series(pooling, names, values))
    return Chart(
        name=data.replace("_", "-"),
        title=f"{data}: recall@1 by pooling, head alone",
        kind="bar",
        x_label="backbone",
        y_label="recall@1, % of test queries",
        series=series,
        y_limits=(0, 105),
    )
