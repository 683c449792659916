"""Where a training stands, in one safetensors file, so that a killed run goes on as if nothing had happened."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from caravan.errors import StorageError
from caravan.files import whole_file


@dataclass
class Snapshot:
    """Tensors by name and plain JSON values that together say where a training stands."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


class Checkpoint:
    """One file that holds the latest snapshot of one run.

    Attributes:
        path: the file.
        fingerprint: names data and settings; a snapshot of other data or settings is refused.
    """

    def __init__(self, path: str | Path, fingerprint: str) -> None:
        self.path = Path(path)
        self.fingerprint = fingerprint

    def save(self, snapshot: Snapshot) -> None:
        """Replace the snapshot on disk; a kill at any moment leaves the old or the new one.

        Raises:
            StorageError: the file cannot be written.
        """
        header = {"fingerprint": self.fingerprint, "values": json.dumps(snapshot.values)}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in snapshot.tensors.items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{self.path.parent}: cannot be made: {error.strerror}; choose a writable place") from None
        with whole_file(self.path) as temporary:
            try:
                save_file(tensors, temporary, header)
            except SafetensorError as error:
                raise StorageError(f"{self.path}: cannot be written: {error}; choose a place with free space") from None

    def load(self) -> Snapshot | None:
        """Give the snapshot on disk, or None when there is none.

        Raises:
            StorageError: the file is damaged, or belongs to other data or settings.
        """
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                header: Mapping[str, str] = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
                values = json.loads(header.get("values", "null"))
        except (SafetensorError, OSError, ValueError) as error:
            raise StorageError(f"{self.path}: the checkpoint is damaged ({error}); start again without --resume") from None
        if header.get("fingerprint") != self.fingerprint:
            raise StorageError(f"{self.path}: the checkpoint is of other data or settings; repeat the command it was started with, or start again without --resume")
        return Snapshot(tensors, values)

    def clear(self) -> None:
        """Remove the snapshot."""
        self.path.unlink(missing_ok=True)
