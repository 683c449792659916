"""Tensors as Flower's records: what is read, and what hostile arrays come to."""

import io
import tracemalloc

import numpy as np
import pytest
import torch

from caravan.errors import FederationError
from caravan.federation.messages import decode, encode
from toy_federation import assert_same_bits

TENSORS = {
    "matrix": torch.arange(6.0).reshape(2, 3),
    "vector": torch.tensor([1.5, -0.0]),
    "one": torch.tensor([7], dtype=torch.int32),
    "scalar": torch.tensor(0.25, dtype=torch.float64),
    "steps": torch.tensor([[-127], [127]], dtype=torch.int8),
    "half": torch.ones(1, 1, 2, dtype=torch.float16),
    "none": torch.zeros(0, 4),
}


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def header(text: str, data: bytes = b"\0" * 8) -> bytes:
    """An .npy file with any header."""
    body = text.encode("latin1") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body + data


def spelled(descr: str = "'<f4'", shape: str = "(2,)", order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


def hostile(data: bytes, dtype: str = "float32", shape: tuple[int, ...] = (2,), stype: str = "numpy.ndarray"):
    from flwr.app import Array, ArrayRecord

    return ArrayRecord({"head": Array(dtype, shape, stype, data)})


def test_tensors_come_back_bit_for_bit_and_may_be_written_to():
    decoded = decode(encode(TENSORS))
    assert_same_bits(decoded, TENSORS)
    for tensor in decoded.values():
        tensor.zero_()
    assert_same_bits(decode(encode(TENSORS)), TENSORS)


def test_a_header_of_the_form_tested_below_is_read():
    assert_same_bits(decode(hostile(header(spelled()))), {"head": torch.zeros(2)})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is no plain tensor"),
        (b"\x93NUMPY\x01", "is no plain tensor"),
        (b"PK\x03\x04" + b"\0" * 200, "is no plain tensor"),  # an .npz file, which np.load would unpack
        (b"\x80\x04\x95" + b"\0" * 200, "is no plain tensor"),  # a pickle
        (header(spelled(descr="'|O'")), "is no plain tensor"),
        (header(spelled(descr="'>f4'")), "is no plain tensor"),
        (header(spelled(descr="'|b1'")), "is no plain tensor"),
        (header(spelled(descr="[('a', '<f4')]")), "is no plain tensor"),
        (header(spelled(order="True")), "is no plain tensor"),
        (header(spelled(shape="(-2,)")), "is no plain tensor"),
        (header(spelled(shape="(2, (3,))")), "is no plain tensor"),
        (header("{" * 5000), "is no plain tensor"),
        (header(spelled() + "(" * 5000), "is no plain tensor"),
        (header(spelled()).replace(b"NUMPY\x01", b"NUMPY\x02"), "is no plain tensor"),
        (header(spelled(), b"\0" * 7), "holds 7 bytes"),
        (header(spelled(), b"\0" * 9), "holds 9 bytes"),
        (header(spelled(shape="(3,)")), "says another dtype or shape than its header"),
        (header(spelled(descr="'<i4'")), "says another dtype or shape than its header"),
    ],
)
def test_what_is_no_plain_tensor_is_refused_in_one_line(data, reason):
    with pytest.raises(FederationError, match=f"tensor 'head' {reason}") as caught:
        decode(hostile(data))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("shape", [(2**40,), (2**20, 2**20), (10**17, 10**17), (10**17, 10**17, 0), (2,) * 40])
def test_a_shape_that_the_data_does_not_fill_allocates_nothing(shape):
    text = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
    record = hostile(header(spelled(shape=text)), shape=shape)
    tracemalloc.start()
    try:
        with pytest.raises(FederationError, match="holds 8 bytes, which is not what its header says"):
            decode(record)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_another_serialisation_and_another_outer_form_are_refused():
    data = npy(np.zeros(2, np.float32))
    for array in (hostile(data, stype="pickle"), hostile(data, dtype="float64"), hostile(data, shape=(1, 2))):
        with pytest.raises(FederationError, match="says another dtype or shape than its header"):
            decode(array)


def test_a_hostile_name_neither_breaks_the_line_nor_floods_it():
    from flwr.app import Array, ArrayRecord

    with pytest.raises(FederationError) as caught:
        decode(ArrayRecord({"\n\x1b[2J" + "x" * 10_000: Array("float32", (1,), "numpy.ndarray", b"")}))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_more_bytes_than_are_expected_are_refused():
    record = encode({"a": torch.zeros(3), "b": torch.zeros(2)})
    assert list(decode(record, 20)) == ["a", "b"]
    with pytest.raises(FederationError, match="its tensors hold 20 bytes, at most 19 are expected"):
        decode(record, 19)
