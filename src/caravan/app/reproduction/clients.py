"""Clients that come and go: drop-out, late ones and leaving ones over long runs, under several server strategies."""

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from caravan.app.charts import Chart, Series
from caravan.app.reproduction.federations import Away, difference, simulate, thinned
from caravan.app.reproduction.findings import Findings, Table
from caravan.app.reproduction.frame import Bench, counts
from caravan.app.reproduction.trials import interval, seeds_text, spread
from caravan.data.dataset import Dataset

_COLUMNS = (
    *("who is there", "server", "missed, client rounds", "recall@1 %", "over seeds", "points to all, fedavg", "95%"),
    *("validation: half time", "last round", "its worst fall %"),
)
_NOTE = (
    "Head alone, {clients} clients, Dirichlet {alpha:g}, {rounds} rounds of one pass, so the learning rate falls to 0 "
    "by the last: who comes late learns at small steps. The test split is ranked once a training, after the last "
    "round. Points to all: to fedavg with every client in every round, means over seeds; 95%: over test queries, in "
    "pairs. Worst fall: the most that validation recall lost from one round to the next. Who is away is drawn from the "
    "seed, the same for every strategy; a round always has one client or more."
)


@dataclass(frozen=True)
class Presence:
    """Which clients are there when.

    Attributes:
        clients: K.
        rounds: R.
        chance: of a client to miss a round.
        late: so many clients come at half time: the last ones.
        leaving: so many go at half time: the first ones.
        seed: of the draw.
    """

    clients: int
    rounds: int
    chance: float = 0.0
    late: int = 0
    leaving: int = 0
    seed: int = 0

    def away(self, place: int, number: int) -> bool:
        """Whether the client in this place, from 0, misses round `number`, from 1."""
        return place not in self._there(number)

    def _there(self, number: int) -> set[int]:
        second = number > self.rounds // 2
        known = range(self.leaving if second else 0, self.clients if second else self.clients - self.late)
        draw = random.Random(f"{self.seed} {number}")
        drawn = {place: draw.random() for place in range(self.clients)}
        there = {place for place in known if drawn[place] >= self.chance}
        return there or {max(known, key=lambda place: drawn[place])}


def run(bench: Bench) -> Findings:
    """Train every presence under fedavg, and some under the other strategies."""
    settings = bench.settings
    data = bench.present(settings["datasets"])[0]
    dataset = bench.dataset(data, **_part(bench))
    wanted = [(name, "fedavg") for name in settings["presences"]]
    wanted += [(name, server) for server in settings["servers"] for name in settings["presences_by_server"]]
    found = {
        (name, server): [_measured(bench, dataset, name, server, seed) for seed in bench.seeds]
        for name, server in wanted
    }
    averaged = {name: found[name, "fedavg"] for name in settings["presences"]}
    charts = [_curves("presence", "Who is there: fedavg", averaged)]
    for number, name in enumerate(settings["presences_by_server"], start=1):
        servers = {server: found[name, server] for server in ("fedavg", *settings["servers"])}
        charts.append(_curves(f"servers-{number}", f"Server strategies: {name}", servers))
    return Findings(
        tables=[_table(bench, dataset, found)],
        charts=charts,
        notes=[
            f"Seeds {seeds_text(bench.seeds)}: they deal, order and decide who is away.",
            "A client that is away counts as one that failed, and the round goes on without it (min_clients = 1).",
        ],
    )


def _part(bench: Bench) -> dict[str, Any]:
    """Which part of the data set is used."""
    return {name: bench.settings.get(name) for name in ("classes", "train", "test", "validation")}


def _measured(bench: Bench, dataset: Dataset, name: str, server: str, seed: int) -> dict[str, Any]:
    settings = bench.settings
    clients, rounds = settings["clients"], settings["rounds"]
    presence = Presence(clients, rounds, seed=seed, **settings["presences"][name])
    changes = {
        "training.mode": "head",
        "training.head.epochs": rounds,
        "federation.partition": "dirichlet",
        "federation.alpha": settings["alpha"],
        "federation.clients": clients,
        "federation.rounds": rounds,
        "federation.strategy": server,
        **settings["servers"].get(server, {}),
    }
    away: Away | None = presence.away if settings["presences"][name] else None

    def work() -> dict[str, Any]:
        found = simulate(bench, dataset, bench.config(seed, changes), f"{name}, {server}", away=away)
        head = found["head"]
        missed = sum(each["missing"] for each in head["rounds"])
        curve = [recall for _, recall in found["curve"]]
        return {"test": head["recall@1"]["value"], "hits": head["hits"], "missed": missed, "curve": curve}

    matters = {**changes, **_part(bench), "presence": settings["presences"][name]}
    return bench.measure(f"{dataset.name}/{name}/{server}/seed {seed}", work, matters=matters)


def _table(bench: Bench, dataset: Dataset, found: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]) -> Table:
    settings = bench.settings
    first = next(iter(found))
    rows = []
    for (name, server), parts in found.items():
        tests = [100 * part["test"] for part in parts]
        curve = _mean_curve(parts)
        gap = difference([part["hits"] for part in parts], [part["hits"] for part in found[first]])
        compared = (name, server) != first
        rows.append(
            [
                *(name, server, f"{statistics.mean(part['missed'] for part in parts):.0f}"),
                *(f"{statistics.mean(tests):.2f}", spread(tests)),
                *((f"{gap[0]:+.2f}", interval(*gap[1:])) if compared else ("", "")),
                *(f"{curve[len(curve) // 2 - 1]:.2f}", f"{curve[-1]:.2f}", f"{worst_fall(curve):.2f}"),
            ]
        )
    note = _NOTE.format(clients=settings["clients"], alpha=settings["alpha"], rounds=settings["rounds"])
    return Table(title=f"Clients that come and go: {counts(dataset)}", columns=_COLUMNS, rows=rows, note=note)


def worst_fall(curve: Sequence[float]) -> float:
    """The most that a curve falls from one place to the next, 0 where it never does."""
    return max([0.0, *(before - after for before, after in pairwise(curve))])


def _mean_curve(parts: Sequence[Mapping[str, Any]]) -> list[float]:
    """Validation recall after each round in percent, mean over seeds."""
    return [100 * statistics.mean(values) for values in zip(*(part["curve"] for part in parts), strict=True)]


def _curves(name: str, title: str, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Chart:
    series = []
    for each, parts in found.items():
        points = thinned(list(enumerate(_mean_curve(parts), start=1)))
        series.append(Series(name=each, x=[number for number, _ in points], y=[recall for _, recall in points]))
    return Chart(
        name=name,
        title=title,
        kind="line",
        x_label="round",
        y_label="recall@1, % of validation queries",
        series=series,
    )
