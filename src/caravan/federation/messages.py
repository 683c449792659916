"""Tensors and updates as Flower's records, and back."""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from caravan.errors import FederationError
from caravan.federation.codec import Codec, add
from caravan.federation.rounds import Update, one_line

if TYPE_CHECKING:
    from flwr.app import Array, ArrayRecord, Message, RecordDict
    from numpy.typing import NDArray

_EXAMPLES = "num-examples"  # where Flower's own strategies look for a client's weight
_LACKS = "lacks"  # stands in a failure of a client that has not the tensors a change applies to

# What np.save writes of the dtypes that travel (.npy format 1.0), and nothing else of what np.load would read.
_HEADER = re.compile(
    rb"\{'descr': '([<|][a-z]\d)', 'fortran_order': False, 'shape': \(((?:\d{1,18}, ?)*\d{0,18})\), \} *\n"
)
_DTYPES = {b"<f8": "float64", b"<f4": "float32", b"<f2": "float16", b"|i1": "int8", b"<i4": "int32"}
_MAGIC = b"\x93NUMPY\x01\x00"
_MOST_DIMENSIONS, _MOST_NUMBERS = 32, 2**56  # NumPy's own bounds, or less: it does not count a 0 among the sizes


def encode(tensors: Mapping[str, Tensor]) -> "ArrayRecord":
    """Tensors in Flower's form."""
    from flwr.app import Array, ArrayRecord

    return ArrayRecord({name: Array(tensor.detach().cpu().contiguous().numpy()) for name, tensor in tensors.items()})


def decode(arrays: "ArrayRecord", most_bytes: int | None = None) -> dict[str, Tensor]:
    """Tensors out of Flower's form; the arrays may come from anyone.

    Args:
        arrays: what `encode` gave, or what somebody claims to be that.
        most_bytes: of all numbers together; None: no bound but that of what was received.

    Returns:
        New tensors on the CPU, in the record's order.

    Raises:
        FederationError: an array is no such tensor, says another form outside than in its header, holds fewer or more
            bytes than that form needs, or all hold too many. Nothing is allocated before that is known.
    """
    views = {name: _view(name, array) for name, array in arrays.items()}
    if most_bytes is not None and (total := sum(view.nbytes for view in views.values())) > most_bytes:
        raise FederationError(
            f"its tensors hold {total} bytes, at most {most_bytes} are expected; train as the server asks"
        )
    return {name: torch.from_numpy(view.copy()) for name, view in views.items()}


def _view(name: str, array: "Array") -> "NDArray[np.generic]":
    """An array's numbers where they lie, read-only."""
    data = array.data
    end = 10 + int.from_bytes(data[8:10], "little")
    header = _HEADER.fullmatch(data[10:end]) if data[:8] == _MAGIC else None
    if header is None or header[1] not in _DTYPES:
        raise _refused(name, "is no plain tensor in NumPy's .npy format 1.0")
    dtype, shape = np.dtype(_DTYPES[header[1]]), tuple(int(size) for size in header[2].split(b",") if size.strip())
    if (array.stype, array.dtype, tuple(array.shape)) != ("numpy.ndarray", str(dtype), shape):
        raise _refused(name, "says another dtype or shape than its header")
    too_large = len(shape) > _MOST_DIMENSIONS or math.prod(size or 1 for size in shape) > _MOST_NUMBERS
    if too_large or math.prod(shape) * dtype.itemsize != len(data) - end:
        raise _refused(name, f"holds {len(data) - end} bytes, which is not what its header says")
    return np.ndarray(shape, dtype, buffer=data, offset=end)


