"""Tensors and updates as Flower's records, and back."""

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from caravan.errors import FederationError
from caravan.federation.codec import Codec, Kind, add, subtract
from caravan.federation.rounds import Update, one_line

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Message, RecordDict

_EXAMPLES = "num-examples"  # where Flower's own strategies look for a client's weight


def encode(tensors: Mapping[str, Tensor]) -> "ArrayRecord":
    """Tensors in Flower's form."""
    from flwr.app import Array, ArrayRecord

    return ArrayRecord({name: Array(tensor.detach().cpu().contiguous().numpy()) for name, tensor in tensors.items()})


def decode(arrays: "ArrayRecord") -> dict[str, Tensor]:
    """Tensors out of Flower's form."""
    return {name: torch.from_numpy(array.numpy()) for name, array in arrays.items()}


def encode_update(update: Update) -> "RecordDict":
    """What a client sends.

    Raises:
        FederationError: it is no update, or cannot be sent as it is.
    """
    from flwr.app import MetricRecord, RecordDict

    if not isinstance(update, Update):
        raise FederationError(f"local_train returned {type(update).__name__}; return a rounds.Update")
    if type(update.examples) is not int:  # a bool or a NumPy number would not survive the journey
        raise FederationError(f"the example count is {update.examples!r}; a whole number from 1 on is needed")
    if _EXAMPLES in update.metrics:
        raise FederationError(f"a metric is named {_EXAMPLES}, which Flower reserves; rename it")
    metrics = {name: float(value) for name, value in update.metrics.items()}
    return RecordDict(
        {"arrays": encode(update.tensors), "metrics": MetricRecord({**metrics, _EXAMPLES: update.examples})}
    )


def pack_update(update: Update, start: "ArrayRecord", state: "RecordDict", words: Mapping[str, Any]) -> Update:
    """Have an update hold what changed since the round's start, packed as the server asks.

    Args:
        update: with the tensors after the training.
        start: the global tensors it began with.
        state: what Flower keeps for this client between rounds: what earlier packing has left over, a step of rounding
            at most.
        words: the server's: `codec`, and `seed` and `round`, which with the client's name decide how steps are rounded.
    """
    records = state.array_records
    residual = decode(records["residual"]) if "residual" in records else {}
    seed = zlib.crc32(f"{words['seed']}/{update.client}/{words['round']}".encode())
    packed, left = Codec(words["codec"]).encode(subtract(update.tensors, decode(start)), residual, seed)
    records["residual"] = encode(left)
    return replace(update, tensors=packed)


def decode_answer(
    client: str, reply: "Message", codec: Literal["none"] | Kind, reference: Mapping[str, Tensor]
) -> Update | str:
    """Read a client's reply: its update, or one line that says why there is none.

    Args:
        client: who should have sent it.
        reply: what came.
        codec: how its tensors are packed.
        reference: the global tensors at the round's start, to which a packed change is added.
    """
    if reply.has_error():
        return one_line(str(reply.error.reason))
    try:
        if "config" in reply.content.config_records:
            return one_line(str(reply.content.config_records["config"]["failure"]))
        metrics = dict(reply.content.metric_records["metrics"])
        examples = cast(int, metrics.pop(_EXAMPLES))
        tensors = decode(reply.content.array_records["arrays"])
        if codec != "none":
            tensors = add(reference, Codec(codec).decode(tensors, reference))
        return Update(client, tensors, examples, cast(dict[str, float], metrics))
    except FederationError as error:
        return one_line(str(error))
    except Exception as error:  # whatever a client sends, it must not end the run of the others
        return one_line(f"its reply cannot be read: {type(error).__name__}: {error}")


def content_bytes(content: "RecordDict") -> int:
    """Bytes of the tensors of a message, in NumPy's .npy format."""
    return sum(len(array.data) for arrays in content.array_records.values() for array in arrays.values())
