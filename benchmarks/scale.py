"""How much memory and time does a round of a simulation cost, for how many clients?

Usage: python benchmarks/scale.py OUT.json [--clients K ...] [--codec NAME] [--one K]

banking77's training queries, dealt to K clients in one process with one frozen model, head stage, two rounds. Every K
has a process of its own, which reports its peak of resident memory; the slope between the fewest and the most clients
is what a client costs. Without banking77 the bundled help desk takes its place.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from caravan.app.learning import Experiment
from caravan.config import Config, DataConfig
from caravan.data.dataset import Dataset
from caravan.files import whole_file
from caravan.training.features import FeatureStore, default_cache

DATA = Path(os.environ.get("CARAVAN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
ROUNDS = 2
MIB = 2**20


def main() -> None:
    """Measure every number of clients in a process of its own, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--clients", type=int, nargs="*", default=[10, 100, 300, 1000])
    parser.add_argument("--codec", default="none")
    parser.add_argument("--one", type=int, help="measure this number in this process and print it")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.codec)))
        return
    rows = []
    for clients in arguments.clients:
        words = [sys.executable, __file__, str(arguments.out), "--one", str(clients), "--codec", arguments.codec]
        rows.append(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))
        with whole_file(arguments.out) as temporary:
            temporary.write_text(json.dumps({"codec": arguments.codec, "rows": rows}, indent=1) + "\n")
    print(table(rows))


def measure(clients: int, codec: str) -> dict[str, Any]:
    """Run the rounds; peak memory of this process, and seconds a round."""
    path = str(DATA / "banking77") if (DATA / "banking77").is_dir() else "helpdesk"
    config = Config(data=DataConfig(path=path, validation_fraction=0.0))
    config = replace(
        config,
        training=replace(config.training, mode="head", head=replace(config.training.head, epochs=ROUNDS)),
        federation=replace(config.federation, clients=clients, rounds=ROUNDS, codec=codec),
    )
    dataset = replace(Dataset.from_config(config.data, seed=config.seed), validation=(), test=())
    experiment = Experiment(dataset, config, store=FeatureStore(default_cache()))
    before = peak()
    started = time.perf_counter()
    retriever = experiment.run()
    seconds = time.perf_counter() - started
    rounds = retriever.record["federation"]["rounds"]
    assert all(len(report["clients"]) == clients for report in rounds)
    sent = sum(tensor.numel() * tensor.element_size() for tensor in retriever.trainable_state().values())
    return {
        "clients": clients,
        "peak_mib": round(peak() / MIB, 1),
        "peak_before_mib": round(before / MIB, 1),
        "seconds": round(seconds, 1),
        "round_seconds": [round(report["seconds"], 1) for report in rounds],
        "tensors_mib": round(sent / MIB, 2),
    }


def peak() -> int:
    """The most resident memory this process has had, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = ["| clients | peak memory, MiB | of which before training | seconds a round |", "|---:|---:|---:|---:|"]
    for row in rows:
        last = row["round_seconds"][-1]
        lines.append(f"| {row['clients']} | {row['peak_mib']:.0f} | {row['peak_before_mib']:.0f} | {last:.1f} |")
    few, many = rows[0], rows[-1]
    slope = (many["peak_mib"] - few["peak_mib"]) / max(1, many["clients"] - few["clients"])
    lines.append(f"\nA client costs {slope:.2f} MiB; what it sends has {many['tensors_mib']} MiB.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
