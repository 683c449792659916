"""Central against federated training: recall after the same passes over the same queries, and the critical path."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from caravan.app.charts import Chart, Mark, Series
from caravan.app.reproduction.federations import difference, settled, simulate
from caravan.app.reproduction.findings import Claim, Findings, Table, verdict
from caravan.app.reproduction.frame import Bench, counts
from caravan.app.reproduction.trials import interval, seeds_text, spread
from caravan.data.dataset import Dataset

PAPER_GAP = 0.5  # points; arXiv:2509.16508
PAPER_SPEED = {2: 1.75, 3: 2.62}  # by clients; the same

_COLUMNS = (
    *("data", "trained", "clients", "paper: points lost", "points lost", "95%", "recall@1 %", "over seeds"),
    *("central, s", "critical path, s", "of it server and wire, s", "paper: times as fast", "times as fast", "seeds"),
)
_NOTE = (
    "{epochs} epochs centrally against {rounds} rounds of {each}. Points lost: central less federated, means over "
    "seeds; 95%: over test queries, in pairs. Clients run one after another in one process here, so what is compared "
    "with central training is the critical path as measured: each round's slowest client, and all that server and wire "
    "take for all clients. Times are medians over seeds; no vector is known beforehand. "
    "Real processes on cores of their own: benchmarks/speedup.py."
)


@dataclass(frozen=True)
class Cell:
    """One stage of one number of clients on one data set, over seeds.

    Attributes:
        data: the data set with its counts.
        stage: "head" or "adapter".
        clients: K.
        lost: points of recall@1 that central training is ahead, and the bounds of their 95% interval.
        recalls: percent, one a seed.
        central: seconds, median.
        path: seconds of the critical path, median.
        server: seconds of it beside the clients' work, median.
        faster: central by critical path, median over seeds.
        seeds: with which it was trained.
    """

    data: str
    stage: str
    clients: int
    lost: tuple[float, float, float]
    recalls: tuple[float, ...]
    central: float
    path: float
    server: float
    faster: float
    seeds: tuple[int, ...]


def run(bench: Bench) -> Findings:
    """Train centrally and on every number of clients, on every data set, for every seed; the adapter on fewer."""
    settings = bench.settings
    cells: list[Cell] = []
    warm = _Warm(bench)
    for data in bench.present(settings["datasets"]):
        dataset = bench.dataset(data, **_part(bench))
        # Each mode has a central training of its own, so that what is divided by it is of one machine.
        for mode, numbers, seeds in (
            ("head", settings["clients"], bench.seeds),
            ("adapter", settings["adapter_clients"], _adapter_seeds(bench)),
        ):
            central = [_measured(bench, warm, dataset, mode, 0, seed) for seed in seeds] if numbers else []
            for clients in numbers:
                parts = [_measured(bench, warm, dataset, mode, clients, seed) for seed in seeds]
                cells.append(_cell(counts(dataset), mode, clients, central, parts, seeds))
    return Findings(
        claims=[_gap_claim(cells), *(_speed_claim(cells, clients) for clients in PAPER_SPEED)],
        tables=[_table(bench, cells)],
        charts=[_speed_chart(cells), _gap_chart(cells)],
        notes=_notes(cells),
    )


def _adapter_seeds(bench: Bench) -> Sequence[int]:
    return bench.seeds[: bench.settings["adapter_seeds"]]


def serial_share(speeds: Sequence[tuple[int, float]]) -> float | None:
    r"""Fit Amdahl's law to (clients K, speed-up S) pairs, of which one or more have K > 1; else None.

    $$ \frac{1}{S(K)} = s + \frac{1 - s}{K} $$

    (Amdahl, Validity of the single processor approach, AFIPS 1967.) Least squares on 1/S, which is linear in the share
    s that stays serial. A fit below 0 means more than K times as fast with K clients: the noise of a machine.
    """
    known = [(1 - 1 / clients, 1 / speed - 1 / clients) for clients, speed in speeds if clients > 1]
    if not known:
        return None
    rest, excess = np.array(known).T
    return float(np.linalg.lstsq(rest[:, None], excess, rcond=None)[0][0])


def _share(cells: Sequence[Cell]) -> float | None:
    return serial_share([(cell.clients, cell.faster) for cell in cells])


def amdahl(share: float, clients: int) -> float:
    """How many times as fast K clients are where this share stays serial."""
    return 1 / (share + (1 - share) / clients)


def critical_path(rounds: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Seconds that a stage's rounds take where clients work at the same time, and how many of them no client works."""
    server = sum(each["server"] for each in rounds)
    return server + sum(max(each["local"], default=0.0) for each in rounds), server


