"""Versions of a retriever: the one in its folder, and those it had before, kept beside it.

What is in the folder says in its record which version it is, so that files and number change in the same step. A
version is kept when it leaves the folder: as it was then, with the documents of that day.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from caravan.app.feedback.marks import feedback_folder, make_private, now
from caravan.data.catalogue import Catalogue
from caravan.errors import DataError, StorageError
from caravan.files import alone, make_folder, whole_file, whole_folder
from caravan.model.backbone import Backbone
from caravan.model.changing import with_documents, without_documents
from caravan.model.retriever import Retriever
from caravan.storage import FILES, RECORD, fits, load, read_record, save

KEPT = 5  # versions beside the current one: a way back that is longer than anybody remembers
_TRAINED = "trained"


@dataclass(frozen=True)
class Version:
    """One version.

    Attributes:
        number: counts from 1, never used twice.
        current: whether it is the one in the folder.
        of: number of the version it came from; None of a training from the beginning.
        time: when it was made, ISO 8601, UTC.
        what: what is new in it.
        comparison: how it did beside the version it came from, see `Verdict.to_dict`; empty where it was not compared.
    """

    number: int
    current: bool
    of: int | None
    time: str
    what: str
    comparison: Mapping[str, Any]


class Versions:
    """The versions of one retriever.

    Attributes:
        model: its folder.
        folder: where the others lie, one folder each, named by number; each is a saved retriever of its own.
    """

    def __init__(self, model: str | Path) -> None:
        self.model = Path(model)
        self.folder = feedback_folder(model) / "versions"

    def listed(self) -> list[Version]:
        """Give all versions, the newest first.

        Raises:
            StorageError: the folder is no saved retriever.
        """
        current = self._described(self.model, self._number(read_record(self.model)), current=True)
        kept = [
            self._described(self.folder / str(number), number) for number in self._kept() if number != current.number
        ]
        return sorted([current, *kept], key=lambda version: -version.number)

    def replace(
        self, old: Retriever, new: Retriever, *, what: str, comparison: Mapping[str, Any], keep: int = KEPT
    ) -> int:
        """Put new weights in the place of old ones, in one step, and keep the old ones.

        Documents that were added, edited or removed since `old` was loaded are so in what is put in place, too.

        Args:
            old: as loaded when the work on `new` began.
            new: on the same documents; its record becomes that of a version.
            what: what is new in it.
            comparison: see `Version`.
            keep: versions beside the current one; of more the oldest go, but never the one that `new` came from.

        Returns:
            The new version's number.

        Raises:
            StorageError: the weights in the folder are others by now, or something cannot be written; then what was
                there stays.
        """
        with alone(self.model):
            present = load(self.model, backbone=new.encoder.backbone)
            if _origin(present) != _origin(old):
                raise StorageError(f"{self.model}: was trained or exchanged by somebody else meanwhile; try again")
            before = self._number(present.record)
            number = max([before, *self._kept()]) + 1
            new = onto(new, present.catalogue)
            version = {"number": number, "of": before, "time": now(), "what": what, "comparison": dict(comparison)}
            new.record = {**new.record, "version": version}
            self._keep(before)
            save(new, self.model)
            self._forget(number, before, keep)
            return number

    def back(self, number: int | None = None, *, keep: int = KEPT) -> int:
        """Put a kept version in place, in one step, and keep the present one; documents stay as they are now.

        Args:
            number: which; None: the one that the present one came from.
            keep: see `replace`.

        Returns:
            The number of the version that is in place now.

        Raises:
            DataError: there is no such version, or it is in place already.
            StorageError: it is damaged, or something cannot be written; then what was there stays.
        """
        read_record(self.model)  # before a lock is made beside something else
        with alone(self.model):
            present = load(self.model)
            before = self._number(present.record)
            wanted = self._parent(present.record) if number is None else number
            numbers = sorted(set(self._kept()) - {before})
            shown = ", ".join(map(str, numbers)) or "none"
            if wanted is None:
                raise DataError(f"{self.model}: version {before} came from no other; name one, kept are: {shown}")
            if wanted == before:
                raise DataError(f"{self.model}: version {wanted} is in place; name another, kept are: {shown}")
            if wanted not in numbers:
                raise DataError(f"{self.model}: no version {wanted} is kept; name another, kept are: {shown}")
            place = self.folder / str(wanted)
            shared: Backbone | None = present.encoder.backbone if fits(place, present.encoder.backbone) else None
            old = onto(load(place, backbone=shared), present.catalogue)
            self._keep(before)
            save(old, self.model)
            self._forget(wanted, before, keep)
            return wanted

    def _kept(self) -> list[int]:
        try:
            names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        except OSError as error:
            raise StorageError(f"{self.folder}: cannot be read: {error.strerror}; check its rights") from None
        return [int(name) for name in names if name.isascii() and name.isdigit()]

    def _number(self, record: Mapping[str, Any]) -> int:
        """The number of what is in the folder; of a training that was never exchanged the next free one."""
        number = _entry(record).get("number")
        return number if type(number) is int and number > 0 else max(self._kept(), default=0) + 1

    def _parent(self, record: Mapping[str, Any]) -> int | None:
        parent = _entry(record).get("of")
        return parent if type(parent) is int else None

    def _described(self, place: Path, number: int, *, current: bool = False) -> Version:
        try:
            entry = _entry(read_record(place))
        except StorageError as error:
            return Version(number, current, None, "", f"damaged: {error}", {})
        comparison = entry.get("comparison")
        return Version(
            number,
            current,
            entry["of"] if type(entry.get("of")) is int else None,
            str(entry.get("time") or _saved(place)),
            str(entry.get("what") or _TRAINED),
            comparison if isinstance(comparison, dict) else {},
        )

    def _keep(self, number: int) -> None:
        """Copy what is in the folder among the kept versions."""
        make_private(self.folder.parent)
        make_folder(self.folder)
        self._sweep()
        record = read_record(self.model)
        if _entry(record).get("number") != number:
            # Before the copy: should what follows fail, the next attempt must find the same version here, not another.
            entry = {"number": number, "of": None, "time": _saved(self.model), "what": _TRAINED}
            with whole_file(self.model / RECORD) as temporary:
                temporary.write_text(json.dumps({**record, "version": entry}, indent=2) + "\n", encoding="utf-8")
        with whole_folder(self.folder / str(number)) as copy:
            for name in FILES:
                shutil.copy2(self.model / name, copy / name)

    def _forget(self, current: int, before: int, keep: int) -> None:
        """Remove the oldest versions beyond so many; what cannot be removed now is another time."""
        kept = sorted(set(self._kept()) - {current})
        for number in [number for number in kept if number != before][: max(0, len(kept) - keep)]:
            place = self.folder / str(number)
            retired = self.folder / f".{number}.old"
            with suppress(OSError):
                place.rename(retired)  # half of a version must never look like one
            shutil.rmtree(retired, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what kills left; nobody else writes here, as the folder's lock is held."""
        for left in [*self.folder.glob(".*.tmp"), *self.folder.glob(".*.old")]:
            shutil.rmtree(left, ignore_errors=True)


