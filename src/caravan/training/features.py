"""Vectors of texts under a frozen encoder, computed once and kept on disk by content."""

import hashlib
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import platformdirs
import torch
from torch import Tensor

from caravan.model.encoder import Encoder

logger = logging.getLogger(__name__)

_LOOKUP = 500  # below SQLite's limit on the variables of one statement
_CHUNK = 2048  # texts encoded between two writes: what a kill can cost
_WAIT_SECONDS = 5.0  # for another process's write, which takes milliseconds
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def default_cache() -> Path:
    """Where vectors are kept: $CARAVAN_CACHE, else the user's cache folder."""
    return Path(os.environ.get("CARAVAN_CACHE") or platformdirs.user_cache_dir("caravan"))


class FeatureStore:
    """A table from (encoder key, text) to vector, in one SQLite file an encoder.

    It holds hashes of texts, never texts. A cache that cannot be read or written is a slower run, not an error: it is
    logged, and the vectors are computed.

    Attributes:
        folder: where the files are, or None to keep nothing.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder is not None else None

    def encode(
        self, encoder: Encoder, texts: Sequence[str], *, progress: Callable[[int], None] | None = None
    ) -> Tensor:
        """Give the vectors of texts, from disk where they are there.

        Args:
            encoder: the encoder; its `key()` names what it computes.
            texts: B strings; each distinct one is encoded once.
            progress: called with the number of texts done since the last call.

        Returns:
            float32 (B, H) on the encoder's device. What comes from disk is what was computed, bit for bit; what is
            computed depends in the last bits on which texts share a batch, as everywhere.

        Raises:
            DataError: a text is empty.
        """
        vectors = np.empty((len(texts), encoder.width), dtype=np.float32)
        places: dict[bytes, list[int]] = {}
        for place, text in enumerate(texts):
            places.setdefault(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(), []).append(place)
        table = None if self.folder is None else _Table(self.folder / f"features-{encoder.key()[:32]}.sqlite")
        missing = dict.fromkeys(places)
        for key, vector in table.read(missing, encoder.width) if table else ():
            vectors[places[key]] = vector
            missing.pop(key, None)
        if progress is not None:
            progress(len(texts) - len(missing))
        # Neighbours in length share a batch, so sort before cutting into chunks.
        order = sorted(missing, key=lambda key: len(texts[places[key][0]]))
        for start in range(0, len(order), _CHUNK):
            chunk = order[start : start + _CHUNK]
            fresh = encoder.encode([texts[places[key][0]] for key in chunk], progress=progress).cpu().numpy()
            for key, vector in zip(chunk, fresh, strict=True):
                vectors[places[key]] = vector
            if table:
                table.write(zip(chunk, fresh, strict=True))
        return torch.from_numpy(vectors).to(encoder.device)


class _Table:
    """One SQLite file; after the first fault it is let alone, so that a run waits and complains only once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.usable = True

    def read(self, keys: Iterable[bytes], width: int) -> Iterator[tuple[bytes, np.ndarray]]:
        """Yield the sound vectors, float32 (width,), of those keys that are there."""
        wanted, damaged = list(keys), 0
        try:
            if not self.path.exists():
                return
            with closing(sqlite3.connect(self.path, timeout=_WAIT_SECONDS)) as base:
                base.text_factory = bytes  # a damaged value may be called text and be none
                if not base.execute("SELECT 1 FROM sqlite_master WHERE name = 'features'").fetchone():
                    return
                for start in range(0, len(wanted), _LOOKUP):
                    part = wanted[start : start + _LOOKUP]
                    marks = ",".join("?" * len(part))
                    for key, blob in base.execute(f"SELECT key, vector FROM features WHERE key IN ({marks})", part):
                        vector = _unpack(key, blob, width)
                        if vector is None:
                            damaged += 1
                        else:
                            yield key, vector
        except (sqlite3.Error, OSError) as error:
            self._give_up("read", error)
        if damaged:
            logger.warning("%s: %d damaged entries of the feature cache; computing them anew", self.path, damaged)

    def write(self, vectors: Iterable[tuple[bytes, np.ndarray]]) -> None:
        """Keep vectors (float32) by key."""
        if not self.usable:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=_WAIT_SECONDS)) as base, base:
                base.execute(
                    "CREATE TABLE IF NOT EXISTS features (key BLOB PRIMARY KEY, vector BLOB NOT NULL) WITHOUT ROWID"
                )
                rows = ((key, _pack(key, vector)) for key, vector in vectors)
                base.executemany("INSERT OR REPLACE INTO features VALUES (?, ?)", rows)
        except (sqlite3.Error, OSError) as error:
            self._give_up("written", error)

    def _give_up(self, what: str, error: Exception) -> None:
        self.usable = False
        logger.warning("%s: the feature cache cannot be %s (%s); going on without", self.path, what, error)
        if isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", None) in _DAMAGED:
            self._remove()

    def _remove(self) -> None:
        # With its journal: SQLite would play that back into the next file of this name.
        for path in (self.path, self.path.with_name(f"{self.path.name}-journal")):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s: the damaged feature cache cannot be removed (%s)", path, error)
            else:
                self.usable = True


def _pack(key: bytes, vector: np.ndarray) -> bytes:
    numbers = np.ascontiguousarray(vector, dtype=np.float32).tobytes()
    return numbers + _checksum(key, numbers)


def _unpack(key: object, blob: object, width: int) -> np.ndarray | None:
    """Give the vector, float32 (width,), or None where the entry is not what `_pack` made."""
    size = 4 * width
    if not isinstance(key, bytes) or not isinstance(blob, bytes) or blob[size:] != _checksum(key, blob[:size]):
        return None
    return np.frombuffer(blob, dtype=np.float32, count=width)


def _checksum(key: bytes, numbers: bytes) -> bytes:
    # SQLite does not notice a changed byte inside a value.
    return hashlib.blake2b(numbers, key=key, digest_size=8).digest()
