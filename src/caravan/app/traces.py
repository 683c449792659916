"""What a training leaves on the disk while it runs: snapshots by stage, and a line for every epoch or round."""

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from caravan.errors import StorageError
from caravan.files import hold, make_folder
from caravan.training.checkpoint import Checkpoint
from caravan.training.progress import Progress, Report
from caravan.training.stages import Stage

LINES = "progress.jsonl"
STAGES: tuple[Stage, ...] = ("head", "adapter")
_KINDS = ("", ".rate")  # of a stage's snapshots: the training's, and the choice of its rates

_SECONDS = 2.0  # between two lines that say how far the work is
_SHARE = 0.005  # of the time so far, if that is longer: a day of training makes some thousand lines
_CLIENT = re.compile(r"^(round \d+/\d+), .*: ")  # who a client is stays out of the file


class Traces:
    """The folder of one training's traces; or of none, where nothing is to be kept.

    `progress.jsonl` has a JSON object a line, each appended whole: `begin` (settings, privacy), `point` (an epoch or a
    round), `now` (how far the work is), `end`. A training that is resumed writes on, so of two points of one step the
    later one holds. The file is locked (flock) as long as the training runs. It goes with the snapshots, and with a
    failed training that has none yet.

    Attributes:
        folder: where they lie; None keeps none.
    """

    def __init__(self, folder: str | Path | None, fingerprint: Callable[[], str]) -> None:
        """Name the place; nothing is written yet.

        Args:
            folder: see the class.
            fingerprint: names what must be the same for a snapshot to be taken up; called when first needed.
        """
        self.folder = Path(folder) if folder is not None else None
        self._make_fingerprint = fingerprint
        self._handle: int | None = None
        self._begun = self._said = 0.0

    @cached_property
    def _fingerprint(self) -> str:
        return self._make_fingerprint()

    def snapshots(self, stage: Stage, what: str = "") -> Checkpoint | None:
        """Where a stage's snapshots go; None where none are kept."""
        if self.folder is None:
            return None
        return Checkpoint(self.folder / f"{stage}{what}.safetensors", self._fingerprint)

    def check(self, stages: Sequence[Stage]) -> None:
        """Refuse snapshots that could not be taken up.

        Raises:
            StorageError: one is damaged, or of other data or settings.
        """
        for stage, what in product(stages, _KINDS):
            if (snapshots := self.snapshots(stage, what)) is not None:
                snapshots.load()

    def clear(self, *, folder: bool = False) -> None:
        """Remove all traces.

        Args:
            folder: remove the folder too, if nothing else is in it.

        Raises:
            StorageError: they cannot be removed.
        """
        if self.folder is None:
            return
        for stage, what in product(STAGES, _KINDS):
            Checkpoint(self.folder / f"{stage}{what}.safetensors", "").clear()
        self._remove_lines(folder=folder)

    @contextmanager
    def running(self, begin: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
        """Keep the file of lines while a training runs. Where that cannot be done, the training goes on without.

        Args:
            begin: gives what is to be known from the beginning, as plain values.
        """
        if self.folder is None:
            yield
            return
        with suppress(OSError, StorageError):
            self._handle = hold(make_folder(self.folder) / LINES)
            size = os.fstat(self._handle).st_size
            if size and os.pread(self._handle, 1, size - 1) != b"\n":  # what a kill left of a line
                os.write(self._handle, b"\n")
        self._begun = self._said = time.monotonic()
        try:
            self._write("begin", begin())
            yield
            self._write("end", {})
        except BaseException:
            if not any(self.folder.glob("*.safetensors")):
                self._remove_lines(folder=True)
            raise
        finally:
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None

    def add(self, point: Mapping[str, Any]) -> None:
        """Write down an epoch or a round, see `point_of_epoch` and `point_of_round`."""
        self._write("point", point)

    def watching(self, report: Report | None) -> Report | None:
        """Give a report that also writes down, now and then, how far the work is."""
        if self.folder is None:
            return report

        def both(progress: Progress) -> None:
            if report is not None:
                report(progress)
            self._say(progress)

        return both

    def _say(self, progress: Progress) -> None:
        now = time.monotonic()
        if self._handle is None or now - self._said < max(_SECONDS, _SHARE * (now - self._begun)):
            return
        self._said = now
        task = _CLIENT.sub(r"\1: ", progress.task)
        self._write("now", {"task": task, "done": progress.done, "total": progress.total, "loss": progress.loss})

    def _write(self, kind: str, values: Mapping[str, Any]) -> None:
        if self._handle is None:
            return
        line = json.dumps({"kind": kind, **{name: finite(value) for name, value in values.items()}})
        with suppress(OSError):  # a full disk stops a training where a snapshot cannot be kept, and not before
            os.write(self._handle, line.encode("ascii") + b"\n")

    def _remove_lines(self, *, folder: bool) -> None:
        assert self.folder is not None
        try:
            if self.folder.is_dir():
                (self.folder / LINES).unlink(missing_ok=True)
                if folder and not any(self.folder.iterdir()):
                    self.folder.rmdir()
        except OSError as error:
            raise StorageError(f"{self.folder}: cannot be removed: {error.strerror}; remove it yourself") from None


def point_of_epoch(record: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """An epoch as a reader is shown it.

    Args:
        record: an `EpochRecord` as plain values.
        config: all settings as plain values.
    """
    return {
        "stage": record["stage"],
        "step": record["epoch"] + 1,
        "of": config["training"][record["stage"]]["epochs"],
        "loss": record.get("loss"),
        "recall_at_1": record.get("validation_recall"),
        "seconds": record["seconds"],
        "bytes_up": None,
        "bytes_down": None,
        "epsilon": record.get("epsilon"),
    }


def point_of_round(record: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """A round of a federation as a reader is shown it: neither clients nor what each of them told.

    Args:
        record: a `RoundReport` as plain values, with the stage, the recall on validation queries and the epsilon.
        config: all settings as plain values.
    """
    together = of_clients(record)
    return {
        "stage": record["stage"],
        "step": record["round"],
        "of": min(config["federation"]["rounds"], config["training"][record["stage"]]["epochs"]),
        "loss": together.get("loss"),
        "recall_at_1": record.get("validation_recall"),
        "seconds": record["seconds"],
        "bytes_up": record["bytes_up"],
        "bytes_down": record["bytes_down"],
        "epsilon": record.get("epsilon"),
    }


def of_clients(record: Mapping[str, Any]) -> dict[str, float]:
    """What the clients of a round told of their work, weighted by their examples; what none told is left out."""
    found: dict[str, float] = {}
    for name in sorted({name for metrics in record["metrics"] for name in metrics}):
        told = [
            (metrics[name], count)
            for metrics, count in zip(record["metrics"], record["examples"], strict=True)
            if name in metrics
        ]
        weight = sum(count for _, count in told)
        if weight:
            found[name] = sum(value * count for value, count in told) / weight
    return found


def finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