def onto(retriever: Retriever, catalogue: Catalogue) -> Retriever:
    """Move a retriever to other documents: those it knows keep their rows, new ones get one made from their text.

    Args:
        retriever: stays as it is.
        catalogue: the documents; their order may become another.
    """
    known = {document.doc_id: document for document in retriever.catalogue}
    other = [document for document in catalogue if known.get(document.doc_id) != document]
    gone = known.keys() - set(catalogue.ids)
    record, moved = retriever.record, retriever
    if other:
        moved = with_documents(moved, other, moved.encoder.encode([document.content for document in other]))
    if gone:
        moved = without_documents(moved, gone)
    if moved is not retriever:
        fresh = sum(document.doc_id not in known for document in other)
        counts = {"added": fresh, "replaced": len(other) - fresh, "removed": len(gone)}
        before = record.get("changes")
        earlier = before if isinstance(before, dict) else {}
        moved.record = {**record, "changes": {name: n + int(earlier.get(name, 0)) for name, n in counts.items()}}
    return moved


def _entry(record: Mapping[str, Any]) -> dict[str, Any]:
    entry = record.get("version")
    return entry if isinstance(entry, dict) else {}


def _origin(retriever: Retriever) -> dict[str, Any]:
    """What a record says of a training: documents come and go without it."""
    return {name: value for name, value in retriever.record.items() if name != "changes"}


def _saved(place: Path) -> str:
    """When a folder that does not say it was saved."""
    try:
        seconds = (place / RECORD).stat().st_mtime
    except OSError:
        return ""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
