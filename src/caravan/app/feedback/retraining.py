"""A retriever made better by its marks: its data and they are trained on, old and new are compared."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from caravan.app.experiment import checkpoint_folder, recorded_settings
from caravan.app.feedback.lessons import Classroom, Lessons, classroom, lessons
from caravan.app.feedback.marks import Marked, Marks
from caravan.app.feedback.verdict import Verdict, judge
from caravan.app.feedback.versions import KEPT, Versions
from caravan.app.learning import Experiment
from caravan.config import Config
from caravan.data.dataset import Dataset
from caravan.errors import ConfigError, DataError, PrivacyError, TrainingError
from caravan.files import alone
from caravan.model.retriever import Retriever
from caravan.storage import check_destination, load, read_record
from caravan.training.features import FeatureStore, default_cache
from caravan.training.progress import Report


@dataclass(frozen=True)
class Improvement:
    """What became of an attempt.

    Attributes:
        verdict: old beside new.
        lessons: what the marks taught.
        marked: all marks.
        left_out: training queries that are not trained on any more, see `Classroom`.
        version: the number of the new version; None where the old one stays.
        seconds: of training.
    """

    verdict: Verdict
    lessons: Lessons
    marked: Marked
    left_out: int
    version: int | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values; queries are not among them."""
        return {
            "version": self.version,
            "marks": len(self.marked.marks),
            "trained": len(self.lessons.examples),
            "held_back": len(self.lessons.questions),
            "contradicted": len(self.lessons.contradicted),
            "of_removed_documents": self.lessons.gone,
            "damaged_lines": list(self.marked.damaged),
            "left_out": self.left_out,
            "seconds": self.seconds,
            **self.verdict.to_dict(),
        }


def improve(
    model: str,
    data: str | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    dry_run: bool = False,
    force: bool = False,
    keep: int = KEPT,
    resume: bool = False,
    report: Report | None = None,
) -> Improvement:
    """Train anew on the data of a retriever and its marks, and put the result in its place if it is not worse.

    Args:
        model: the retriever's folder.
        data: the data it was trained on, where that is not found any more; None: as its record says.
        settings: settings to change, by dotted key.
        dry_run: compare alone.
        force: exchange them even if the new one is worse.
        keep: versions beside the current one.
        resume: go on where an interrupted attempt stood.
        report: called as the work goes on.

    Raises:
        ConfigError: the retriever does not say what it was trained on, and no data is given.
        DataError: the data is not there.
        PrivacyError: the training was private.
        TrainingError: there is nothing new to learn, or the training was a federation's.
        StorageError: the folder is no saved retriever, or cannot be written.
    """
    read_record(model)  # before a lock is made beside something else
    with alone(model):  # not while a document is being added
        old = load(model)
    config = _settings(old, model, data, settings or {})
    if not dry_run:
        check_destination(model)
    marked = Marks(model).read()
    taught = lessons(marked.marks, old.catalogue)
    room = classroom(_dataset(config, model), old.catalogue, taught)
    marks_name = _name_of(marked)
    known = old.record.get("learned") == marks_name and not (force or data or settings)
    if (known or not (taught.examples or taught.contradicted)) and not old.record.get("changes"):
        raise TrainingError(f"{model}: nothing new to learn: no new mark and no changed document; mark results first")
    store = FeatureStore(default_cache())
    with alone(checkpoint_folder(model)):  # two at once would write each other's snapshots
        experiment = Experiment(
            room.dataset,
            config,
            backbone=old.encoder.backbone if config.backbone == old.encoder.backbone.config else None,
            store=store,
            report=report,
            checkpoint=checkpoint_folder(model),
            resume=resume,
        )
        new = experiment.run()
        seconds = float(new.record["seconds"])
        verdict = judge(
            old,
            new,
            room.dataset.validation,
            taught.questions,
            store=store,
            bootstrap=config.evaluation.bootstrap,
            seed=config.seed,
            report=report,
        )
        version = None
        if not dry_run and (force or verdict.objection is None):
            if verdict.measures:
                row = {"metrics": verdict.to_dict()["measures"]["new"], "seconds": seconds}
                new.record |= {"metrics": {config.training.mode: row}, "metrics_split": "validation"}
            new.record["learned"] = marks_name
            what = _told(old, taught, room)
            version = Versions(model).replace(old, new, what=what, comparison=verdict.to_dict(), keep=keep)
        experiment.clear_checkpoint()
    return Improvement(verdict, taught, marked, room.left_out, version, seconds)


def _settings(old: Retriever, model: str, data: str | None, changes: Mapping[str, Any]) -> Config:
    if not isinstance(old.record.get("config"), dict) and data is None:
        raise ConfigError(f"{model}: its record does not say what it was trained on; give --data")
    if data is not None:
        # Files named for the data of then say nothing about other data.
        files = {"data.documents": None, "data.validation": None, "data.test": None}
        changes = {**files, **changes, "data.path": data}
    config = recorded_settings(old, model, changes)
    if config.privacy.mode != "none":
        raise PrivacyError(
            f"{model}: was trained with differential privacy, and marks are queries: choosing between versions by them "
            "would tell of them without noise; add right marks to the data and run `caravan train` with --epsilon, "
            "whose ledger adds up"
        )
    if config.federation.clients or config.federation.partition == "column":
        raise TrainingError(
            f"{model}: was trained on clients that do not pool their queries, and marks are queries of one place; "
            "run `caravan personalise` there with the marks, or train anew"
        )
    return config


def _dataset(config: Config, model: str) -> Dataset:
    try:
        return Dataset.from_config(config.data, seed=config.seed)
    except DataError as error:
        what = str(error).rstrip(".")
        raise DataError(f"{what} -- {model} was trained on it; say where it is now with --data") from None


def _name_of(marked: Marked) -> str:
    """A hash of what the marks say: which of them a version has seen."""
    pairs = sorted((mark.query, mark.doc_id, mark.right) for mark in marked.marks)
    return sha256(json.dumps(pairs).encode("ascii")).hexdigest()


def _told(old: Retriever, taught: Lessons, room: Classroom) -> str:
    """What is new in a version, for its list; never a query."""
    changes = old.record.get("changes")
    changed = sum(int(count) for count in changes.values()) if isinstance(changes, dict) else 0
    parts = [
        f"{len(taught.examples)} marked queries learned",
        f"{len(taught.questions)} held back" if taught.questions else "",
        f"{room.left_out} training queries left out" if room.left_out else "",
        f"{changed} documents changed" if changed else "",
    ]
    return ", ".join(part for part in parts if part)
