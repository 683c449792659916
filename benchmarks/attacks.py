"""What do clients that lie or break cost each strategy? banking77, head mode, ten clients dealt at random.

Usage: python benchmarks/attacks.py OUT.json [--split validation] [--only STRATEGY ...] [--set KEY=VALUE ...]

Two clients attack in every round. Each attack is run with the bounds that docs/federation.md recommends (the largest
honest shard; one and a half times the longest honest step of the same strategy's run without attackers), and those that
a bound could hide also without them. Honest training is deterministic, so a run that has come to the same tensors as an
earlier one takes that one's updates; everything behind it (Flower, checks, quorum, strategy) is done anew each time.
Results are written after every run, and what is there is not done again.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from caravan.app.comparison import rank_queries
from caravan.app.learning import Experiment
from caravan.app.options import parse_settings
from caravan.config import Config, FederationConfig, StrategyName, changed, config_from_dict
from caravan.data.dataset import Dataset
from caravan.data.records import Example
from caravan.errors import FederationError, TrainingError
from caravan.federation.flower import run_federation
from caravan.federation.local import Part, train_client, trained_names
from caravan.federation.rounds import RoundReport, Update
from caravan.federation.strategies import proximal_mu
from caravan.files import whole_file
from caravan.training.evaluation import measure

DATA = Path(os.environ.get("CARAVAN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
STRATEGIES = get_args(StrategyName)
CLIENTS = {"bulyan": 13}  # it needs 11 usable updates, also where two are refused
ATTACKERS = 2
SETTINGS: dict[str, dict[str, float]] = {
    "trimmed_mean": {"trimmed_share": 0.25}  # cuts two a side also where two of ten are refused
}
NORM_MARGIN = 1.5  # times the longest honest step

Attack = Callable[[Update, Mapping[str, Tensor]], Update]


def moved(factor: float, examples: int | None = None) -> Attack:
    """The honest step times a factor, perhaps with an invented example count."""

    def attack(update: Update, received: Mapping[str, Tensor]) -> Update:
        tensors = {name: start + factor * (update.tensors[name] - start) for name, start in received.items()}
        return Update(update.client, tensors, examples or update.examples)

    return attack


def poisoned(value: float) -> Attack:
    """One number of the honest update is another."""

    def attack(update: Update, received: Mapping[str, Tensor]) -> Update:
        del received
        update.tensors["head.bias"][3] = value
        return update

    return attack


def _cut(update: Update, received: Mapping[str, Tensor]) -> Update:
    return replace(update, tensors={**update.tensors, "head.bias": received["head.bias"][1:]})


def _as_trained(update: Update, received: Mapping[str, Tensor]) -> Update:
    del received
    return update


ATTACKS: dict[str, Attack] = {
    "flipped step": moved(-1),
    "flipped labels": _as_trained,  # the lie is in what it trained on
    "step x 1e6": moved(1e6),
    "NaN": poisoned(float("nan")),
    "inf": poisoned(float("inf")),
    "wrong shape": _cut,
    "count 1e9": moved(-1, examples=10**9),
}
REFUSED = ("step x 1e6", "NaN", "inf", "wrong shape", "count 1e9")  # with bounds, whatever the strategy
WITHOUT_BOUNDS = ("flipped step", "flipped labels", "step x 1e6", "count 1e9")


class Clients:
    """The clients of one number, and how they train."""

    def __init__(self, dataset: Dataset, config: Config) -> None:
        self.config = config
        self.experiment = Experiment(dataset, config)
        self.names = [shard.name for shard in self.experiment.shards]
        self.shards = [shard.examples for shard in self.experiment.shards]
        self.attackers = self.names[1::5][:ATTACKERS]
        state = self.experiment.retriever.trainable_state()
        self.start = {name: state[name] for name in trained_names(self.experiment.retriever, "head")}
        self.updates: dict[tuple[str, int, float, bool, bytes], Update] = {}

    def forget(self) -> None:
        """Drop updates that runs of another strategy cannot come to again: those after the first round."""
        self.updates = {key: update for key, update in self.updates.items() if key[1] == 1}

    def train(self, client: str, received: dict[str, Tensor], number: int, mu: float, *, flipped: bool) -> Update:
        """One client's honest work of one round, or that of a client whose labels are wrong."""
        digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in received.values())).digest()
        key = (client, number, mu, flipped, digest)
        if key not in self.updates:
            place = self.names.index(client)
            examples = [self._flip(example) for example in self.shards[place]] if flipped else self.shards[place]
            self.updates[key] = train_client(
                self.experiment.retriever,
                client,
                examples,
                self.config,
                received,
                part=Part("head", number, self.config.federation.rounds, place, len(self.names)),
                passages=self.experiment.passages,
                proximal_mu=mu,
                store=self.experiment.store,
            )
        update = self.updates[key]
        return replace(update, tensors={name: tensor.clone() for name, tensor in update.tensors.items()})

    def _flip(self, example: Example) -> Example:
        ids = self.experiment.dataset.catalogue.ids
        row = self.experiment.dataset.catalogue.gold_rows(example)[0]
        return replace(example, doc_ids=(ids[(row + len(ids) // 2) % len(ids)],))


def run(clients: Clients, settings: FederationConfig, attack: str | None, names: list[str]) -> dict[str, Any]:
    """Train five rounds on the clients of these names and measure; a run that ends early says why."""
    longest = 0.0
    reports: list[RoundReport] = []

    def local_train(client: str, received: dict[str, Tensor], number: int) -> Update:
        nonlocal longest
        lies = attack is not None and client in clients.attackers
        flipped = lies and attack == "flipped labels"
        update = clients.train(client, received, number, proximal_mu(settings), flipped=flipped)
        if lies and attack is not None:
            return ATTACKS[attack](update, received)
        steps = (float(torch.linalg.vector_norm(update.tensors[name] - start)) for name, start in received.items())
        longest = max(longest, math.hypot(*steps))
        return update

    started = time.perf_counter()
    result: dict[str, Any] = {"clients": len(names), "settings": SETTINGS.get(settings.strategy, {})}
    try:
        tensors = run_federation(
            clients.start,
            names,
            local_train,
            rounds=settings.rounds,
            settings=settings,
            seed=clients.config.seed,
            on_round=lambda report, _: reports.append(report),
        )
        recall = _recall(clients.experiment, tensors)
    except (FederationError, TrainingError) as error:
        return {**result, "ended": str(error)}
    return {
        **result,
        "recall": recall,
        "refused": [len(report.failures) for report in reports],
        "longest honest step": longest,
        "tensors": hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors.values())).hexdigest(),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _recall(experiment: Experiment, tensors: Mapping[str, Tensor]) -> float:
    dataset = experiment.dataset
    experiment.retriever.load_trainable_state(tensors, partial=True)
    asked = dataset.test or dataset.validation
    ranking = rank_queries(experiment.retriever, [example.text for example in asked], experiment.store)
    gold = [dataset.catalogue.gold_rows(example) for example in asked]
    return measure(ranking, gold, bootstrap=0)["recall@1"].value


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", choices=["test", "validation"], default="test", help="validation: a fifth of train")
    parser.add_argument("--only", nargs="*", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, for all runs")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if not (DATA / "banking77").is_dir():
        sys.exit(f"{DATA / 'banking77'} is not there; set CARAVAN_DATA to the folder that holds banking77")
    changes = parse_settings(arguments.set)
    results = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {"runs": {}}
    results |= {"split": arguments.split, "seed": arguments.seed, "set": changes}
    results["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("caravan", "torch", "transformers", "flwr")},
    }
    groups: dict[int, Clients] = {}
    for strategy in arguments.only:
        count = CLIENTS.get(strategy, 10)
        if count not in groups:
            groups[count] = _clients(count, arguments.seed, arguments.split, changes)
        _run_strategy(results, arguments.out, strategy, groups[count])
    print(tables(results["runs"]))


def _clients(count: int, seed: int, split: str, changes: Mapping[str, Any]) -> Clients:
    settings = {
        "seed": seed,
        "data.path": str(DATA / "banking77"),
        "data.validation_fraction": 0.0 if split == "test" else 0.2,
        "training.mode": "head",
        "federation.clients": count,
    }
    config = config_from_dict(changed({}, {**settings, **changes}))
    dataset = Dataset.from_config(config.data, seed=seed)
    # What is not measured on is not there: neither to look at by mistake.
    return Clients(replace(dataset, validation=()) if split == "test" else replace(dataset, test=()), config)


def _run_strategy(results: dict, out: Path, strategy: str, clients: Clients) -> None:
    clients.forget()
    values = {"strategy": strategy, "byzantine_clients": ATTACKERS, **SETTINGS.get(strategy, {})}
    sections = {f"federation.{name}": value for name, value in values.items()}
    free = config_from_dict(changed(clients.config.to_dict(), sections)).federation

    def once(name: str, settings: FederationConfig, attack: str | None, names: list[str]) -> dict[str, Any]:
        key = f"{strategy}/{name}"
        if key not in results["runs"]:
            results["runs"][key] = run(clients, settings, attack, names)
            with whole_file(out) as temporary:
                temporary.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{key}: {results['runs'][key].get('recall', 'ended')}", file=sys.stderr, flush=True)
        return results["runs"][key]

    clean = once("none", free, None, clients.names)
    once("without the attackers", free, None, [name for name in clients.names if name not in clients.attackers])
    for attack in WITHOUT_BOUNDS:
        once(f"{attack}, no bounds", free, attack, clients.names)
    bounded = replace(
        free,
        max_examples=max(len(examples) for examples in clients.shards),
        max_update_norm=NORM_MARGIN * clean["longest honest step"],
    )
    for attack in ATTACKS:
        once(f"{attack}, bounds", bounded, attack, clients.names)


def tables(runs: dict) -> str:
    """Recall without attackers and what each attack takes of it, in points, as Markdown."""
    last = list(ATTACKS)[-1]  # a strategy whose runs were cut short has no row
    done = [strategy for strategy in STRATEGIES if f"{strategy}/{last}, bounds" in runs]
    open_columns = [f"{attack}, no bounds" for attack in WITHOUT_BOUNDS]
    bound_columns = [f"{attack}, bounds" for attack in ATTACKS if attack not in REFUSED]
    headings = [
        "strategy",
        "R@1, no attack",
        *open_columns,
        *bound_columns,
        "refused clients left out",
        f"{', '.join(REFUSED)}, bounds",
    ]
    lines = [f"| {' | '.join(headings)} |", f"|---|{'---:|' * (len(headings) - 1)}"]
    for strategy in done:
        clean = runs[f"{strategy}/none"]["recall"]
        without = runs[f"{strategy}/without the attackers"]
        same = [runs[f"{strategy}/{attack}, bounds"].get("tensors") == without["tensors"] for attack in REFUSED]
        verdict = "same tensors" if all(same) else f"same tensors in {sum(same)} of {len(same)}"
        cells = [_cost(runs[f"{strategy}/{column}"], clean) for column in (*open_columns, *bound_columns)]
        cells = [strategy, f"{100 * clean:.2f}", *cells, _cost(without, clean), verdict]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cost(result: dict, clean: float) -> str:
    return f"{100 * (result['recall'] - clean):+.2f}" if "recall" in result else "run ended"


if __name__ == "__main__":
    main()
