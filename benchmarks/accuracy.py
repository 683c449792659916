"""How good are head, adapter and federated adapter beside their rivals on real data, with the default settings?

Usage: python benchmarks/accuracy.py OUT.json [--only NAME ...]

Every training uses all of train (no validation cut), so the settings can only have been chosen on other splits; each
test split is ranked once a training. Results are written after every training, and what is there is not done again.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from caravan.app.comparison import Comparison
from caravan.app.display import Bars
from caravan.app.learning import Experiment
from caravan.config import Config, DataConfig
from caravan.data.dataset import Dataset
from caravan.files import whole_file
from caravan.training.features import FeatureStore, default_cache

DATA = Path(os.environ.get("CARAVAN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SEEDS = {
    "helpdesk": (1, 2, 3),
    "sms_spam": (1, 2, 3),
    "banking77": (1, 2, 3),
    "stackfaq": (1, 2, 3),
    "wikitablequestions": (1,),
}
MODES = {"wikitablequestions": "head"}  # elsewhere "adapter"; here one of its epochs takes half an hour on two cores
CLIENTS = {"banking77": 3, "helpdesk": 3}  # also trained on this many iid clients, first seed


def main() -> None:
    """Run what is missing, then print one table a data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", choices=list(SEEDS), default=list(SEEDS))
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {"runs": {}}
    results["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("caravan", "torch", "transformers")},
    }
    for name in arguments.only:
        path = "helpdesk" if name == "helpdesk" else str(DATA / name)
        if name != "helpdesk" and not Path(path).is_dir():
            print(f"{name}: skipped, {path} is not there; set CARAVAN_DATA", file=sys.stderr)
            continue
        for seed in SEEDS[name]:
            _run(results, arguments.out, name, path, seed, clients=0)
        if name in CLIENTS:
            _run(results, arguments.out, name, path, SEEDS[name][0], clients=CLIENTS[name])
        print(table(name, results["runs"]))


def _run(results: dict, out: Path, name: str, path: str, seed: int, *, clients: int) -> None:
    key = f"{name}/seed {seed}" + (f"/{clients} clients" if clients else "")
    if key in results["runs"]:
        return
    config = Config(seed=seed, data=DataConfig(path=path, validation_fraction=0.0))
    config = replace(
        config,
        training=replace(config.training, mode=MODES.get(name, "adapter")),
        federation=replace(config.federation, clients=clients),
    )
    dataset = Dataset.from_config(config.data, seed=seed)
    dataset = replace(dataset, validation=())
    store = FeatureStore(default_cache())
    with Bars(quiet=False) as bars:
        experiment = Experiment(dataset, config, store=store, report=bars)
        comparison = Comparison(dataset, config, store=store, report=bars)
        if seed == SEEDS[name][0] and not clients:
            comparison.add_baselines(experiment.backbone)
        prefix = "federated " if clients else ""
        started = time.perf_counter()
        experiment.run(
            lambda stage, retriever, seconds: comparison.add_retriever(prefix + stage, retriever, seconds=seconds)
        )
        results["runs"][key] = {"seconds": round(time.perf_counter() - started, 1), "rows": comparison.to_dict()}
    with whole_file(out) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")


def table(name: str, runs: dict) -> str:
    """One data set's rows as Markdown, trained ones as mean over seeds with their range."""
    values: dict[str, dict[str, list[float]]] = {}
    for key, run in runs.items():
        if key.split("/")[0] == name:
            for row, content in run["rows"].items():
                for measure in ("recall@1", "recall@5", "recall@10", "mrr@10", "ndcg@10"):
                    values.setdefault(row, {}).setdefault(measure, []).append(
                        100 * content["metrics"][measure]["value"]
                    )
                values[row].setdefault("seconds", []).append(content["seconds"])
    lines = [
        f"| {name} | R@1 | (range, seeds) | R@5 | R@10 | MRR@10 | nDCG@10 | seconds |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row, measures in values.items():
        first = measures["recall@1"]
        spread = f"{min(first):.2f}-{max(first):.2f}, {len(first)}" if len(first) > 1 else ""
        others = " | ".join(
            f"{statistics.mean(measures[m]):.2f}" for m in ("recall@5", "recall@10", "mrr@10", "ndcg@10")
        )
        mean, seconds = statistics.mean(first), statistics.mean(measures["seconds"])
        lines.append(f"| {row} | {mean:.2f} | {spread} | {others} | {seconds:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
