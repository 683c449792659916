"""What does it cost that clients hold different queries? Shops that sell different things, and Dirichlet draws.

Usage: python benchmarks/heterogeneity.py OUT.json [--only CASE ...] [--methods NAME ...] [--plot PNG]
           [--checkpoints DIR] [--device DEVICE]

Head mode. Every training leaves out the same tenth of train: the curves are of that validation part, and whatever is
chosen is chosen there; each result ranks the test split once. "local" trains every client alone, with the work that it
does in the federation, and weighs the clients by their number of queries; "personal" moves the head that fedavg gave
towards each client's own queries. Own queries are test queries of the same shop; there, only shops with 50 queries in
train and one in test count. Results are written after every training, and what is there is not done again.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from caravan.app.display import Bars
from caravan.app.learning import Experiment
from caravan.config import Config, HeadStageConfig, changed, config_from_dict
from caravan.data.dataset import Dataset
from caravan.data.partition import Shard
from caravan.data.records import Example
from caravan.federation.personal import personalise
from caravan.files import whole_file
from caravan.model.retriever import Retriever
from caravan.training.features import FeatureStore, default_cache
from caravan.training.progress import Report
from caravan.training.trainer import fit

DATA = Path(os.environ.get("CARAVAN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
OWN_QUERIES = 50  # in train, for a shop to be counted on its own queries
LOCAL_TEST_QUERIES = 1000  # drawn from test for "local", where every client is a model of its own
SHOPS = {"federation.partition": "column", "federation.column": "client"}


def _dirichlet(alpha: float) -> dict[str, Any]:
    return {"federation.partition": "dirichlet", "federation.alpha": alpha, "federation.clients": 10}


def _short(rounds: int) -> dict[str, Any]:
    """Many short rounds with momentum: docs/results.md tells how this was found, on validation."""
    return {
        "federation.rounds": rounds,
        "training.head.epochs": rounds,
        "training.head.learning_rate": 3e-3,
        "federation.strategy": "fedavgm",
        "federation.server_momentum": 0.7,
        "federation.rows": "trained",
        "federation.keep": "best",
    }


@dataclass(frozen=True)
class Case:
    """One data set dealt in one way.

    Attributes:
        title: for people.
        data: the data set's folder.
        clients: settings that deal it.
        others: settings of further methods, by name.
        column: of the test split, where it names a query's client.
        epochs: passes over each client's queries, and over all of them centrally.
    """

    title: str
    data: str
    clients: Mapping[str, Any]
    others: Mapping[str, Mapping[str, Any]]
    column: str | None = None
    epochs: int = HeadStageConfig().epochs


CASES = {
    "pricerunner": Case(
        "PriceRunner offers, 306 shops",
        "pricerunner_offers",
        SHOPS,
        {"31 of 306 a round": {"federation.clients_per_round": 31}, "20 short rounds": _short(20)},
        "client",
        epochs=10,  # a third of the default: a pass over 42,000 texts and 13,233 rows takes a minute on one core
    ),
    **{
        f"banking77 {alpha:g}": Case(
            f"banking77, 10 clients, Dirichlet {alpha:g}",
            "banking77",
            _dirichlet(alpha),
            {"100 short rounds": _short(100)},
        )
        for alpha in (0.1, 1.0, 10.0)
    },
}
METHODS: dict[str, dict[str, Any]] = {
    "central": {},
    "fedavg": {},
    "fedprox 0.01": {"federation.strategy": "fedprox", "federation.proximal_mu": 0.01},
    "fedprox 0.1": {"federation.strategy": "fedprox", "federation.proximal_mu": 0.1},
}
ALONE = ("local", "personal")


class Bench:
    """One case: its data, and what is measured on it."""

    def __init__(self, case: Case, seed: int, device: str, checkpoints: Path | None, report: Report) -> None:
        self.case, self.seed, self.checkpoints, self.report = case, seed, checkpoints, report
        training = {"mode": "head", "head": {"epochs": case.epochs}}
        data, backbone = {"path": str(DATA / case.data)}, {"device": device}
        self.config = config_from_dict({"seed": seed, "backbone": backbone, "data": data, "training": training})
        self.dataset = Dataset.from_config(self.config.data, seed=seed)
        self.test = _Queries(self.dataset, self.dataset.test)
        drawn = np.random.default_rng(seed).permutation(len(self.dataset.test))[:LOCAL_TEST_QUERIES].tolist()
        self.drawn = _Queries(self.dataset, [self.dataset.test[index] for index in drawn])

    def settings(self, changes: Mapping[str, Any]) -> Config:
        """The case's settings with some changed; none of them central training's."""
        return config_from_dict(changed(self.config.to_dict(), changes))

    def train(self, name: str, changes: Mapping[str, Any]) -> tuple[Experiment, dict[str, Any]]:
        """One training, central or on clients, with its curve: passes over the data, and validation recall there."""
        config = self.settings(changes)
        folder = self.checkpoints / f"{self.case.data}-{name}".replace(" ", "-") if self.checkpoints else None
        _forget_peak_memory()
        experiment = Experiment(self.dataset, config, report=self.report, checkpoint=folder, resume=folder is not None)
        experiment.run()
        record = experiment.retriever.record
        if experiment.federated:
            rounds = record["federation"]["rounds"]
            passes = config.training.head.epochs / len(rounds)
            curve = [[passes * report["round"], report["validation_recall"]] for report in rounds]
            result = {
                "seconds": sum(report["seconds"] for report in rounds),
                "mib": (rounds[0]["bytes_up"] + rounds[0]["bytes_down"]) / 2**20,
                "clients": len(experiment.shards),
                "asked": len(rounds[0]["asked"]),
            }
        else:
            curve = [[epoch["epoch"] + 1, epoch["validation_recall"]] for epoch in record["history"]]
            result = {"seconds": sum(epoch["seconds"] for epoch in record["history"])}
        result |= {"curve": curve, "peak_mib": _peak_memory_mib(), "test": self.test.recall(experiment.retriever)}
        if self.case.column:
            hits = self.test.hits(experiment.retriever)
            own = {shop: hits[places] for shop, places in self.own_places().items()}
            result["own"] = float(np.concatenate(list(own.values())).mean())
        return experiment, result

    def local(self) -> dict[str, Any]:
        """Every client alone: mean over clients on the whole test, and over their own queries on those."""
        experiment = Experiment(self.dataset, self.settings(self.case.clients), report=self.report)
        retriever, started = experiment.retriever, time.perf_counter()
        start, own = retriever.trainable_state(), self.own_places()
        weighted, hits = 0.0, []
        for place, shard in enumerate(experiment.shards):
            self._train_alone(experiment, place, shard, start)
            weighted += self.drawn.recall(retriever) * len(shard.examples)
            if shard.name in own:
                hits.append(_Queries(self.dataset, [self.dataset.test[i] for i in own[shard.name]]).hits(retriever))
        result = {"test": weighted / len(self.dataset.train), "seconds": time.perf_counter() - started}
        return result | ({"own": float(np.concatenate(hits).mean())} if hits else {})

    def _train_alone(self, experiment: Experiment, place: int, shard: Shard, start: dict[str, Tensor]) -> None:
        experiment.retriever.load_trainable_state(start)
        fit(
            experiment.retriever,
            shard.examples,
            "head",
            experiment.config.training,
            seed=self.seed + place,
            passages=experiment.passages[place :: len(experiment.shards)],
            store=experiment.store,
        )

    def personal(self, shared: Experiment) -> dict[str, Any]:
        """Every client that counts on its own queries, with a head of its own made from the shared one."""
        retriever, started = shared.retriever, time.perf_counter()
        start, own = retriever.trainable_state(), self.own_places()
        hits, shares = [], []
        for place, shard in enumerate(shared.shards):
            if shard.name in own:
                retriever.load_trainable_state(start)
                training = shared.config.training
                personal = personalise(retriever, shard.examples, training, seed=self.seed + place, store=shared.store)
                shares.append(personal.share)
                hits.append(_Queries(self.dataset, [self.dataset.test[i] for i in own[shard.name]]).hits(retriever))
        retriever.load_trainable_state(start)
        seconds = time.perf_counter() - started
        return {"own": float(np.concatenate(hits).mean()), "shares": shares, "seconds": seconds}

    def own_places(self) -> dict[str, list[int]]:
        """The places in test of the queries of every client that counts, by client."""
        column, counts, places = self.case.column, {}, {}
        if column is None:
            return {}
        for example in self.dataset.train:
            counts[example.columns[column]] = counts.get(example.columns[column], 0) + 1
        for place, example in enumerate(self.dataset.test):
            if counts.get(example.columns[column], 0) >= OWN_QUERIES:
                places.setdefault(example.columns[column], []).append(place)
        return places


class _Queries:
    """Queries whose vectors are kept here, for many heads on one encoder."""

    def __init__(self, dataset: Dataset, examples: Sequence[Example]) -> None:
        self.texts = [example.text for example in examples]
        self.gold = torch.tensor([dataset.catalogue.gold_rows(example)[0] for example in examples])
        self.vectors: Tensor | None = None

    @torch.no_grad()
    def hits(self, retriever: Retriever) -> np.ndarray:
        """Whether each query's first document is its gold one, bool (Q,)."""
        if self.vectors is None:
            self.vectors = FeatureStore(default_cache()).encode(retriever.encoder, self.texts)
        first = [retriever.head(part).argmax(dim=1).cpu() for part in self.vectors.split(512)]
        return (torch.cat(first) == self.gold).numpy()

    def recall(self, retriever: Retriever) -> float:
        return float(self.hits(retriever).mean())


