"""Marks: which documents users called right or wrong for which queries, kept beside the folder of a retriever.

They lie in `NAME.feedback` beside it and not in it: saving a retriever replaces its folder, and would copy them, and
all kept versions, with every document that is added. `right.jsonl` and `wrong.jsonl` have a mark a line in the form of
a query file, so that the first is one that `caravan train` takes.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from caravan.data.formats import Columns, examples_from_rows
from caravan.data.tables import BadRows, Row
from caravan.errors import DataError, StorageError
from caravan.files import alone, whole_file
from caravan.model.retriever import Retriever

RIGHT, WRONG = "right.jsonl", "wrong.jsonl"
_COLUMNS = Columns("text", "label", None)


@dataclass(frozen=True, slots=True)
class Mark:
    """One judgement.

    Attributes:
        query: what was asked.
        doc_id: the document that was judged.
        right: whether it answers.
        time: when, ISO 8601, UTC, to the microsecond; "" where whoever wrote the line did not say.
        model: start of the hash of the weights that were served, see `weights_name`; "" where it is not said.
    """

    query: str
    doc_id: str
    right: bool
    time: str = ""
    model: str = ""


@dataclass(frozen=True)
class Marked:
    """All marks of a retriever.

    Attributes:
        marks: oldest first; one a pair of query and document, the newest.
        damaged: lines that are no marks, as `file, line N`; they are passed over and stay.
        doubled: pairs that a kill left in both files; the newer line counts.
    """

    marks: tuple[Mark, ...] = ()
    damaged: tuple[str, ...] = ()
    doubled: frozenset[tuple[str, str]] = frozenset()

    def find(self, query: str, doc_id: str) -> Mark | None:
        """The mark of a pair, or None."""
        return next((mark for mark in self.marks if (mark.query, mark.doc_id) == (query, doc_id)), None)


class Marks:
    """The marks beside one retriever; several threads and processes may write.

    A mark is on the disk before `add` returns. A kill in the middle of a line leaves that line unfinished; nobody was
    told that it is kept, and the next mark takes its place.

    Attributes:
        folder: where they lie; made with the first mark.
    """

    def __init__(self, model: str | Path) -> None:
        """Name the place.

        Args:
            model: the retriever's folder.
        """
        self.folder = feedback_folder(model)
        self._seen: tuple[object, Marked] = None, Marked()

    def add(self, mark: Mark) -> int:
        """Keep a mark; one of the same pair that says otherwise is removed, one that says the same stays.

        Returns:
            How many marks there are.

        Raises:
            DataError: query or id are empty or no text, so that no training could read them.
            StorageError: it cannot be written (disk full, no right); then nothing changed.
        """
        row = Row("mark", 1, {"text": mark.query, "label": mark.doc_id})
        list(examples_from_rows([row], _COLUMNS, BadRows(), split="marks", known=None))
        own, other = (RIGHT, WRONG) if mark.right else (WRONG, RIGHT)
        with self._writing():
            marked = self.read()
            before = marked.find(mark.query, mark.doc_id)
            if before is None or before.right != mark.right:
                self._append(own, _line(mark))
            if before is not None and (before.right != mark.right or (mark.query, mark.doc_id) in marked.doubled):
                self._remove(other, mark.query, mark.doc_id)
            if before is None and not marked.damaged:  # known without reading all of them again
                self._seen = self._stamp(), replace(marked, marks=(*marked.marks, mark))
            return len(self.read().marks)

    def take_back(self, query: str, doc_id: str) -> int | None:
        """Remove a mark from the disk.

        Returns:
            How many are left; None where there was none of this pair.

        Raises:
            StorageError: it cannot be written.
        """
        if not self.folder.is_dir():
            return None
        with self._writing():
            if self.read().find(query, doc_id) is None:
                return None
            for name in (RIGHT, WRONG):
                self._remove(name, query, doc_id)
            return len(self.read().marks)

    def read(self) -> Marked:
        """Read all marks; cheap where nothing changed since the last time.

        Raises:
            StorageError: a file cannot be read.
        """
        stamp = self._stamp()
        if self._seen[0] != stamp:
            self._seen = stamp, self._read()
        return self._seen[1]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        make_private(self.folder)
        with alone(self.folder):
            yield

    def _stamp(self) -> object:
        found: list[object] = []
        for name in (RIGHT, WRONG):
            with suppress(OSError):
                status = (self.folder / name).stat()
                found.append((name, status.st_ino, status.st_size, status.st_mtime_ns))
        return found

    def _read(self) -> Marked:
        newest: dict[tuple[str, str], Mark] = {}
        damaged: list[str] = []
        doubled: set[tuple[str, str]] = set()
        for name in (RIGHT, WRONG):
            for number, line in enumerate(self._lines(name), start=1):
                mark = _parsed(line, right=name == RIGHT)
                if mark is None:
                    damaged += [f"{self.folder / name}, line {number}"] if line.strip() else []
                    continue
                pair = mark.query, mark.doc_id
                before = newest.get(pair)
                if before is not None and before.right != mark.right:
                    doubled.add(pair)
                if before is None or mark.time >= before.time:
                    newest[pair] = mark
        marks = tuple(sorted(newest.values(), key=lambda mark: mark.time))
        return Marked(marks, tuple(damaged), frozenset(doubled))

    def _lines(self, name: str) -> list[bytes]:
        path = self.folder / name
        try:
            return path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(f"{path}: cannot be read: {error.strerror}; check the file and its rights") from None

    def _append(self, name: str, line: bytes) -> None:
        path = self.folder / name
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise _cannot_keep(path, error) from None
        try:
            end = os.fstat(handle).st_size
            try:
                if end and os.pread(handle, 1, end - 1) != b"\n":
                    end -= self._torn(name)
                os.ftruncate(handle, end)
                line = line if not end or os.pread(handle, 1, end - 1) == b"\n" else b"\n" + line
                written = 0
                while written < len(line):
                    written += os.pwrite(handle, line[written:], end + written)
                os.fsync(handle)
            except OSError as error:
                with suppress(OSError):  # a line that is not whole is passed over by readers, too
                    os.ftruncate(handle, min(end, os.fstat(handle).st_size))
                raise _cannot_keep(path, error) from None
        finally:
            os.close(handle)

    def _torn(self, name: str) -> int:
        """Bytes after a file's last whole line: what a kill left of a line that was promised to nobody."""
        last = self._lines(name)[-1]
        return 0 if _parsed(last, right=True) is not None else len(last)

    def _remove(self, name: str, query: str, doc_id: str) -> None:
        """Write a file anew without the lines of a pair; damaged lines stay as they are."""
        lines = self._lines(name)
        kept = [line for line in lines if not _is_of(_parsed(line, right=True), query, doc_id)]
        if len(kept) < len(lines):
            with whole_file(self.folder / name) as temporary:
                temporary.write_bytes(b"".join(kept))


