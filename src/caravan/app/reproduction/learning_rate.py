"""The learning rate: best value, how wide the good range is, and what the automatic choice gets, in both modes."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from caravan.app.charts import Chart, Mark, Series
from caravan.app.reproduction.findings import Claim, Findings, Table, verdict
from caravan.app.reproduction.frame import Bench
from caravan.app.reproduction.trials import listed, recall_at_1, seeds_text, train
from caravan.data.dataset import Dataset
from caravan.data.splits import cut_validation
from caravan.errors import TrainingError

_COLUMNS = (
    *("data", "trained", "rates tried", "best rate", "recall@1 % at best", "good rates", "good range, times"),
    *(
        "default rate",
        "recall@1 % at default",
        "automatic rate",
        "recall@1 % at automatic",
        "automatic behind best",
        "paper",
        "seeds",
        "backbone",
    ),
)
_RULE = "curvature, then a race for the head"  # how a rate is chosen: by another one it is measured anew
_GOAL = 0.2  # points that the automatic choice may be behind the best of the sweep

Mode = Literal["head", "adapter"]
Sweep = Mapping[float, Sequence[Mapping[str, Any]]]  # by rate, ascending: an outcome a seed


def run(bench: Bench) -> Findings:
    """Sweep the rate of the last stage on each data set, in each mode."""
    rows, charts, behind = [], [], []
    for name in bench.present(bench.settings["datasets"]):
        dataset = _validating(bench, name)
        for mode in _modes(bench, name):
            rates: list[float] = bench.settings[f"{mode}_rates"]
            sweep = {rate: _outcomes(bench, dataset, mode, rate) for rate in rates}
            automatic = _outcomes(bench, dataset, mode, "auto") if bench.settings["automatic"] else None
            rows.append(_row(bench, dataset, mode, sweep, automatic))
            charts.append(_chart(bench, name, mode, sweep, automatic))
            if automatic is not None:
                behind.append(_best(sweep)[1] - _recall(automatic))
    within = bench.settings["within"]
    note = (
        f"Recall on validation queries cut from train; no test query is looked at. Good rates: those at most {within} "
        f"points behind the best of the sweep; their range is the largest by the smallest. A training whose loss is no "
        f"longer finite counts as 0."
    )
    return Findings(
        claims=[_claim(bench, behind, rows)],
        tables=[Table(title="How much the learning rate matters", columns=_COLUMNS, rows=rows, note=note)],
        charts=charts,
        notes=[]
        if bench.settings["automatic"]
        else ["The automatic rate was not measured (setting automatic = false)."],
    )


def _modes(bench: Bench, name: str) -> list[Mode]:
    return [mode for mode in bench.settings["modes"] if mode == "head" or name in bench.settings["adapter_datasets"]]


def _validating(bench: Bench, name: str) -> Dataset:
    """The data set with its validation queries in place of its test queries."""
    settings = bench.settings
    cut = bench.dataset(name, classes=settings.get("classes"), train=settings["train"])
    train, validation = cut_validation(cut.train, settings["validation"], seed=0)
    return replace(cut, train=train, validation=(), test=validation)


def _outcomes(bench: Bench, dataset: Dataset, mode: Mode, rate: float | str) -> list[dict[str, Any]]:
    epochs = {stage: bench.settings[f"{stage}_epochs"] for stage in ("head", "adapter")}
    matters = {"epochs": epochs, "train": len(dataset.train), "validation": len(dataset.test)}
    matters |= {"passages": bench.settings["passages"], "catalogue": dataset.catalogue.fingerprint}
    matters |= {"rule": _RULE} if rate == "auto" else {}
    return [
        bench.measure(
            f"{dataset.name}/{mode}/rate {rate if isinstance(rate, str) else f'{rate:g}'}/seed {seed}",
            lambda seed=seed: _measured(bench, dataset, mode, rate, seed),
            matters=matters,
        )
        for seed in bench.seeds
    ]


def _measured(bench: Bench, dataset: Dataset, mode: Mode, rate: float | str, seed: int) -> dict[str, Any]:
    changes = {
        "training.mode": mode,
        "training.head.epochs": bench.settings["head_epochs"],
        "training.adapter.epochs": bench.settings["adapter_epochs"],
        "training.passages": bench.settings["passages"],
        f"training.{mode}.learning_rate": rate,
    }
    what = f"{dataset.name}, {mode}, rate {rate}"
    try:
        outcome = train(bench, dataset, bench.config(seed, changes), what, bootstrap=0)
        chosen = outcome["record"].get("learning_rates", {}).get(mode, {}).get("learning_rate")
        return {**outcome[mode], **({} if chosen is None else {"chosen": chosen})}
    except TrainingError as error:
        return {"recall@1": {"value": 0.0, "low": None, "high": None}, "diverged": str(error)}


def _recall(outcomes: Sequence[Mapping[str, Any]]) -> float:
    return recall_at_1(outcomes)[0]


def _best(sweep: Sweep) -> tuple[float, float]:
    """The rate with the highest recall, and that; the smallest of equals."""
    rate = max(sweep, key=lambda rate: _recall(sweep[rate]))
    return rate, _recall(sweep[rate])


def good_rates(sweep: Sweep, within: float) -> list[float]:
    """The rates at most `within` points behind the best, ascending: those around it without a gap."""
    rates, (best, most) = list(sweep), _best(sweep)
    kept = [best]
    for side in (rates[: rates.index(best)][::-1], rates[rates.index(best) + 1 :]):
        for rate in side:
            if _recall(sweep[rate]) < most - within:
                break
            kept.append(rate)
    return sorted(kept)


def _default(bench: Bench, mode: Mode) -> Any:
    return getattr(bench.config(0).training, mode).learning_rate


def _row(
    bench: Bench, dataset: Dataset, mode: Mode, sweep: Sweep, automatic: Sequence[Mapping[str, Any]] | None
) -> list[str]:
    best, most = _best(sweep)
    good, default = good_rates(sweep, bench.settings["within"]), _default(bench, mode)
    at_default = f"{_recall(sweep[default]):.2f}" if default in sweep else "not tried"
    chosen = sorted(outcome["chosen"] for outcome in automatic or [] if "chosen" in outcome)
    found = "" if automatic is None else f"{_recall(automatic):.2f}"
    return [
        f"{dataset.name}: {len(dataset.train):,} train, {len(dataset.test):,} validation",
        *(mode, f"{len(sweep)}: {min(sweep):g} to {max(sweep):g}", f"{best:g}", f"{most:.2f}"),
        *(f"{good[0]:g} to {good[-1]:g}", f"{good[-1] / good[0]:.0f}", str(default), at_default),
        " to ".join(dict.fromkeys(f"{rate:.2g}" for rate in (*chosen[:1], *chosen[-1:]))),
        *(found or "not measured", "" if automatic is None else f"{most - _recall(automatic):+.2f}", "-"),
        *(seeds_text(bench.seeds), bench.backbone.name),
    ]


def _chart(bench: Bench, name: str, mode: Mode, sweep: Sweep, automatic: Sequence[Mapping[str, Any]] | None) -> Chart:
    each = {rate: [100 * outcome["recall@1"]["value"] for outcome in outcomes] for rate, outcomes in sweep.items()}
    most = _best(sweep)[1]
    series = [
        Series(
            name=f"seed {bench.seeds[0]}" if len(bench.seeds) == 1 else f"seeds {seeds_text(bench.seeds)}: mean, range",
            x=list(each),
            y=[statistics.mean(values) for values in each.values()],
            low=[min(values) for values in each.values()] if len(bench.seeds) > 1 else None,
            high=[max(values) for values in each.values()] if len(bench.seeds) > 1 else None,
        )
    ]
    marks = [Mark(name=f"{bench.settings['within']} points behind the best", y=most - bench.settings["within"])]
    if automatic is not None:
        marks.append(Mark(name="automatic rate", y=_recall(automatic)))
    return Chart(
        name=f"{name.replace('_', '-')}-{mode}",
        title=f"{name}, {mode}: recall by learning rate",
        kind="line",
        x_label=f"learning rate of the {mode}",
        y_label="recall@1, % of validation queries",
        series=series,
        paper=marks,
        log_x=True,
    )


def _claim(bench: Bench, behind: Sequence[float], rows: Sequence[Sequence[str]]) -> Claim:
    return Claim(
        says="The bound on the learning rate gives a usable choice without tuning",
        paper="no figure (theorem 5.5)",
        ours=f"{max(behind):.2f} points behind the best of the sweep at worst" if behind else "-",
        verdict=verdict(max(behind) <= _GOAL if behind else None),
        reason=(
            f"Held where the automatic rate is at most {_GOAL} points behind the best of the sweep in every row. "
            "The loss's curvature asks for it; the head's is raced against its neighbours on held-out training queries."
            if behind
            else "The automatic rate was not measured."
        ),
        data=listed(row[0] for row in rows),
        seeds=seeds_text(bench.seeds),
    )
