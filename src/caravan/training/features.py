"""Vectors of texts under a frozen encoder, computed once and kept on disk by content."""

import hashlib
import logging
import os
import sqlite3
from collections.abc import Callable, Sequence
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
            texts: B strings.
            progress: called with the number of texts done since the last call.

        Returns:
            float32 (B, H) on the encoder's device, the same numbers whether cached or not.
        """
        vectors = np.empty((len(texts), encoder.width), dtype=np.float32)
        keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts]
        found = self._read(encoder, keys)
        missing: dict[bytes, int] = {}
        for index, key in enumerate(keys):
            if key in found:
                vectors[index] = found[key]
            else:
                missing.setdefault(key, index)
        if progress is not None:
            progress(len(texts) - len(missing))
        # Neighbours in length share a batch, so sort before cutting into chunks.
        order = sorted(missing, key=lambda key: len(texts[missing[key]]))
        for start in range(0, len(order), _CHUNK):
            chunk = order[start : start + _CHUNK]
            fresh = encoder.encode([texts[missing[key]] for key in chunk], progress=progress).cpu().numpy()
            computed = dict(zip(chunk, fresh, strict=True))
            self._write(encoder, computed)
            found.update(computed)
        for index, key in enumerate(keys):
            vectors[index] = found[key]
        return torch.from_numpy(vectors).to(encoder.device)

    def _file(self, encoder: Encoder) -> Path | None:
        return None if self.folder is None else self.folder / f"features-{encoder.key()[:32]}.sqlite"

    def _read(self, encoder: Encoder, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        path = self._file(encoder)
        if path is None or not path.is_file():
            return {}
        found: dict[bytes, np.ndarray] = {}
        wanted = list(dict.fromkeys(keys))
        try:
            with closing(sqlite3.connect(path, timeout=60)) as base:
                for start in range(0, len(wanted), _LOOKUP):
                    part = wanted[start : start + _LOOKUP]
                    marks = ",".join("?" * len(part))
                    query = f"SELECT key, vector FROM features WHERE key IN ({marks})"
                    for key, blob in base.execute(query, part):
                        vector = np.frombuffer(blob, dtype=np.float32)
                        if vector.shape == (encoder.width,) and np.isfinite(vector).all():
                            found[key] = vector
        except sqlite3.Error as error:
            logger.warning("%s: the feature cache cannot be read (%s); computing anew", path, error)
            if isinstance(error, sqlite3.DatabaseError) and "not a database" in str(error):
                path.unlink(missing_ok=True)
            return {}
        return found

    def _write(self, encoder: Encoder, vectors: dict[bytes, np.ndarray]) -> None:
        path = self._file(encoder)
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(path, timeout=60)) as base, base:
                base.execute("CREATE TABLE IF NOT EXISTS features (key BLOB PRIMARY KEY, vector BLOB NOT NULL) WITHOUT ROWID")
                rows = [(key, np.ascontiguousarray(vector).tobytes()) for key, vector in vectors.items()]
                base.executemany("INSERT OR REPLACE INTO features VALUES (?, ?)", rows)
        except (sqlite3.Error, OSError) as error:
            logger.warning("%s: the feature cache cannot be written (%s); going on without", path, error)
