"""Retrieval: vector search, centroids, nearest neighbour, classifier alone, adapter and classifier; and why 12.36%."""

import statistics
from dataclasses import replace
from typing import Any

from caravan.app.charts import Chart, Mark
from caravan.app.reproduction import spam
from caravan.app.reproduction.findings import Findings, Table
from caravan.app.reproduction.frame import Bench, counts
from caravan.app.reproduction.parts import some
from caravan.app.reproduction.retrieval_claims import PAPER, Rows, claims
from caravan.app.reproduction.spam import Spam
from caravan.app.reproduction.trials import figures, interval, recall_at_1, recall_series, seeds_text, spread, train
from caravan.data.dataset import Dataset
from caravan.errors import ConfigError
from caravan.model.adapter import IdentityAdapter
from caravan.model.encoder import Encoder
from caravan.training.baselines import centroids, mips, nearest_neighbour
from caravan.training.features import FeatureStore

_METHODS = ("MIPS", "centroid", "1-NN", "classifier alone", "adapter + classifier")
_COLUMNS = (
    *("data", "method", "paper", "recall@1 %", "95%", "over seeds", "recall@10 %", "seeds", "backbone"),
    "training, s",
)


def run(bench: Bench) -> Findings:
    """Measure all methods on all data sets that are here, then take the SMS figures apart."""
    bench = replace(bench, backbone=replace(bench.backbone, max_tokens=bench.settings["max_tokens"]))
    found: Rows = {}
    for name in bench.present(bench.settings["datasets"]):
        _measure(bench, name, found)
    tables, charts = [_table(bench, found)], [_chart(found)]
    sms: Spam | None = None
    if ("sms_spam", "MIPS") in found:
        sms = spam.take_apart(bench, bench.dataset("sms_spam"))
        tables += sms.tables
        charts += sms.charts
    return Findings(claims=claims(bench, found, sms), tables=tables, charts=charts, notes=_notes(bench, found))


def _measure(bench: Bench, name: str, found: Rows) -> None:
    settings, epochs = bench.settings, _epochs(bench, name)
    dataset = bench.dataset(
        name, classes=settings.get("classes"), train=settings.get("train"), test=settings.get("test")
    )
    what = {"max_tokens": settings["max_tokens"], "counts": counts(dataset), "catalogue": dataset.catalogue.fingerprint}
    for method, outcome in bench.measure(f"{name}/untrained", lambda: _untrained(bench, dataset), matters=what).items():
        if method in _METHODS:
            found[name, method] = [{**outcome, "data": counts(dataset)}]
    small = replace(dataset, train=some(dataset.train, settings["adapter_train"], 0))
    whole = len(small.train) == len(dataset.train)
    recipe = {**what, "head_epochs": settings["head_epochs"], "adapter_epochs": epochs}
    for seed in bench.seeds:
        if not whole:
            key = f"{name}/head/seed {seed}"
            outcome = bench.measure(key, lambda seed=seed: _trained(bench, dataset, seed, name, "head"), matters=recipe)
            found.setdefault((name, "classifier alone"), []).append({**outcome["head"], "data": counts(dataset)})
        key, of = f"{name}/adapter/seed {seed}", {**recipe, "adapter_train": len(small.train)}
        outcome = bench.measure(key, lambda seed=seed: _trained(bench, small, seed, name, "adapter"), matters=of)
        method = "classifier alone" if whole else f"classifier alone, {len(small.train):,} queries"
        found.setdefault((name, method), []).append({**outcome["head"], "data": counts(small)})
        found.setdefault((name, "adapter + classifier"), []).append({**outcome["adapter"], "data": counts(small)})


def _epochs(bench: Bench, name: str) -> int:
    epochs = bench.settings["adapter_epochs"]
    if name not in epochs:
        raise ConfigError(f"retrieval: adapter_epochs says nothing of {name}; add it with --set adapter_epochs=...")
    return epochs[name]