class _Warm:
    """A first training whose time does not count: what a process loads and compiles once."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.cold = bench, True

    def up(self, dataset: Dataset) -> None:
        if self.cold:
            self.cold = False
            few = replace(dataset, train=dataset.train[:64], test=dataset.test[:1])
            mode = "adapter" if self.bench.settings["adapter_clients"] else "head"
            changes = {"federation.clients": 1, "training.passages": 0, **_epochs(1, 1, mode)}
            simulate(self.bench, few, self.bench.config(0, changes), "warming up", cold=True)


def _measured(bench: Bench, warm: _Warm, dataset: Dataset, mode: str, clients: int, seed: int) -> dict[str, Any]:
    """Train with K clients, or centrally for 0."""
    settings = bench.settings
    changes = {"federation.clients": clients, **_epochs(settings["epochs"], settings["rounds"], mode)}
    who = f"{clients} clients" if clients else "central"

    def work() -> dict[str, Any]:
        warm.up(dataset)
        return simulate(bench, dataset, bench.config(seed, changes), f"{dataset.name}, {who}", cold=True)

    matters = {**changes, **_part(bench)}
    return bench.measure(f"{dataset.name}/{who}/seed {seed}", work, matters=matters)


def _part(bench: Bench) -> dict[str, Any]:
    """Which part of a data set is used."""
    return {name: bench.settings.get(name) for name in ("classes", "train", "test")}


def _epochs(epochs: int, rounds: int, mode: str) -> dict[str, Any]:
    """The same number of passes in both stages."""
    return {
        "training.mode": mode,
        "training.head.epochs": epochs,
        "training.adapter.epochs": epochs,
        "federation.rounds": rounds,
    }


def _cell(
    data: str,
    stage: str,
    clients: int,
    central: Sequence[Mapping[str, Any]],
    parts: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
) -> Cell:
    paths, servers = zip(*(critical_path(part[stage]["rounds"]) for part in parts), strict=True)
    seconds = [each[stage]["seconds"] for each in central]
    ratios = [own / path for own, path in zip(seconds, paths, strict=True)]
    return Cell(
        data=data,
        stage=stage,
        clients=clients,
        lost=difference([each[stage]["hits"] for each in central], [part[stage]["hits"] for part in parts]),
        recalls=tuple(100 * part[stage]["recall@1"]["value"] for part in parts),
        central=statistics.median(seconds),
        path=statistics.median(paths),
        server=statistics.median(servers),
        faster=statistics.median(ratios),
        seeds=tuple(seeds),
    )


def _as_in_the_paper(cells: Sequence[Cell]) -> list[Cell]:
    """The adapter's, as the paper trains adapter and head; the head's where no adapter was trained."""
    return [cell for cell in cells if cell.stage == "adapter"] or list(cells)


def _table(bench: Bench, cells: Sequence[Cell]) -> Table:
    rows = [
        (
            *(cell.data, cell.stage, str(cell.clients), f"< {PAPER_GAP}", f"{cell.lost[0]:+.2f}"),
            *(interval(*cell.lost[1:]), f"{statistics.mean(cell.recalls):.2f}", spread(cell.recalls)),
            *(f"{cell.central:.2f}", f"{cell.path:.2f}", f"{cell.server:.2f}"),
            *(str(PAPER_SPEED.get(cell.clients, "-")), f"{cell.faster:.2f}", seeds_text(cell.seeds)),
        )
        for cell in cells
    ]
    epochs, rounds = bench.settings["epochs"], bench.settings["rounds"]
    note = _NOTE.format(epochs=epochs, rounds=rounds, each=f"{epochs / rounds:g}")
    return Table(title="Central against federated training", columns=_COLUMNS, rows=rows, note=note)


def _gap_claim(cells: Sequence[Cell]) -> Claim:
    named = [cell for cell in cells if cell.clients in PAPER_SPEED] or list(cells)
    worst = max(_as_in_the_paper(named), key=lambda cell: cell.lost[0])
    heads = max((cell for cell in named if cell.stage == "head"), key=lambda cell: cell.lost[0], default=worst)
    worst_of_all = max(cells, key=lambda cell: cell.lost[0])
    lost, low, high = worst.lost
    alone = "" if heads is worst else f" The head alone loses {heads.lost[0]:+.2f} {interval(*heads.lost[1:])}."
    return Claim(
        says="5 federated rounds of 2 epochs rank as well as 10 central epochs, within 0.5 points",
        paper=f"< {PAPER_GAP} points",
        ours=f"{worst.stage}, at worst {lost:+.2f} points",
        interval=interval(low, high),
        verdict=verdict(lost < PAPER_GAP if worst.clients in PAPER_SPEED else None),
        reason=(
            f"The worst of all data sets with 2 and 3 clients, which the paper names: {worst.stage}, {worst.clients} "
            f"clients. {settled(low, high, PAPER_GAP)}{alone} Of all rows, whatever is trained: "
            f"{worst_of_all.lost[0]:+.2f}, {_name(worst_of_all)}, {worst_of_all.clients} clients."
        ),
        data=worst.data,
        seeds=seeds_text(worst.seeds),
    )


def _speed_claim(cells: Sequence[Cell], clients: int) -> Claim:
    papers = _as_in_the_paper(cells)
    found, share = [cell for cell in papers if cell.clients == clients], _share(papers)
    fit = "" if share is None else f" Amdahl's law fitted to such rows leaves {share:.1%} serial."
    return Claim(
        says=f"{clients} clients are done {PAPER_SPEED[clients]} times as fast as central training",
        paper=f"{PAPER_SPEED[clients]}x",
        ours="; ".join(f"{_name(cell)} {cell.faster:.2f}x" for cell in found) or "-",
        verdict=verdict(all(cell.faster >= PAPER_SPEED[clients] for cell in found) if found else None),
        reason=(
            "Held where the critical path is at least as many times as fast on every data set; clients ran in turn, so "
            f"it is no clock over real machines.{fit}"
        ),
        data="; ".join(cell.data for cell in found),
        seeds=seeds_text(found[0].seeds) if found else "-",
    )


def _notes(cells: Sequence[Cell]) -> list[str]:
    paper = serial_share(list(PAPER_SPEED.items()))
    shares = {stage: _share([cell for cell in cells if cell.stage == stage]) for stage in ("head", "adapter")}
    ours = ", ".join(f"{share:.1%} ({stage})" for stage, share in shares.items() if share is not None)
    here = f"; here it is {ours}" if ours else ""
    return [
        f"The paper's own two speed-ups leave {paper:.1%} of the work serial by Amdahl's law{here}.",
        "Head and adapter may have run on different machines; each is divided by central training on its own.",
        "Server and wire are those of one process, which packs and reads every message as Flower does but sends none.",
    ]


def _speed_chart(cells: Sequence[Cell]) -> Chart:
    heads = [cell for cell in cells if cell.stage == "head"]
    share = _share(heads)
    places = sorted({cell.clients for cell in cells})
    series = [
        Series(name=name, x=[cell.clients for cell in own], y=[cell.faster for cell in own])
        for name, own in _by_data(cells).items()
    ]
    if share is not None:
        fit = [amdahl(share, clients) for clients in places]
        series.append(Series(name=f"Amdahl, head, {share:.1%} serial", x=places, y=fit, dashed=True))
    series.append(Series(name="K times as fast", x=places, y=[float(place) for place in places], dashed=True))
    return Chart(
        name="speed",
        title="How much sooner: central by critical path",
        kind="line",
        x_label="clients",
        y_label="times as fast as central training",
        series=series,
        paper=[Mark(name=f"paper: {speed}x with {number}", y=speed, x=number) for number, speed in PAPER_SPEED.items()],
    )


def _gap_chart(cells: Sequence[Cell]) -> Chart:
    series = [
        Series(
            name=name,
            x=[cell.clients for cell in own],
            y=[cell.lost[0] for cell in own],
            low=[cell.lost[1] for cell in own],
            high=[cell.lost[2] for cell in own],
        )
        for name, own in _by_data(cells).items()
    ]
    return Chart(
        name="lost",
        title="What federated training loses to central training",
        kind="line",
        x_label="clients",
        y_label="recall@1 lost, points (bar: 95%)",
        series=series,
        paper=[Mark(name="paper: below 0.5", y=PAPER_GAP)],
    )


def _by_data(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(_name(cell), []).append(cell)
    return found


def _name(cell: Cell) -> str:
    return f"{cell.data.partition(':')[0]}, {cell.stage}"
