"""Heterogeneity: clients that hold different queries, by Dirichlet draws and as real shops do, from round to round."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from caravan.app.charts import Chart, Series
from caravan.app.learning import Experiment
from caravan.app.reproduction.alone import local, own_places, personal
from caravan.app.reproduction.federations import difference, simulate, thinned, unpacked
from caravan.app.reproduction.findings import Findings, Table
from caravan.app.reproduction.frame import BUNDLED, Bench, counts
from caravan.app.reproduction.parts import some
from caravan.app.reproduction.trials import interval, seeds_text, spread
from caravan.data.dataset import Dataset

_COLUMNS = (
    *("method", "recall@1 %", "over seeds", "points to central", "95%", "own queries R@1 %"),
    *("MB a round, all clients", "seconds"),
)
_NOTE = (
    "Head alone. {share:.0%} of train is left out for validation: the curves are of it, and whatever is chosen is "
    "chosen there; the test split is ranked once a training. Points to central: means over seeds, minus is worse; 95%: "
    "over test queries, in pairs. local: every client trains alone, with the work that it does in the federation; its "
    "recall is the mean over clients, weighted by their queries, of at most {drawn:,} test queries drawn. personal: "
    "the shared head of fedavg moved towards each client's own queries. Own queries: those of test that a client asked "
    "itself, of clients with {own} or more in train. Bytes: up and down, in the first round."
)


@dataclass(frozen=True)
class Case:
    """One data set dealt in one way.

    Attributes:
        title: how, for people.
        dataset: catalogue, train, validation, test.
        changes: settings that deal it, and the epochs.
        column: that names a query's client, in test too; None where it is drawn.
        methods: in order; of the settings' table, or "local" and "personal".
        part: what of the data set is used.
        seeds: of the bench, as many as the settings give this case.
    """

    title: str
    dataset: Dataset
    changes: Mapping[str, Any]
    column: str | None
    methods: Sequence[str]
    part: Mapping[str, Any]
    seeds: Sequence[int]


Outcomes = dict[str, list[dict[str, Any]]]  # by method: one a seed


def run(bench: Bench) -> Findings:
    """Train by every method on every case whose data are here."""
    found: list[tuple[Case, Outcomes]] = []
    for values in bench.settings["cases"]:
        if values["data"] not in bench.present([values["data"], BUNDLED]):
            continue
        case = _case(bench, values)
        found.append((case, {method: _outcomes(bench, case, method) for method in case.methods}))
    return Findings(
        tables=[_table(*each, note=_note(bench) if each is found[0] else "") for each in found],
        charts=[
            *(_curves(number, case, outcomes) for number, (case, outcomes) in enumerate(found, start=1)),
            _losses(found),
        ],
        notes=["Seeds deal, order and draw; real shops are dealt as they are."],
    )


def _case(bench: Bench, values: Mapping[str, Any]) -> Case:
    settings = bench.settings
    part: dict[str, Any] = {name: values.get(name) for name in ("classes", "train", "test")}
    part["validation"] = settings["validation"]
    dataset = bench.dataset(values["data"], **part)
    seeds = bench.seeds[: values.get("seeds", len(bench.seeds))]
    column = values.get("column")
    if column:
        dealt = f"by {column}, {len({example.columns[column] for example in dataset.train})} clients"
        changes = {"federation.partition": "column", "federation.column": column}
    else:
        dealt = f"Dirichlet {values['alpha']:g}, {values['clients']} clients"
        changes = {
            "federation.partition": "dirichlet",
            "federation.alpha": values["alpha"],
            "federation.clients": values["clients"],
        }
    changes |= {"training.mode": "head", "training.head.epochs": values["epochs"]}
    return Case(f"{values['data']}, {dealt}", dataset, changes, column, values["methods"], part, seeds)


def _outcomes(bench: Bench, case: Case, method: str) -> list[dict[str, Any]]:
    changes = _changes(bench, case, method)
    matters = {**changes, **case.part, "own": bench.settings["own_queries"], "drawn": bench.settings["local_test"]}
    return [
        bench.measure(
            f"{case.title}/{method}/seed {seed}",
            lambda seed=seed: _measured(bench, case, method, changes, seed),
            matters=matters,
        )
        for seed in case.seeds
    ]


def _changes(bench: Bench, case: Case, method: str) -> dict[str, Any]:
    """A method's settings; central training's name no clients."""
    dealt = {key: value for key, value in case.changes.items() if method != "central" or key.startswith("training")}
    return dealt | bench.settings["methods"].get(method, {})


def _measured(bench: Bench, case: Case, method: str, changes: Mapping[str, Any], seed: int) -> dict[str, Any]:
    config, dataset = bench.config(seed, changes), case.dataset
    own = own_places(dataset, case.column, bench.settings["own_queries"])
    if method in ("local", "personal"):
        what = f"{case.title}, {method}"
        experiment = Experiment(dataset, config, backbone=bench.model, store=bench.store, report=bench.telling(what))
        if method == "local":
            drawn = some(dataset.test, bench.settings["local_test"], seed)
            return local(experiment, own, drawn)
        experiment.run()
        return personal(experiment, own)
    found = simulate(bench, dataset, config, f"{case.title}, {method}")
    head = found["head"]
    rounds = head.get("rounds", [])
    passes = config.training.head.epochs / len(found["curve"])
    hits, places = unpacked(head["hits"]), [place for each in own.values() for place in each]
    return {
        "test": head["recall@1"]["value"],
        "hits": head["hits"],
        "own": float(hits[places].mean()) if places else None,
        "curve": [[passes * number, recall] for number, recall in found["curve"]],
        "bytes": rounds[0]["bytes_up"] + rounds[0]["bytes_down"] if rounds else None,
        "seconds": head["seconds"],
    }


def _note(bench: Bench) -> str:
    settings = bench.settings
    return _NOTE.format(share=settings["validation"], drawn=settings["local_test"], own=settings["own_queries"])


def _table(case: Case, outcomes: Outcomes, *, note: str) -> Table:
    central = outcomes["central"]
    rows = []
    for method, parts in outcomes.items():
        tests = [100 * part["test"] for part in parts if part.get("test") is not None]
        own = [100 * part["own"] for part in parts if part.get("own") is not None]
        paired = "hits" in parts[0] and method != "central"
        gap = difference([part["hits"] for part in parts], [part["hits"] for part in central]) if paired else None
        sent = parts[0].get("bytes")
        rows.append(
            [
                *(method, _mean(tests), spread(tests) if tests else ""),
                *((f"{gap[0]:+.2f}", interval(*gap[1:])) if gap else (_behind(tests, central), "")),
                *(_mean(own), f"{sent / 1e6:,.1f}" if sent else ""),
                f"{statistics.mean(part['seconds'] for part in parts):.1f}",
            ]
        )
    title = f"{case.title} ({counts(case.dataset)}; seeds {seeds_text(case.seeds)})"
    return Table(title=title, columns=_COLUMNS, rows=rows, note=note)


def _behind(tests: Sequence[float], central: Sequence[Mapping[str, Any]]) -> str:
    """Points to central without pairs; nothing of central itself and of what has no recall on test."""
    own = [100 * part["test"] for part in central]
    return f"{statistics.mean(tests) - statistics.mean(own):+.2f}" if tests and list(tests) != own else ""


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f}" if values else ""


def _curves(number: int, case: Case, outcomes: Outcomes) -> Chart:
    series = []
    for method, parts in outcomes.items():
        if "curve" in parts[0]:
            passes = [place for place, _ in parts[0]["curve"]]
            points = thinned(list(zip(passes, _mean_curve(parts), strict=True)))
            x, y = [place for place, _ in points], [recall for _, recall in points]
            series.append(Series(name=method, x=x, y=y, dashed=method == "central"))
    return Chart(
        name=f"curves-{number}",
        title=case.title,
        kind="line",
        x_label="passes over the queries",
        y_label="recall@1, % of validation queries",
        series=series,
    )


def _mean_curve(parts: Sequence[Mapping[str, Any]]) -> list[float]:
    """Validation recall along the passes in percent, mean over seeds."""
    curves = [[recall for _, recall in part["curve"]] for part in parts]
    return [100 * statistics.mean(values) for values in zip(*curves, strict=True)]


def _losses(found: Sequence[tuple[Case, Outcomes]]) -> Chart:
    """What each method loses to central training, case by case."""
    methods = list(dict.fromkeys(method for _, outcomes in found for method in outcomes if method != "central"))
    series = []
    for method in methods:
        places, values = [], []
        for case, outcomes in found:
            tests = [part["test"] for part in outcomes.get(method, ()) if part.get("test") is not None]
            if tests:
                central = statistics.mean(part["test"] for part in outcomes["central"])
                places.append(case.title.replace("_", " "))
                values.append(100 * (central - statistics.mean(tests)))
        if values:
            series.append(Series(name=method, x=places, y=values))
    return Chart(
        name="lost",
        title="Points of recall@1 lost to central training",
        kind="bar",
        x_label="how queries are dealt",
        y_label="points, test queries",
        series=series,
    )
