"""What does a federated round send by each method, and what recall does it buy, on banking77?

Usage: python benchmarks/communication.py OUT.json [--only METHOD ...] [--seeds S ...] [--device DEVICE]

Three clients, two rounds of one epoch each for adapters and rivals after the head's own stage, on every other training
query, which halves the time. There is no validation cut, so rates can only have been chosen on other splits, and the
test split is ranked once a training.
Results are written after every training, and what is there is not done again.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from caravan.app.communication import Communication
from caravan.app.display import Bars
from caravan.config import BackboneConfig, Config, DataConfig
from caravan.data.dataset import Dataset
from caravan.files import whole_file

DATA = Path(os.environ.get("CARAVAN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
CLIENTS, EPOCHS = 3, 2


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", help="methods; all if left out")
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    out = arguments.out
    results = json.loads(out.read_text()) if out.is_file() else {"runs": {}}
    results["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "device": arguments.device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("caravan", "torch", "transformers", "peft")},
    }
    for seed in arguments.seeds:
        config = _settings(seed, arguments.device)
        dataset = Dataset.from_config(config.data, seed=seed)
        results["settings"] = {"clients": CLIENTS, "epochs": EPOCHS, "adapter": config.to_dict()["adapter"]}
        with Bars(quiet=not sys.stderr.isatty()) as bars:
            found = Communication(replace(dataset, train=dataset.train[::2], validation=()), config, report=bars)
            results["sent"] = found.summary()
            for method, codec in found.trainings():
                key = f"banking77/{method}/{codec}/{seed}"
                if key not in results["runs"] and (arguments.only is None or method in arguments.only):
                    results["runs"][key] = found.train(method, codec).to_dict()
                    with whole_file(out) as temporary:
                        temporary.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


def _settings(seed: int, device: str) -> Config:
    config = Config(
        seed=seed,
        backbone=BackboneConfig(device=device),
        data=DataConfig(path=str(DATA / "banking77"), validation_fraction=0.0),
    )
    stage = replace(config.training.adapter, epochs=EPOCHS)
    return replace(
        config,
        training=replace(config.training, adapter=stage),
        federation=replace(config.federation, clients=CLIENTS),
    )


def table(results: dict) -> str:
    """What was trained, as Markdown, beside what it sends: means over seeds."""
    sent = {(row["method"], row["codec"]): row for row in results["sent"]["models"][0]["rows"]}
    groups: dict[tuple[str, str], list[dict]] = {}
    for run in results["runs"].values():
        groups.setdefault((run["method"], run["codec"]), []).append(run)
    recalls = {key: [100 * run["recall"]["value"] for run in runs] for key, runs in groups.items()}
    full = recalls.get(("full", "none"))
    lines = [
        "| beside the head | codec | bytes up | of LoRA | with head | of full | measured up | down "
        "| R@1 (range, seeds) | to full |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for key, runs in groups.items():
        row, found = sent[key[0], key[1].replace("none", "float32")], recalls[key]
        mean = statistics.mean(found)
        behind = f"{mean - statistics.mean(full):+.2f}" if full else ""
        lines.append(
            f"| {key[0]} | {row['codec']} | {row['part']:,} | {row['to_lora']:.4f} | {row['together']:,} "
            f"| {row['to_full']:.3f} | {runs[0]['up']:,} | {runs[0]['down']:,} "
            f"| {mean:.2f} ({min(found):.2f}-{max(found):.2f}, {len(found)}) | {behind} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