def _untrained(bench: Bench, dataset: Dataset) -> dict[str, Any]:
    encoder = Encoder(bench.model, IdentityAdapter(bench.model.embedding_width))
    rows = bench.store.encode(encoder, [document.content for document in dataset.catalogue])
    queries = bench.store.encode(encoder, [example.text for example in dataset.test])
    known = bench.store.encode(encoder, [example.text for example in dataset.train])
    asked = [dataset.catalogue.gold_rows(example) for example in dataset.test]
    gold = [dataset.catalogue.gold_rows(example) for example in dataset.train]
    rankings = {
        "MIPS": mips(queries, rows),
        "centroid": centroids(queries, known, gold, rows),
        "1-NN": nearest_neighbour(queries, known, gold, document_count=len(rows)),
    }
    return {name: figures(ranking, asked) for name, ranking in rankings.items()}


def _trained(bench: Bench, dataset: Dataset, seed: int, name: str, mode: str) -> dict[str, Any]:
    changes = {
        "training.mode": mode,
        "training.head.epochs": bench.settings["head_epochs"],
        "training.adapter.epochs": _epochs(bench, name),
    }
    # Each training encodes what it needs itself, so that its seconds are those of somebody who begins with it.
    store = FeatureStore() if len(dataset.train) <= bench.settings["adapter_train"] else bench.store
    outcome = train(bench, dataset, bench.config(seed, changes), f"{name}, {mode}, seed {seed}", store=store)
    return {stage: outcome[stage] for stage in ("head", "adapter") if stage in outcome}


def _table(bench: Bench, found: Rows) -> Table:
    rows = []
    for (name, method), outcomes in found.items():
        mean, low, high = recall_at_1(outcomes)
        each = [100 * outcome["recall@1"]["value"] for outcome in outcomes]
        ten = 100 * statistics.mean(outcome["recall@10"]["value"] for outcome in outcomes)
        paper = f"{PAPER[method]}" if name == "sms_spam" and method in PAPER else "-"
        seconds = [outcome["seconds"] for outcome in outcomes if "seconds" in outcome]
        trained = "classifier" in method
        rows.append(
            [
                *(outcomes[0]["data"], method, paper, f"{mean:.2f}", interval(low, high), spread(each), f"{ten:.2f}"),
                *(seeds_text(bench.seeds) if trained else "none needed", bench.backbone.name),
                f"{statistics.mean(seconds):.1f}" if trained else "-",
            ]
        )
    epochs = ", ".join(f"{name} {_epochs(bench, name)}" for name in dict.fromkeys(name for name, _ in found))
    return Table(
        title="Who finds the document",
        columns=_COLUMNS,
        rows=rows,
        note=(
            f"95%: resampling of test queries, mean over seeds. Texts are cut at {bench.settings['max_tokens']} "
            f"tokens. The head trains {bench.settings['head_epochs']} epochs, the adapter after it: {epochs}; on at "
            f"most {bench.settings['adapter_train']:,} queries. ag_news is the reduced training set (48,325 of 120,000 "
            f"queries were to be had). Seconds are those of the head from the texts on, of the adapter with its head; "
            f"where there are more than {bench.settings['adapter_train']:,} queries, of the head without encoding."
        ),
    )


def _chart(found: Rows) -> Chart:
    names = list(dict.fromkeys(name for name, _ in found))
    series = []
    for method in _METHODS:
        values = [recall_at_1(found[name, method]) for name in names]
        series.append(recall_series(method, names, values))
    marks = [Mark(name="paper (SMS spam)", y=figure, x="sms_spam", series=method) for method, figure in PAPER.items()]
    return Chart(
        name="recall",
        title="Recall@1 by method (bars: 95% interval)",
        kind="bar",
        x_label="data set",
        y_label="recall@1, % of test queries",
        series=series,
        paper=marks if "sms_spam" in names else [],
        y_limits=(0, 105),
    )


def _notes(bench: Bench, found: Rows) -> list[str]:
    reduced = [outcomes[0]["data"] for (name, method), outcomes in found.items() if method == "adapter + classifier"]
    notes = [f"Adapters were trained on: {'; '.join(reduced)}."]
    if bench.quick:
        notes.append(
            "The quick form trains on parts of the data for fewer passes: its figures are lower than the full form's."
        )
    return notes
