"""`GET /training` and `/training/events`: a training as it runs or ran, read from what it leaves on the disk."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from http import HTTPStatus
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from caravan.app.experiment import checkpoint_folder
from caravan.app.record import shown_settings
from caravan.app.traces import LINES, finite, point_of_epoch, point_of_round
from caravan.app.web.bodies import TrainingAnswer
from caravan.app.web.limits import RefusedError
from caravan.app.web.routing import ERRORS, Here, as_json, needs
from caravan.errors import StorageError
from caravan.files import is_held
from caravan.storage import RECORD, read_record

_LOOK = 0.5  # seconds between two looks at the files: sooner than anybody notices
_MOST_FOLLOWERS = 100  # each holds a connection for hours


class Following:
    """One training, by the folder that it writes.

    Attributes:
        folder: `--out` of `caravan train`, or the folder of a federation, whose trainings write into `model` there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        federation = (self.folder / "caravan.toml").is_file()
        self._result = self.folder / "model" if federation else self.folder
        self._lines = (self.folder / "checkpoint" if federation else checkpoint_folder(folder)) / LINES
        self._seen: tuple[object, dict[str, Any]] | None = None
        self.followers = 0

    @property
    def there(self) -> bool:
        """Whether there is a training to show."""
        return self.read()["state"] != "none"

    def read(self) -> dict[str, Any]:
        """Give a `TrainingAnswer` as plain values; cheap where nothing changed since the last time."""
        held = is_held(self._lines)
        stamp = held, _stamp(self._lines), _stamp(self._result / RECORD)
        if self._seen is None or self._seen[0] != stamp:
            self._seen = stamp, self._from_lines(held=held) or self._from_record() or self._none()
        return self._seen[1]

    async def changes(self, closing: asyncio.Event) -> AsyncIterator[dict[str, Any]]:
        """Give what `read` gives, now and whenever it is another, until the service closes."""
        known: dict[str, Any] | None = None
        while not closing.is_set():
            found = await asyncio.to_thread(self.read)
            if found is not known:
                yield (known := found)
            with suppress(TimeoutError):
                await asyncio.wait_for(closing.wait(), _LOOK)

    def _from_lines(self, *, held: bool) -> dict[str, Any] | None:
        """A training that runs, or stopped before its result was saved."""
        try:
            text = self._lines.read_text(encoding="ascii", errors="replace")
        except OSError:
            return None
        found = self._none()
        points: dict[tuple[str, int], dict[str, Any]] = {}
        ended = False
        for line in text.split("\n"):
            match _parsed(line):
                case {"kind": "begin", "settings": settings, "privacy": privacy}:
                    found |= {"settings": settings, "privacy": privacy}
                    ended = False
                case {"kind": "point", "stage": str(stage), "step": int(step), "seconds": float()} as point:
                    points[stage, step] = _without_kind(point)
                    found["now"] = None
                case {"kind": "now", "task": str(), "done": int(), "total": int()} as now:
                    found["now"] = _without_kind(now)
                case {"kind": "end"}:
                    ended = True
        state = "finished" if ended else "running" if held else "stopped"
        found |= {"state": state, "points": _since_begin(list(points.values()))}
        return found if state == "running" else found | {"now": None}

    def _from_record(self) -> dict[str, Any] | None:
        """A training whose result is saved."""
        with suppress(StorageError, LookupError, TypeError, ValueError, AttributeError):
            record = read_record(self._result)
            config, dataset = record["config"], record["dataset"]
            rounds = record.get("federation", {}).get("rounds", ())
            points = [point_of_epoch(epoch, config) for epoch in record["history"]]
            points += [point_of_round(each, config) for each in rounds]
            metrics = record.get("metrics")
            return self._none() | {
                "state": "finished",
                "settings": shown_settings(config, dataset["name"], dataset["documents"]),
                "points": _since_begin(points),
                "privacy": record["privacy"],
                "measures": {"split": record["metrics_split"], "results": metrics} if metrics else {},
            }
        return None

    def _none(self) -> dict[str, Any]:
        name = Path(self._result).absolute().name
        return {
            "state": "none", "folder": name, "settings": {}, "points": [], "privacy": "", "measures": {}, "now": None
        }  # fmt: skip


def _since_begin(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points in which seconds, so far of one step each, count from the beginning."""
    sums = accumulate(float(point["seconds"]) for point in points)
    return [
        {name: finite(value) for name, value in point.items()} | {"seconds": round(total, 3)}
        for point, total in zip(points, sums, strict=True)
    ]


def _parsed(line: str) -> Mapping[str, Any]:
    with suppress(ValueError):  # what a kill left of a line, or one that is being written
        value = json.loads(line)
        if isinstance(value, dict):
            return value
    return {}


def _without_kind(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "kind"}


def _stamp(path: Path) -> object:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


async def _following(request: Request) -> Following:
    return request.app.state.following


There = Annotated[Following, Depends(_following)]
router = APIRouter(prefix="/training", dependencies=[needs("read")], responses=ERRORS, tags=["training"])


@router.get("", response_model=TrainingAnswer)
async def training(following: There) -> Response:
    """Say how a training goes or went: losses, recall, bytes, epsilon, what is promised; never a query."""
    return as_json(await asyncio.to_thread(following.read))


async def _place(following: There) -> AsyncIterator[Following]:
    """A follower's place; before the answer begins, so that it can still be refused."""
    if following.followers >= _MOST_FOLLOWERS:
        raise RefusedError(
            f"{following.followers} follow already; ask again later",
            HTTPStatus.TOO_MANY_REQUESTS,
            "overloaded",
            retry_after=60,
        )
    following.followers += 1
    try:
        yield following
    finally:
        following.followers -= 1


@router.get("/events", response_class=EventSourceResponse)
async def training_events(
    following: Annotated[Following, Depends(_place)], service: Here
) -> AsyncIterator[ServerSentEvent]:
    """Follow a training: an event `training` with the same object now and whenever it changes, until you close."""
    async for value in following.changes(service.closing):
        yield ServerSentEvent(raw_data=json.dumps(value), event="training")
