"""Scale (the paper's open question 3): what the adapter adds to the head, by the size of the frozen model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from caravan.app.charts import Chart
from caravan.app.reproduction.findings import Claim, Findings, Table, verdict
from caravan.app.reproduction.frame import Bench, counts
from caravan.app.reproduction.trials import interval, listed, recall_at_1, recall_series, seeds_text, short_name, train
from caravan.config import BackboneConfig
from caravan.data.dataset import Dataset
from caravan.model.backbone import load_backbone

_COLUMNS = (
    *(
        "data",
        "backbone",
        "parameters",
        "weights",
        "paper",
        "head recall@1 %",
        "head 95%",
        "adapter recall@1 %",
        "adapter 95%",
    ),
    *("adapter gains, points", "seeds", "seconds, head", "seconds, adapter"),
)

Outcomes = Sequence[Mapping[str, Any]]  # one a seed: "head", "adapter", "parameters"


def run(bench: Bench) -> Findings:
    """Train head and adapter on every backbone that is here, pretrained and not."""
    settings = bench.settings
    names = [bench.backbone.name, *bench.small_models(settings["models"])]
    rows: list[list[str]] = []
    found: dict[tuple[str, str, bool], Outcomes] = {}
    for data in bench.present(settings["datasets"]):
        dataset = bench.dataset(data, classes=settings.get("classes"), train=settings["train"], test=settings["test"])
        for name in names:
            for random in (False, True) if settings["random"] else (False,):
                # The mean: a decoder's last token serves none of the small ones (experiment pooling).
                backbone = replace(bench.backbone, name=name, random_weights=random, pooling="mean")
                outcomes = _outcomes(bench, dataset, backbone)
                found[data, name, random] = outcomes
                rows.append(_row(bench, dataset, backbone, outcomes))
    note = (
        "Mean pooling throughout. 95%: resampling of test queries, mean over seeds. Seconds: the adapter's with its "
        "head."
    )
    return Findings(
        claims=[_claim(bench, found, rows)],
        tables=[Table(title="What the adapter adds, by backbone", columns=_COLUMNS, rows=rows, note=note)],
        charts=[_chart(data, found) for data in dict.fromkeys(data for data, _, _ in found)],
        notes=[f"Larger backbones, on a machine that has them: {command}" for command in _elsewhere(bench)],
    )


def _outcomes(bench: Bench, dataset: Dataset, backbone: BackboneConfig) -> list[dict[str, Any]]:
    settings = bench.settings
    weights = "random" if backbone.random_weights else "pretrained"
    matters = {
        **{"train": len(dataset.train), "test": len(dataset.test)},
        **{name: settings[name] for name in ("head_epochs", "adapter_epochs")},
        "catalogue": dataset.catalogue.fingerprint,
    }
    return [
        bench.measure(
            f"{dataset.name}/{short_name(backbone.name)}/{weights}/seed {seed}",
            lambda seed=seed: _measured(bench, dataset, backbone, seed),
            matters=matters,
        )
        for seed in bench.seeds
    ]


def _measured(bench: Bench, dataset: Dataset, backbone: BackboneConfig, seed: int) -> dict[str, Any]:
    model = load_backbone(backbone, seed=seed)
    changes = {
        "training.head.epochs": bench.settings["head_epochs"],
        "training.adapter.epochs": bench.settings["adapter_epochs"],
        "backbone.name": backbone.name,
        "backbone.pooling": backbone.pooling,
        "backbone.random_weights": backbone.random_weights,
    }
    what = f"{dataset.name}, {short_name(backbone.name)}{', random' if backbone.random_weights else ''}, seed {seed}"
    outcome = train(bench, dataset, bench.config(seed, changes), what, backbone=model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"head": outcome["head"], "adapter": outcome["adapter"], "parameters": parameters}


def _stage(outcomes: Outcomes, stage: str) -> tuple[float, float, float]:
    return recall_at_1([outcome[stage] for outcome in outcomes])


def _seconds(outcomes: Outcomes, stage: str) -> str:
    return f"{sum(outcome[stage]['seconds'] for outcome in outcomes) / len(outcomes):.1f}"


def _row(bench: Bench, dataset: Dataset, backbone: BackboneConfig, outcomes: Outcomes) -> list[str]:
    (head, head_low, head_high), (adapter, low, high) = _stage(outcomes, "head"), _stage(outcomes, "adapter")
    weights = "random" if backbone.random_weights else "pretrained"
    return [
        *(counts(dataset), short_name(backbone.name), f"{outcomes[0]['parameters']:,}", weights, "-"),
        *(f"{head:.2f}", interval(head_low, head_high), f"{adapter:.2f}", interval(low, high)),
        *(f"{adapter - head:+.2f}", seeds_text(bench.seeds), _seconds(outcomes, "head"), _seconds(outcomes, "adapter")),
    ]


def _claim(bench: Bench, found: Mapping[tuple[str, str, bool], Outcomes], rows: Sequence[Sequence[str]]) -> Claim:
    gains: dict[str, list[float]] = {}
    sizes = {name: outcomes[0]["parameters"] for (_, name, _), outcomes in found.items()}
    for (_, name, random), outcomes in found.items():
        if not random:
            gains.setdefault(name, []).append(_stage(outcomes, "adapter")[0] - _stage(outcomes, "head")[0])
    ordered = sorted(gains, key=lambda name: sizes[name])
    ours = "; ".join(
        f"{short_name(name)} ({sizes[name] / 1e6:.1f}M): {sum(gains[name]) / len(gains[name]):+.2f}" for name in ordered
    )
    return Claim(
        says="Open question 3: does the adapter's gain over the head grow or shrink with the backbone?",
        paper="left open",
        ours=f"{ours} points, mean over the data",
        verdict=verdict(None),
        reason=(
            f"A question, not a claim. Nothing above {max(sizes.values()) / 1e6:,.0f} million parameters was measured"
            + (", and models of other sizes were pretrained on other words" if len(sizes) > 1 else "")
            + "; the notes say how to go on."
        ),
        data=listed(row[0] for row in rows),
        seeds=seeds_text(bench.seeds),
    )


def _chart(data: str, found: Mapping[tuple[str, str, bool], Outcomes]) -> Chart:
    series = []
    for stage in ("head", "adapter"):
        for random in (False, True):
            kept = [
                (name, outcomes) for (of, name, control), outcomes in found.items() if of == data and control == random
            ]
            kept.sort(key=lambda pair: pair[1][0]["parameters"])
            values = [_stage(outcomes, stage) for _, outcomes in kept]
            if kept:
                series.append(
                    recall_series(
                        f"{stage}, {'random weights' if random else 'pretrained'}",
                        [outcomes[0]["parameters"] for _, outcomes in kept],
                        values,
                    )
                )
    return Chart(
        name=data.replace("_", "-"),
        title=f"{data}: recall@1 by backbone size",
        kind="line",
        x_label="parameters of the frozen model",
        y_label="recall@1, % of test queries",
        series=series,
        log_x=True,
    )


def _elsewhere(bench: Bench) -> list[str]:
    form = " --quick" if bench.quick else ""
    return [
        f"caravan reproduce scale{form} --backbone {name} --device cuda --out {bench.folder.parent}/{short_name(name)}"
        for name in bench.settings["elsewhere"]
    ]