def _forget_peak_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak_memory_mib() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024, 1)


def main() -> None:
    """Run what is missing, then print one table a case and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--methods", nargs="*", help="of the tables' first column; all if left out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    parser.add_argument("--checkpoints", type=Path, metavar="DIR", help="keep trainings here, to take them up again")
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {"runs": {}}
    results["seed"] = arguments.seed
    results["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "device": arguments.device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("caravan", "torch", "transformers", "flwr")},
    }
    for name in arguments.only:
        if not (DATA / CASES[name].data).is_dir():
            print(f"{name}: skipped, {DATA / CASES[name].data} is not there; set CARAVAN_DATA", file=sys.stderr)
            continue
        with Bars(quiet=not sys.stderr.isatty()) as bars:
            bench = Bench(CASES[name], arguments.seed, arguments.device, arguments.checkpoints, bars)
            for method, result in _missing(bench, name, results["runs"], arguments.methods):
                results["runs"][f"{name}/{method}"] = result
                with whole_file(arguments.out) as temporary:
                    temporary.write_text(json.dumps(results, indent=1) + "\n")
                print(f"{name}/{method}: {result}", file=sys.stderr, flush=True)
        print(table(name, results["runs"]))
    if arguments.plot:
        draw(results["runs"], arguments.plot)


def _missing(
    bench: Bench, name: str, runs: Mapping[str, Any], methods: Sequence[str] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    case = bench.case
    trained = {method: {**(case.clients if method != "central" else {}), **METHODS[method]} for method in METHODS}
    trained |= {method: {**case.clients, **changes} for method, changes in case.others.items()}
    alone = ALONE if case.column else ("local",)  # a personal head is for a client's own queries
    wanted = [
        method
        for method in (*trained, *alone)
        if f"{name}/{method}" not in runs and (methods is None or method in methods)
    ]
    shared: Experiment | None = None
    for method in wanted:
        if method == "local":
            yield method, bench.local()
        elif method == "personal":
            yield method, bench.personal(shared or bench.train("fedavg", trained["fedavg"])[0])
        else:
            experiment, result = bench.train(method, trained[method])
            shared = experiment if method == "fedavg" else shared
            yield method, result


def table(name: str, runs: Mapping[str, Any]) -> str:
    """One case's methods as Markdown."""
    case = CASES[name]
    own = f"own queries, shops with {OWN_QUERIES}" if case.column else None
    headings = [
        case.title,
        "test R@1",
        "against central",
        *([own] if own else []),
        "MiB a round",
        "peak MiB",
        "seconds",
    ]
    lines = [f"| {' | '.join(headings)} |", f"|---|{'---:|' * (len(headings) - 1)}"]
    central = runs.get(f"{name}/central", {}).get("test")
    for method in (*METHODS, *case.others, *ALONE):
        run = runs.get(f"{name}/{method}")
        if run is None:
            continue
        test = run.get("test")
        difference = "" if test is None or central is None else f"{100 * (test - central):+.2f}"
        cells = [method, _percent(test), difference, *([_percent(run.get("own"))] if own else [])]
        cells += [f"{run[key]:,.0f}" if key in run else "" for key in ("mib", "peak_mib", "seconds")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def draw(runs: Mapping[str, Any], path: Path) -> None:
    """Validation recall over passes, one panel a case that has been run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = [name for name in CASES if any(key.startswith(f"{name}/") for key in runs)]
    figure = Figure(figsize=(4.6 * len(cases), 3.6), layout="constrained", facecolor="#ffffff")
    FigureCanvasAgg(figure)
    colours = dict(zip(METHODS, ("#1f2933", "#0b7285", "#e8590c", "#9c36b5"), strict=True))
    for place, name in enumerate(cases, start=1):
        axes = figure.add_subplot(1, len(cases), place)
        for method in (*METHODS, *CASES[name].others):
            if f"{name}/{method}" in runs:
                passes, recalls = zip(*runs[f"{name}/{method}"]["curve"], strict=True)
                line = "--" if method == "central" else "-"
                marker = None if method == "central" else "o"
                colour = colours.get(method, "#2b8a3e")
                axes.plot(
                    passes, [100 * recall for recall in recalls], line, c=colour, marker=marker, ms=3, label=method
                )
        axes.set_title(CASES[name].title, loc="left", fontsize=10)
        axes.set_xlabel("passes of a client that is asked in every round")
        axes.set_ylabel("validation recall@1, %")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


if __name__ == "__main__":
    main()
