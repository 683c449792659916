"""The way down: what the clients of a round begin with, and in which form each of them gets it."""

import zlib
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING
from uuid import uuid4

import torch
from torch import Tensor

from caravan.config import FederationConfig
from caravan.errors import FederationError
from caravan.federation.codec import Codec, add, subtract
from caravan.federation.messages import encode

if TYPE_CHECKING:
    from flwr.app import ArrayRecord

_ROW_TENSORS = frozenset({"head.rows", "head.bias"})  # of a head: one row or number a document


class Broadcast:
    """What a server sends at a round's start.

    Without a codec, whole tensors: its own. With one, all clients that are up to date hold the same tensors, `start`;
    they get what the last round changed, packed, and everybody else gets `start` whole, as float32. What packing leaves
    unsent is the server's residual, and its own tensors are `start` and the residual (see `codec`).

    Attributes:
        codec: how changes are packed, both ways; None: tensors are sent whole.
        start: what the clients of the next round begin with.
    """

    def __init__(self, tensors: Mapping[str, Tensor], settings: FederationConfig, *, seed: int) -> None:
        """Begin with everybody holding nothing.

        Raises:
            FederationError: a tensor cannot be packed.
        """
        self.codec = None
        if settings.codec != "none":
            sparse = _ROW_TENSORS.intersection(tensors) if settings.sparse_rows else frozenset[str]()
            self.codec = Codec(settings.codec, sparse)
            for name, tensor in tensors.items():
                if tensor.dtype != torch.float32:
                    raise FederationError(
                        f'tensor {name} is {tensor.dtype}, federation.codec = "{settings.codec}" packs float32 only; '
                        'make it float32, or set codec = "none"'
                    )
        self.start = dict(tensors)
        self._seed = seed
        self._run = uuid4().hex  # not from the seed: a resumed run or another stage must not take up what nodes hold
        self._residual: dict[str, Tensor] = {}
        self._whole: ArrayRecord | None = None
        self._change: ArrayRecord | None = None
        self._holders: set[str] = set()

    def words(self, number: int) -> dict[str, str | int | list[str]]:
        """What a client must know to read round `number`'s tensors and to pack its own."""
        if self.codec is None:
            return {"codec": "none"}
        version = {"run": self._run, "version": number}
        return {"codec": self.codec.kind, "sparse": sorted(self.codec.sparse), "seed": self._seed, **version}

    def arrays_for(self, client: str) -> "dict[str, ArrayRecord]":
        """The record that brings a client to the round's start: "change" where it holds the last one's, else "arrays".

        A client that is asked a second time gets "arrays": whether it has taken the change in is not known.
        """
        if self._change is not None and client in self._holders:
            self._holders.remove(client)
            return {"change": self._change}
        if self._whole is None:
            self._whole = encode(self.start)
        return {"arrays": self._whole}

    def advance(self, number: int, combined: Mapping[str, Tensor], used: Collection[str]) -> dict[str, Tensor]:
        """End a round.

        Args:
            number: the round's.
            combined: what its updates to `start` were joined to.
            used: the clients whose updates were; they hold `start`. Of others that is not known.

        Returns:
            The server's own tensors.
        """
        self._whole = None
        if self.codec is None:
            self.start = dict(combined)
            return self.start
        seed = zlib.crc32(f"{self._seed}//{number}".encode())  # no client has an empty name
        packed, self._residual = self.codec.encode(subtract(combined, self.start), self._residual, seed)
        self.start = add(self.start, self.codec.decode(packed, self.start))
        self._change, self._holders = encode(packed), set(used)
        residual = self._residual
        return {name: tensor + residual[name] if name in residual else tensor for name, tensor in self.start.items()}