def encode_update(update: Update) -> "RecordDict":
    """What a client sends.

    Raises:
        FederationError: it is no update, or cannot be sent as it is.
    """
    from flwr.app import MetricRecord, RecordDict

    if not isinstance(update, Update):
        raise FederationError(f"local_train returned {type(update).__name__}; return a rounds.Update")
    if type(update.examples) is not int or update.examples >= 2**63:  # a bool or a NumPy number would not survive it
        raise FederationError(f"the example count is {update.examples!r}; a whole number from 1 to 2**53 is needed")
    if _EXAMPLES in update.metrics:
        raise FederationError(f"a metric is named {_EXAMPLES}, which Flower reserves; rename it")
    metrics = {name: float(value) for name, value in update.metrics.items()}
    return RecordDict(
        {"arrays": encode(update.tensors), "metrics": MetricRecord({**metrics, _EXAMPLES: update.examples})}
    )


def encode_failure(reason: str, *, lacks: bool) -> "RecordDict":
    """What a client sends that has no update: one line why; and whether it is that it needs the tensors whole."""
    from flwr.app import ConfigRecord, RecordDict

    return RecordDict({"config": ConfigRecord({"failure": reason, **({_LACKS: True} if lacks else {})})})


def needs_whole_tensors(reply: "Message") -> bool:
    """Whether a client says that it has not the tensors which the change it was sent applies to."""
    return reply.has_content() and _LACKS in reply.content.config_records.get("config", {})


def decode_answer(client: str, reply: "Message", codec: Codec | None, reference: Mapping[str, Tensor]) -> Update | str:
    """Read a client's reply: its update, or one line that says why there is none.

    Args:
        client: who should have sent it.
        reply: what came.
        codec: how its tensors are packed; None: they are whole.
        reference: the tensors at the round's start, to which a packed change is added.
    """
    if reply.has_error():
        return one_line(str(reply.error.reason))
    try:
        if "config" in reply.content.config_records:
            return one_line(str(reply.content.config_records["config"]["failure"]))
        metrics = dict(reply.content.metric_records["metrics"])
        examples = cast(int, metrics.pop(_EXAMPLES))
        arrays = reply.content.array_records["arrays"]
        if codec is None:
            # Room for the widest dtype: where it is merely the wrong one, that is to be said.
            tensors = decode(arrays, sum(8 * tensor.numel() for tensor in reference.values()))
        else:
            tensors = add(reference, decode_change(arrays, codec, reference))
        return Update(client, tensors, examples, cast(dict[str, float], metrics))
    except FederationError as error:
        return one_line(str(error))
    except Exception as error:  # whatever a client sends, it must not end the run of the others
        return one_line(f"its reply cannot be read: {type(error).__name__}: {error}")


def decode_change(arrays: "ArrayRecord", codec: Codec, reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Unpack a change to the reference, which may come from anyone.

    Raises:
        FederationError: see `decode` and `Codec.decode`.
    """
    most = codec.expected_bytes({name: tensor.shape for name, tensor in reference.items()})
    return codec.decode(decode(arrays, most), reference)


def content_bytes(content: "RecordDict") -> int:
    """Bytes of a message's content as Flower sends it: tensors in NumPy's .npy format, names, words, metrics, hashes.

    Counted to a few bytes a tensor, without the hashing that Flower does before it sends: its own serialisation is
    asked about a copy in which every tensor is a few bytes long, and the tensors' own bytes are added. The envelope, a
    few hundred bytes a message, and HTTP's and TLS's frames are not in it.
    """
    from flwr.app import Array, ArrayRecord, RecordDict
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

    hollow, payload = RecordDict(), 0
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            payload += sum(len(array.data) for array in record.values())
            record = ArrayRecord(
                {  # distinct: of equal objects Flower would send one
                    inner: Array(array.dtype, tuple(array.shape), array.stype, b"%d" % place)
                    for place, (inner, array) in enumerate(record.items())
                }
            )
        hollow[name] = record
    objects = sum(len(each.deflate()) for each in get_all_nested_objects(hollow).values())
    return payload + objects + get_object_tree(hollow).ByteSize()


def _refused(name: str, reason: str) -> FederationError:
    return FederationError(f"tensor {name[:80]!r} {reason}; send what np.save writes of float or int tensors")
