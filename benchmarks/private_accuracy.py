"""What does differential privacy cost in recall, by epsilon, beside no privacy and beside Opacus on a linear head?

Usage: python benchmarks/private_accuracy.py OUT.json [--only DATA ...] [--modes MODE ...] [--epsilons E ...]
           [--seeds S ...] [--most N] [--device DEVICE]

Default settings, all of train (no validation cut), so they can only have been chosen on other splits; each test split
is ranked once a training. With --most a training set is cut to N queries, drawn once, and its rows say so: AG News'
adapter takes hours on all of them. delta = n^-1.1. "opacus" is a linear layer on the same frozen vectors, trained by
Opacus' PrivacyEngine with the batch, epochs, clip and rate of our private head. Noise comes from the operating system,
so a repeat gives other figures; a seed decides the rest. On a GPU private steps are computed in larger physical
batches, which changes nothing but the time. The ledger is one of the benchmark's own: the data are public.
Results are written after every training, and what is there is not done again.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from caravan.app.comparison import rank_queries
from caravan.app.display import Bars
from caravan.app.learning import Experiment
from caravan.config import config_from_dict
from caravan.data.dataset import Dataset
from caravan.files import whole_file
from caravan.model.adapter import IdentityAdapter
from caravan.model.backbone import Backbone, load_backbone
from caravan.model.encoder import Encoder
from caravan.training.evaluation import measure
from caravan.training.features import FeatureStore, default_cache

DATA = Path(os.environ.get("CARAVAN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SETS = ("sms_spam", "banking77", "ag_news")
MODES = ("head", "opacus", "federated head", "paper head", "adapter")
FREE = ("federated head", "opacus")  # not measured without privacy here
CLIENTS = 3


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", choices=SETS, default=SETS)
    parser.add_argument("--modes", nargs="*", choices=MODES, default=MODES)
    parser.add_argument("--epsilons", nargs="*", type=float, default=[1.0, 3.0, 8.0])
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--most", type=int, help="queries to train on; all if left out")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {"runs": {}}
    results["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("caravan", "torch", "transformers", "opacus", "dp-accounting")},
    }
    with tempfile.TemporaryDirectory() as ledgers, Bars(quiet=not sys.stderr.isatty()) as bars:
        for name in arguments.only:
            if not (DATA / name).is_dir():
                print(f"{name}: skipped, {DATA / name} is not there; set CARAVAN_DATA", file=sys.stderr)
                continue
            label = name if arguments.most is None else f"{name} ({arguments.most:,} queries)"
            for mode in arguments.modes:
                epsilons = [None] if mode == "paper head" else arguments.epsilons
                for epsilon in [*([] if mode in (*FREE, "paper head") else [None]), *epsilons]:
                    for seed in arguments.seeds:
                        key = f"{label}/{mode}/{'none' if epsilon is None else f'{epsilon:g}'}/{seed}"
                        if key in results["runs"]:
                            continue
                        os.environ["CARAVAN_LEDGER"] = str(Path(ledgers) / key.replace("/", "-"))
                        run = opacus_head if mode == "opacus" else ours
                        dataset = training_set(name, arguments.most)
                        found = run(dataset, mode, epsilon, seed, arguments.device, bars)
                        results["runs"][key] = {**found, "device": arguments.device}
                        with whole_file(arguments.out) as temporary:
                            temporary.write_text(json.dumps(results, indent=1) + "\n")
                        print(f"{key}: {results['runs'][key]}", file=sys.stderr, flush=True)
    print(table(results["runs"]))


@cache
def training_set(name: str, most: int | None) -> Dataset:
    """The data set with no validation cut, its training queries cut to `most` of them, the same for every training."""
    settings = {"data": {"path": str(DATA / name), "validation_fraction": 0.0}}
    dataset = replace(Dataset.from_config(config_from_dict(settings).data, seed=0), validation=())
    if most is None or most >= len(dataset.train):
        return dataset
    return replace(dataset, train=tuple(random.Random(0).sample(dataset.train, most)))


def ours(dataset: Dataset, mode: str, epsilon: float | None, seed: int, device: str, report: Any) -> dict[str, Any]:
    """Train with the default settings; recall@1 on the test split, seconds, sigma."""
    settings: dict[str, Any] = {
        "seed": seed,
        "backbone": {"device": device},
        "training": {"mode": mode.split()[-1]},
    }
    if mode == "paper head":
        settings["privacy"] = {"mode": "paper"}
    elif epsilon is not None:
        settings["privacy"] = {"mode": "dp-sgd", "epsilon": epsilon}
    if device != "cpu" and "privacy" in settings:
        settings["training"]["adapter"] = {"batch_size": 256}
    if mode == "federated head":
        settings["federation"] = {"clients": CLIENTS}
    config = config_from_dict(settings)
    started = time.perf_counter()
    experiment = Experiment(dataset, config, store=FeatureStore(default_cache()), report=report)
    retriever = experiment.run()
    seconds = time.perf_counter() - started
    ranking = rank_queries(retriever, [example.text for example in dataset.test], experiment.store)
    gold = [dataset.catalogue.gold_rows(example) for example in dataset.test]
    recall = measure(ranking, gold, bootstrap=0)["recall@1"].value
    return {"recall": recall, "seconds": round(seconds, 1), "guarantees": retriever.record.get("guarantees")}


_backbones: dict[str, Backbone] = {}


def opacus_head(dataset: Dataset, mode: str, epsilon: float, seed: int, device: str, report: Any) -> dict[str, Any]:
    """A linear layer on the frozen vectors, trained by Opacus; recall@1 on the test split, seconds, sigma."""
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    del mode, report
    config = config_from_dict(
        {
            "backbone": {"device": device},
            "privacy": {"mode": "dp-sgd", "epsilon": epsilon},
        }
    )
    backbone = _backbones.setdefault("minilm", load_backbone(config.backbone))
    encoder, store = Encoder(backbone, IdentityAdapter(backbone.embedding_width)), FeatureStore(default_cache())
    train = store.encode(encoder, [example.text for example in dataset.train])
    test = store.encode(encoder, [example.text for example in dataset.test])
    labels = torch.tensor([dataset.catalogue.gold_rows(example)[0] for example in dataset.train], device=device)
    stage, privacy = config.training.head, config.privacy
    torch.manual_seed(seed)
    started = time.perf_counter()
    layer = torch.nn.Linear(train.shape[1], len(dataset.catalogue), device=device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=stage.learning_rate, weight_decay=stage.weight_decay)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = PrivacyEngine(accountant="prv", secure_mode=False)
        layer, optimizer, loader = engine.make_private_with_epsilon(
            module=layer,
            optimizer=optimizer,
            data_loader=DataLoader(TensorDataset(train, labels), batch_size=privacy.batch),
            epochs=stage.epochs,
            target_epsilon=epsilon,
            target_delta=len(train) ** -1.1,
            max_grad_norm=privacy.clip,
        )
        for _ in range(stage.epochs):
            for vectors, gold in loader:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(layer(vectors), gold).backward()
                optimizer.step()
    seconds = time.perf_counter() - started
    with torch.no_grad():
        first = layer(test).argmax(dim=1).tolist()
    hits = [row in dataset.catalogue.gold_rows(example) for row, example in zip(first, dataset.test, strict=True)]
    return {"recall": sum(hits) / len(hits), "seconds": round(seconds, 1), "sigma": optimizer.noise_multiplier}


def table(runs: dict[str, Any]) -> str:
    """Mean recall@1 over seeds by data set, mode and epsilon, as Markdown."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for key, run in runs.items():
        name, mode, epsilon, _ = key.split("/")
        groups.setdefault((name, mode, epsilon), []).append(100 * run["recall"])
    columns = list(dict.fromkeys(epsilon for _, _, epsilon in groups))
    lines = [
        f"| recall@1 | trained | {' | '.join('no privacy' if c == 'none' else f'epsilon {c}' for c in columns)} |",
        f"|---|---|{'---:|' * len(columns)}",
    ]
    for name, mode in dict.fromkeys((name, mode) for name, mode, _ in groups):
        cells = [_cell(groups.get((name, mode, column))) for column in columns]
        lines.append(f"| {name} | {mode} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float] | None) -> str:
    if not values:
        return ""
    spread = f" ({min(values):.2f}-{max(values):.2f}, {len(values)})" if len(values) > 1 else " (1)"
    return f"{statistics.mean(values):.2f}{spread}"


if __name__ == "__main__":
    main()