def feedback_folder(model: str | Path) -> Path:
    """Where marks and kept versions of a retriever lie: `NAME.feedback`, beside what its folder really is."""
    place = Path(os.path.realpath(model))
    return place.with_name(f"{place.name}.feedback")


def weights_name(retriever: Retriever) -> str:
    """The first 16 hex digits of the SHA-256 of all trained tensors: the same for the same weights and rows."""
    digest = hashlib.sha256()
    for name, parameter in retriever.named_trainables():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def now() -> str:
    """The time as marks and versions have it."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def make_private(folder: Path) -> None:
    """Make a folder that only its owner may look into: marks hold queries."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise _cannot_keep(folder, error) from None


def _line(mark: Mark) -> bytes:
    values = {"text": mark.query, "label": mark.doc_id, "time": mark.time, "model": mark.model}
    return json.dumps(values).encode("ascii") + b"\n"


def _parsed(line: bytes, *, right: bool) -> Mark | None:
    try:
        value = json.loads(line)
        cells = [value["text"], value["label"], value.get("time", ""), value.get("model", "")]
        row = Row("mark", 1, {"text": cells[0], "label": cells[1]})
        list(examples_from_rows([row], _COLUMNS, BadRows(), split="marks", known=None))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, DataError):
        return None
    return Mark(cells[0], cells[1], right, cells[2], cells[3]) if all(isinstance(cell, str) for cell in cells) else None


def _is_of(mark: Mark | None, query: str, doc_id: str) -> bool:
    return mark is not None and (mark.query, mark.doc_id) == (query, doc_id)


def _cannot_keep(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path}: cannot be written: {error.strerror}; free space, or check the rights")
