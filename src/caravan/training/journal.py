"""An append-only file of JSON lines that shows when it was changed or shortened, whatever kills its writers.

Each line carries a hash of all lines before it, and `head.json` beside the file how many lines there are at least, and
their hash. A line is on the disk, and the head after it, before `append` returns. So what a kill or a full disk leaves
of a line that is not whole was never told to anybody: it stays where it is, and the next line is written behind it.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caravan.errors import PrivacyError

RESTORE = "restore the ledger's folder from a backup of its latest state"


@dataclass(frozen=True)
class Lines:
    """What a journal holds.

    Attributes:
        values: of each whole line.
        count: lines, whole or not.
        chain: hash of them all.
        torn: whether the last one has no end.
    """

    values: tuple[dict[str, Any], ...]
    count: int
    chain: str
    torn: bool


@dataclass(frozen=True)
class Journal:
    """The journal in a folder; but for `exists`, everything needs `locked` around it."""

    folder: Path

    @property
    def place(self) -> Path:
        """Its lines."""
        return self.folder / "ledger.jsonl"

    @property
    def head(self) -> Path:
        """What is known of the lines."""
        return self.folder / "head.json"

    def exists(self) -> bool:
        """Whether one was begun here."""
        return self.head.exists() or self.place.exists()

    def begin(self) -> None:
        """Write the head of a journal without lines."""
        self._write_head(0, _chained("", b""))

    def read(self) -> Lines:
        """Read all lines.

        Raises:
            PrivacyError: a line was changed or added, or lines are gone.
        """
        content = self.place.read_bytes() if self.place.exists() else b""
        pieces = content.split(b"\n")
        torn = pieces[-1] != b""
        lines = pieces if torn else pieces[:-1]
        known, known_chain = self._read_head()
        chain, values = _chained("", b""), []
        found = known == 0 and known_chain == chain
        for number, line in enumerate(lines, 1):
            value = self._parsed(line, number, chain)
            if value is not None:
                values.append(value)
            chain = _chained(chain, line)
            found |= known == number and known_chain == chain
        if not found:
            what = f"does not begin with the {known:,} lines that were written"
            raise PrivacyError(f"{self.place}: was changed: it {what} ({len(lines):,} are there); {RESTORE}")
        return Lines(tuple(values), len(lines), chain, torn)

    def append(self, lines: Lines, value: dict[str, Any]) -> None:
        """Write one more line, behind those that were read under the same lock.

        Raises:
            PrivacyError: the disk does not take it.
        """
        line = json.dumps({**value, "previous": lines.chain}).encode("ascii")
        whole = (b"\n" if lines.torn else b"") + line + b"\n"
        handle = os.open(self.place, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            if os.write(handle, whole) != len(whole):
                raise PrivacyError(f"{self.place}: the disk did not take the entry; free some space")
            os.fsync(handle)
        finally:
            os.close(handle)
        self._write_head(lines.count + 1, _chained(lines.chain, line))

    @contextmanager
    def locked(self, *, make: bool = False) -> Iterator[None]:
        """Keep every other process and thread away, and tell what the system reports as an error of ours.

        Args:
            make: make the folder if it is not there.

        Raises:
            PrivacyError: the folder is not there, or cannot be used.
        """
        try:
            import fcntl
        except ImportError:
            raise PrivacyError(
                "a privacy ledger needs file locks (fcntl), which this system lacks; use Linux"
            ) from None
        try:
            if make:
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                yield
            finally:
                os.close(handle)  # which unlocks
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise PrivacyError(f"{self.folder}: the privacy ledger cannot be used: {reason}; see to it") from None

    def _parsed(self, line: bytes, number: int, chain: str) -> dict[str, Any] | None:
        """What a line holds; None for the beginning of one."""
        try:
            value = json.loads(line)
        except ValueError:
            return None
        if not isinstance(value, dict) or value.pop("previous", None) != chain:
            what = "it or what stands before it was changed, added or removed"
            raise PrivacyError(f"{self.place}, line {number}: {what}; {RESTORE}")
        return value

    def _read_head(self) -> tuple[int, str]:
        try:
            known = json.loads(self.head.read_bytes())
            return int(known["lines"]), str(known["hash"])
        except (FileNotFoundError, KeyError, TypeError, ValueError):
            raise PrivacyError(f"{self.head}: is lost or damaged; {RESTORE}") from None

    def _write_head(self, lines: int, chain: str) -> None:
        replace_file(self.head, json.dumps({"lines": lines, "hash": chain}).encode("ascii"))


def replace_file(place: Path, content: bytes) -> None:
    """Write a file that nobody else may read, whole or not at all; two at once need a lock around it."""
    temporary = place.with_name(f"{place.name}.tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(place)
    handle = os.open(place.parent, os.O_RDONLY)  # its names
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _chained(chain: str, line: bytes) -> str:
    return hashlib.sha256(chain.encode("ascii") + line).hexdigest()
