"""Where a training stands, in one safetensors file, so that a killed run goes on as if nothing had happened."""

import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from caravan.errors import StorageError
from caravan.files import make_folder, remove_leftovers, whole_file


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
        make_folder(self.path.parent)
        try:
            with whole_file(self.path) as temporary:
                save_file(tensors, temporary, header)
        except StorageError:
            with suppress(OSError):  # only an empty folder goes
                self.path.parent.rmdir()
            raise

    def load(self) -> Snapshot | None:
        """Give the snapshot on disk, or None when there is none.

        Raises:
            StorageError: the file is damaged, or belongs to other data or settings.
        """
        try:
            if not self.path.exists():
                return None
            with safe_open(self.path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("fingerprint") != self.fingerprint:
                    raise self.refusal("it is of other data or settings")
                values = json.loads(header["values"])
                # Clones, because the originals are a view of a file that the next save replaces.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise StorageError(
                f"{self.path}: the checkpoint is damaged or cannot be read ({_one_line(error)}); "
                "start again without --resume"
            ) from None
        return Snapshot(tensors, values)

    def refusal(self, reason: str) -> StorageError:
        """Make the error that says why the snapshot cannot be taken up by the training at hand."""
        return StorageError(
            f"{self.path}: the checkpoint cannot be taken up: {reason}; repeat the command it was started with, "
            "or start again without --resume"
        )

    def clear(self) -> None:
        """Remove the snapshot, if there is one, and what a kill in the middle of a save left.

        Raises:
            StorageError: it cannot be removed.
        """
        remove_leftovers(self.path)
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be removed: {error.strerror}; remove it yourself") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
