"""What a client keeps between its rounds: the tensors that it holds, and what its packing has left over."""

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from caravan.errors import FederationError
from caravan.federation.codec import Codec, add, subtract
from caravan.federation.messages import decode, decode_change, encode
from caravan.federation.rounds import Update

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, RecordDict

# The simulated clients of one process hold equal tensors: they are in memory once, for as long as one holds them.
_records: "WeakValueDictionary[tuple[str, int], ArrayRecord]" = WeakValueDictionary()


class LackingError(FederationError):
    """A change came to a client that has not the tensors it applies to; whole ones repair it."""


def receive(content: "RecordDict", state: "RecordDict") -> "ArrayRecord":
    """Take a round's start out of the server's message; where changes are sent, remember it for the next one.

    Args:
        content: of the message. The record "arrays" holds whole tensors, the record "change" what changed in those of
            the version before; a version is the server's run and the number of the round that starts with it.
        state: what Flower keeps for this client while its node runs.

    Returns:
        The tensors to train from.

    Raises:
        LackingError: only a change came, and the client does not hold the version before.
        FederationError: the change cannot be read.
    """
    from flwr.app import ConfigRecord

    words = content.config_records["config"]
    if words["codec"] == "none":
        return content.array_records["arrays"]
    run, version = str(words["run"]), int(words["version"])  # pyright: ignore[reportArgumentType]
    held = dict(state.config_records.get("held", {}))
    if held.get("run") != run:  # another run or stage: what is left of its packing belongs to other tensors
        held = {}
        for name in ("residual", "tensors"):
            state.pop(name, None)
    if "arrays" in content.array_records:
        arrays = _records[run, version] = content.array_records["arrays"]
    elif held.get("version") != version - 1:
        raise LackingError(f"it does not hold the tensors that round {version} changes; send them whole")
    elif (known := _records.get((run, version))) is not None:
        arrays = known
    else:
        before = decode(state.array_records["tensors"])
        change = decode_change(content.array_records["change"], _codec(words), before)
        arrays = _records[run, version] = encode(add(before, change))
    state["tensors"] = arrays
    state["held"] = ConfigRecord({"run": run, "version": version})
    return arrays


def pack_update(update: Update, start: "ArrayRecord", state: "RecordDict", words: Mapping[str, Any]) -> Update:
    """Have an update hold what changed since the round's start, packed as the server asks.

    Args:
        update: with the tensors after the training.
        start: what `receive` gave.
        state: what Flower keeps for this client: what earlier packing has left over, a step of rounding at most.
        words: the server's: the codec, and `seed` and `round`, which with the client's name decide how steps are
            rounded.

    Raises:
        FederationError: the tensors are not those of the start, or not finite.
    """
    residual = decode(state.array_records["residual"]) if "residual" in state else {}
    seed = zlib.crc32(f"{words['seed']}/{update.client}/{words['round']}".encode())
    packed, left = _codec(words).encode(subtract(update.tensors, decode(start)), residual, seed)
    state["residual"] = encode(left)
    return replace(update, tensors=packed)


def _codec(words: Mapping[str, Any]) -> Codec:
    return Codec(words["codec"], frozenset(words["sparse"]))
