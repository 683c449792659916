"""Do marks help? Part of the bundled help desk's queries train a retriever, users mark what it finds for the rest.

Two are simulated: one who marks the right document where it is among the first five that are shown, and the first one
wrong where it is wrong; and one who in some cases marks another document of the five right by mistake. Then
`caravan improve` runs as it is. Validation queries choose; test queries are ranked once, for the report.

    python benchmarks/feedback.py feedback.json [--mode adapter] [--seeds 1,2,3]
"""

import argparse
import json
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from caravan.app.comparison import evaluate
from caravan.app.experiment import run_experiment
from caravan.app.feedback.lessons import classroom, lessons
from caravan.app.feedback.marks import Mark, Marks, now
from caravan.app.feedback.retraining import improve
from caravan.app.learning import Experiment
from caravan.config import Config, config_from_dict
from caravan.data.dataset import Dataset
from caravan.data.records import Example
from caravan.model.retriever import Retriever
from caravan.storage import load
from caravan.training.features import FeatureStore, default_cache

SHARE = 0.4  # of the training queries that the first version is trained on
SHOWN = 5  # documents a simulated user looks at
SETTINGS: tuple[tuple[int | None, float], ...] = ((100, 0.0), (400, 0.0), (None, 0.0), (None, 0.1))
STORE = FeatureStore(default_cache())


def main() -> None:
    """Measure, and write the figures after each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mode", choices=["head", "adapter"], default="head")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--all-alone", action="store_true", help="All marks alone: neither 100, 400, nor mistakes.")
    options = parser.parse_args()
    settings = SETTINGS[2:3] if options.all_alone else SETTINGS
    rows: list[dict[str, Any]] = []
    for seed in map(int, options.seeds.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            rows.extend(measured(Path(folder), options.mode, seed, settings))
        machine = {"python": platform.python_version(), "machine": platform.machine()}
        result = {
            "benchmark": "feedback",
            "mode": options.mode,
            "share": SHARE,
            "shown": SHOWN,
            **machine,
            "rows": rows,
        }
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measured(place: Path, mode: str, seed: int, settings: Sequence[tuple[int | None, float]]) -> list[dict[str, Any]]:
    """Train on a part, and improve by marks, each setting from the same first version."""
    full = Dataset.read("helpdesk", seed=seed)
    source = random.Random(seed)
    order = source.sample(range(len(full.train)), len(full.train))
    first = [full.train[index] for index in sorted(order[: int(SHARE * len(order))])]
    rest = [full.train[index] for index in order[int(SHARE * len(order)) :]]
    data = write(place / "data", full, first)
    config = config_from_dict(
        {"seed": seed, "data": {"path": str(data)}, "training": {"mode": mode}, "evaluation": {"baselines": False}}
    )
    run_experiment(config, place / "0")
    old = load(place / "0")
    rows = []
    for number, (most, mistakes) in enumerate(settings, start=1):
        model = place / str(number)
        shutil.copytree(place / "0", model)
        marks = mark(Marks(model), old, rest[:most], mistakes, source)
        started = time.perf_counter()
        done = improve(str(model), force=True)
        seconds = time.perf_counter() - started
        new = load(model)
        row = {
            "seed": seed,
            "queries_of_the_first_version": len(first),
            "queries_marked": len(rest[:most]),
            "mistakes": mistakes,
            **marks,
            "learned": len(done.lessons.examples),
            "held_back": len(done.lessons.questions),
            "not_worse_by_the_rule": done.verdict.objection is None,
            **done.verdict.to_dict(),
            "seconds": round(seconds, 1),
            "test": {"old": recalls(old, full.test), "new": recalls(new, full.test)},
        }
        if mode == "head" and most is None and not mistakes:  # with adapters three trainings more, of minutes each
            row["validation_by_start"] = by_start(model, old, full, config)
        rows.append(row)
        print(json.dumps({name: row[name] for name in ("seed", "queries_marked", "mistakes", "objection", "test")}))
        sys.stdout.flush()
    return rows


def mark(
    marks: Marks, retriever: Retriever, examples: Sequence[Example], mistakes: float, source: random.Random
) -> dict[str, int]:
    """Mark what a retriever shows, as a user would."""
    right = wrong = 0
    results = retriever.search([example.text for example in examples], SHOWN)
    for example, hits in zip(examples, results, strict=True):
        shown = [hit.doc_id for hit in hits]
        found = [doc_id for doc_id in shown if doc_id in example.doc_ids]
        if source.random() < mistakes:
            found = [source.choice([doc_id for doc_id in shown if doc_id not in example.doc_ids])]
        if found:
            marks.add(Mark(example.text, found[0], right=True, time=now()))
            right += 1
        if shown[0] not in example.doc_ids and shown[0] not in found:
            marks.add(Mark(example.text, shown[0], right=False, time=now()))
            wrong += 1
    return {"right_marks": right, "wrong_marks": wrong}


def by_start(model: Path, old: Retriever, full: Dataset, config: Config) -> dict[str, dict[str, float]]:
    """How a training does on validation that begins anew, as `caravan improve` does, and one with the old weights."""
    data = Dataset.from_config(config.data, seed=config.seed)
    taught = lessons(Marks(model).read().marks, old.catalogue)
    joined = classroom(data, old.catalogue, taught).dataset
    found = {"anew": recalls(load(model), full.validation)}
    state = old.trainable_state()
    for name, examples in (("old weights", joined.train), ("old weights, marks alone", taught.examples)):
        backbone = load(model).encoder.backbone
        experiment = Experiment(replace(joined, train=examples), config, backbone=backbone, store=STORE)
        experiment.retriever.load_trainable_state(state)
        found[name] = recalls(experiment.run(), full.validation)
    return found


def recalls(retriever: Retriever, examples: Sequence[Example]) -> dict[str, float]:
    """Three measures of a retriever."""
    measures = evaluate(retriever, examples, bootstrap=0, store=STORE)
    return {name: round(measures[name].value, 4) for name in ("recall@1", "recall@5", "mrr@10")}


def write(folder: Path, full: Dataset, train: Sequence[Example]) -> Path:
    """A data set as files: those queries, all documents, and the validation queries of the whole."""
    folder.mkdir()
    full.catalogue.write(folder / "documents.jsonl")
    for split, examples in (("train", train), ("validation", full.validation)):
        lines = [json.dumps({"text": example.text, "label": list(example.doc_ids)}) for example in examples]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


if __name__ == "__main__":
    main()
