"""How far from the best of a sweep is the automatic learning rate? On validation queries, in both modes.

Usage: python benchmarks/learning_rate.py OUT.json [--only DATA ...] [--modes head adapter] [--device cuda]
           [--seeds 1 2 3] [--points 9]

The sweep multiplies the default rate by powers of two; in adapter mode both rates of the stage move together, and the
head stage before it has its default. The measure is recall@1 on the validation queries after the last epoch, the mean
over seeds, each of which cuts another validation part: no test split is ranked. Results are written after every
training, and what is there is not done again; processes that run side by side need an OUT each.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from caravan.app.display import Bars
from caravan.app.learning import Experiment
from caravan.config import AdapterStageConfig, Config, HeadStageConfig, config_from_dict
from caravan.data.dataset import Dataset
from caravan.files import whole_file
from caravan.model.backbone import load_backbone

DATA = Path(os.environ.get("CARAVAN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SETS = ("helpdesk", "stackfaq", "sms_spam", "banking77")
MODES = ("head", "adapter")
AUTO = "auto"
DEFAULTS = {"head": HeadStageConfig().learning_rate, "adapter": AdapterStageConfig().learning_rate}
HEAD_SHARE = AdapterStageConfig().head_learning_rate / AdapterStageConfig().learning_rate


def grid(mode: str, points: int) -> list[float]:
    """Rates around the default, each twice the one before."""
    return [float(f"{DEFAULTS[mode] * 2.0 ** (place - points // 2):.4g}") for place in range(points)]


def settings(name: str, mode: str, seed: int, rate: float | str, device: str) -> Config:
    """The defaults on a data set, with one rate changed."""
    changes: dict[str, Any] = {"learning_rate": rate}
    if mode == "adapter":
        changes["head_learning_rate"] = rate if isinstance(rate, str) else rate * HEAD_SHARE
    path = name if name == "helpdesk" else str(DATA / name)
    values = {"seed": seed, "data": {"path": path}, "backbone": {"device": device}}
    return config_from_dict({**values, "training": {"mode": mode, mode: changes}})


def train(config: Config, dataset: Dataset, backbone: Any, bars: Bars) -> dict[str, Any]:
    """One training: validation recall after its last epoch, the curve, and what it cost."""
    experiment = Experiment(dataset, config, backbone=backbone, report=bars)
    started = time.perf_counter()
    record = experiment.run().record
    curve = [epoch["validation_recall"] for epoch in record["history"] if epoch["stage"] == config.training.mode]
    result = {"recall": curve[-1], "curve": curve, "seconds": round(time.perf_counter() - started, 1)}
    return result | ({"chosen": record["learning_rates"]} if "learning_rates" in record else {})


def missing(arguments: argparse.Namespace, runs: Mapping[str, Any]) -> Iterator[tuple[str, str, int, float | str]]:
    """What is still to be trained: data set, mode, seed and rate."""
    for name in arguments.only:
        for mode in arguments.modes:
            for seed in arguments.seeds:
                for rate in (AUTO, *grid(mode, arguments.points)):
                    if key(name, mode, seed, rate) not in runs and not (rate == AUTO and arguments.no_auto):
                        yield name, mode, seed, rate


def key(name: str, mode: str, seed: int, rate: float | str) -> str:
    """Under which a result is kept."""
    return f"{name}/{mode}/{seed}/{rate if isinstance(rate, str) else format(rate, '.4g')}"


def table(runs: Mapping[str, Any]) -> str:
    """One line a data set and mode: the sweep's best and its good range beside the automatic choice, as Markdown."""
    lines = ["| data, mode | seeds | best of sweep | at | within 0.2 | default | automatic | at | against best |"]
    lines.append("|---|---:|---:|---:|---|---:|---:|---:|---:|")
    for name in SETS:
        for mode in MODES:
            found: dict[str, dict[str, dict[str, Any]]] = {}
            for place, run in runs.items():
                data, its_mode, seed, rate = place.split("/")
                if (data, its_mode) == (name, mode):
                    found.setdefault(rate, {})[seed] = run
            if found:
                lines.append(row(name, mode, found))
    return "\n".join(lines) + "\n"


def row(name: str, mode: str, found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """One line of the table, over the seeds that every rate has been run with."""
    seeds = set.intersection(*(set(own) for own in found.values()))
    means = {rate: 100 * mean(own[seed]["recall"] for seed in seeds) for rate, own in found.items()} if seeds else {}
    swept = {float(rate): value for rate, value in means.items() if rate != AUTO}
    if not swept:
        return f"| {name}, {mode} | 0 | | | | | | | |"
    best = max(swept, key=lambda rate: (swept[rate], -rate))
    good = [rate for rate in swept if swept[rate] >= swept[best] - 0.2 - 1e-9]
    default = next((f"{value:.2f}" for rate, value in swept.items() if rate == DEFAULTS[mode]), "")
    cells = [f"{swept[best]:.2f}", f"{best:.4g}", f"{min(good):.4g} to {max(good):.4g}", default]
    if AUTO in means:
        chosen = [rate["chosen"][mode]["learning_rate"] for rate in (found[AUTO][seed] for seed in sorted(seeds))]
        at = f"{min(chosen):.2g} to {max(chosen):.2g}" if len(chosen) > 1 else f"{chosen[0]:.2g}"
        cells += [f"{means[AUTO]:.2f}", at, f"{means[AUTO] - swept[best]:+.2f}"]
    else:
        cells += ["", "", ""]
    return f"| {name}, {mode} | {len(seeds)} | {' | '.join(cells)} |"


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", choices=SETS, default=SETS)
    parser.add_argument("--modes", nargs="*", choices=MODES, default=MODES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--points", type=int, default=9)
    parser.add_argument("--no-auto", action="store_true", help="the sweep alone")
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {"runs": {}}
    results["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("caravan", "torch", "transformers")},
    }
    backbone = load_backbone(replace(Config().backbone, device=arguments.device), seed=1)
    for name, mode, seed, rate in missing(arguments, results["runs"]):
        config = settings(name, mode, seed, rate, arguments.device)
        if name != "helpdesk" and not Path(config.data.path).is_dir():
            print(f"{name}: skipped, {config.data.path} is not there; set CARAVAN_DATA", file=sys.stderr)
            continue
        with Bars(quiet=not sys.stderr.isatty()) as bars:
            result = train(config, Dataset.from_config(config.data, seed=seed), backbone, bars)
        results["runs"][key(name, mode, seed, rate)] = result
        with whole_file(arguments.out) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{key(name, mode, seed, rate)}: {result['recall']:.4f}", file=sys.stderr, flush=True)
    print(table(results["runs"]))


if __name__ == "__main__":
    main()
