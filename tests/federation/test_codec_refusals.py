"""What the codec does not pack, and what it does not believe."""

import pytest
import torch
from torch import Tensor

from caravan.errors import FederationError
from caravan.federation.codec import Codec

REFERENCE = {"head.rows": torch.zeros(4, 2), "head.bias": torch.zeros(4), "scale": torch.tensor(0.0)}
SPARSE = frozenset({"head.rows", "head.bias"})
HUGE = 2**40  # numbers that a sender can claim at the price of one


def packed_honestly(kind: str, sparse: frozenset[str] = frozenset()) -> dict[str, Tensor]:
    delta = {
        "head.rows": torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, -1.0], [0.0, 0.0]]),
        "head.bias": torch.tensor([1.0, 0.0, -1.0, 0.0]),
        "scale": torch.tensor(0.5),
    }
    return Codec(kind, sparse).encode(delta, {}, seed=0)[0]


def with_entry(tensor: Tensor, index: tuple[int, ...] | int, value: float) -> Tensor:
    changed = tensor.clone()
    changed[index] = value
    return changed


def assert_refused(codec: Codec, packed: dict, reason: str) -> None:
    with pytest.raises(FederationError, match=reason) as caught:
        codec.decode(packed, REFERENCE)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 500
    assert ";" in message  # the remedy


@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
@pytest.mark.parametrize("sparse", [frozenset(), SPARSE])
def test_no_packed_tensor_may_be_missing(kind, sparse):
    honest = packed_honestly(kind, sparse)
    for name in honest:
        rest = {other: tensor for other, tensor in honest.items() if other != name}
        assert_refused(Codec(kind, sparse), rest, f"packed tensor '{name}' is missing")


@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
@pytest.mark.parametrize("name", ["head", "head.rows", "head.rows/rows", "head.rows/int4", "scale/scale/scale", "", 7])
def test_no_packed_tensor_may_be_unknown(kind, name):
    assert_refused(Codec(kind), packed_honestly(kind) | {name: torch.zeros(1)}, "is unknown here")


def test_a_hostile_name_neither_breaks_the_line_nor_floods_it():
    names = {f"\n\x1b[2J{'x' * 10_000}{index}": torch.zeros(1) for index in range(1000)}
    assert_refused(Codec(), packed_honestly("float32") | names, "and 997 more is unknown here")


@pytest.mark.parametrize("sent", ["float32", "float16", "int8"])
@pytest.mark.parametrize("read", ["float32", "float16", "int8"])
def test_an_update_is_read_with_the_receivers_settings_alone(sent, read):
    if sent != read:
        assert_refused(Codec(read), packed_honestly(sent), "is missing; pack with the receiver's codec settings")
    assert_refused(Codec(read, SPARSE), packed_honestly(read), "is missing; pack with the receiver's codec settings")
    assert_refused(
        Codec(read), packed_honestly(read, SPARSE), "is unknown here; pack with the receiver's codec settings"
    )


@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
@pytest.mark.parametrize("sparse", [frozenset(), SPARSE])
def test_each_packed_tensor_must_have_its_dtype_and_shape(kind, sparse):
    honest = packed_honestly(kind, sparse)
    for name, tensor in honest.items():
        for dtype in {torch.float64, torch.float32, torch.float16, torch.int8, torch.uint8, torch.int64, torch.bool}:
            if dtype != tensor.dtype:
                assert_refused(Codec(kind, sparse), honest | {name: tensor.to(dtype)}, f"{name} is torch.*, not torch")
        if not name.endswith("/rows"):  # of the rows only the number is free: the others then do not fit them
            for shape in ((5,), (4, 3), (2, 4), (1, 1, 1), (0,), (HUGE,), (HUGE, 2)):
                claimed = torch.zeros(1, dtype=tensor.dtype).expand(shape)
                assert_refused(Codec(kind, sparse), honest | {name: claimed}, f"{name} has shape")
        if tensor.numel() == 1:
            assert_refused(Codec(kind, sparse), honest | {name: tensor.reshape(1, 1)}, f"{name} has shape")


@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
@pytest.mark.parametrize("shape", [(), (2, 1), (5,), (1,), (0,), (HUGE,)])
def test_the_rows_of_a_sparse_tensor_are_one_list_no_longer_than_the_tensor_and_as_long_as_the_values(kind, shape):
    claimed = torch.zeros(1, dtype=torch.int32).expand(shape) if shape else torch.zeros((), dtype=torch.int32)
    packed = packed_honestly(kind, SPARSE) | {"head.rows/rows": claimed}
    assert_refused(Codec(kind, SPARSE), packed, r"packed tensor head\.rows/(rows|float32|float16|int8) has shape")


@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
def test_more_rows_than_the_tensor_has_are_refused_even_with_as_many_values(kind):
    packed = packed_honestly(kind, SPARSE)
    packed["head.rows/rows"] = torch.tensor([0, 1, 2, 3, 3], dtype=torch.int32)
    packed[f"head.rows/{kind}"] = packed[f"head.rows/{kind}"][:1].expand(5, 2)
    assert_refused(Codec(kind, SPARSE), packed, rf"head\.rows/{kind} has shape \(5, 2\), not \(4, 2\)")


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([0, 4], "head.rows/rows counts from 0 to 4; send rows from 0 to 3"),
        ([-1, 2], "head.rows/rows counts from -1 to 2"),
        ([2, 0], "head.rows/rows is not strictly ascending"),
        ([2, 2], "head.rows/rows is not strictly ascending"),
        ([2**31 - 1, -(2**31)], "head.rows/rows counts from -2147483648 to 2147483647"),
    ],
)
@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
def test_rows_must_exist_and_come_once_and_in_order(kind, rows, reason):
    packed = packed_honestly(kind, SPARSE) | {"head.rows/rows": torch.tensor(rows, dtype=torch.int32)}
    assert_refused(Codec(kind, SPARSE), packed, reason)


@pytest.mark.parametrize("scale", [-1.0, -1e-38, float("nan"), float("inf"), -float("inf"), 3e38, 2.7e36])
@pytest.mark.parametrize("sparse", [frozenset(), SPARSE])
def test_the_length_of_a_step_must_be_one_that_the_codec_can_have_chosen(scale, sparse):
    packed = packed_honestly("int8", sparse)
    row = packed | {"head.rows/scale": with_entry(packed["head.rows/scale"], 1, scale)}
    assert_refused(Codec("int8", sparse), row, "packed tensor head.rows/scale holds")
    vector = packed | {"head.bias/scale": torch.tensor(scale)}
    assert_refused(Codec("int8", sparse), vector, "packed tensor head.bias/scale holds")


def test_the_longest_step_that_is_believed_decodes_to_finite_numbers():
    packed = packed_honestly("int8") | {"head.bias/scale": torch.tensor(2.0**121)}
    packed["head.bias/int8"] = torch.tensor([127, -127, 0, 1], dtype=torch.int8)
    assert bool(torch.isfinite(Codec("int8").decode(packed, REFERENCE)["head.bias"]).all())


def test_the_number_that_is_never_packed_is_not_believed():
    packed = packed_honestly("int8")
    packed["head.rows/int8"] = with_entry(packed["head.rows/int8"], (3, 1), -128)
    assert_refused(Codec("int8"), packed, "packed tensor head.rows/int8 holds -128")


@pytest.mark.parametrize("kind", ["float32", "float16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("sparse", [frozenset(), SPARSE])
def test_numbers_that_are_not_finite_are_refused_on_arrival(kind, value, sparse):
    packed = packed_honestly(kind, sparse)
    packed[f"head.rows/{kind}"] = with_entry(packed[f"head.rows/{kind}"], (1, 1), value)
    assert_refused(Codec(kind, sparse), packed, f"head.rows/{kind} holds 1 numbers that are not finite")


@pytest.mark.parametrize("impostor", [None, 3, [0.0] * 4, torch.zeros(4).to_sparse(), torch.zeros(4, device="meta")])
@pytest.mark.parametrize("name", ["head.bias/float32", "head.bias/rows"])
def test_what_is_no_plain_tensor_is_refused(impostor, name):
    packed = packed_honestly("float32", SPARSE) | {name: impostor}
    assert_refused(Codec("float32", SPARSE), packed, r"packed tensor head\.bias/")


@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_delta_that_is_not_finite_is_refused_before_it_is_sent(kind, value):
    bad = {"x": torch.tensor([1.0, value])}
    with pytest.raises(FederationError, match="delta of tensor x is not finite; lower the learning rate"):
        Codec(kind).encode(bad, {}, seed=0)
    with pytest.raises(FederationError, match="delta of tensor x is not finite"):
        Codec(kind).encode({"x": torch.zeros(2)}, bad, seed=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_only_float32_can_be_packed(dtype):
    fit, unfit = {"x": torch.zeros(2)}, {"x": torch.zeros(2, dtype=dtype)}
    for delta, residual in ((unfit, {}), (fit, unfit)):
        with pytest.raises(FederationError, match=f"tensor x is {dtype}; only float32 can be packed"):
            Codec().encode(delta, residual, seed=0)


def test_a_residual_of_other_tensors_is_refused():
    with pytest.raises(FederationError, match="the residual holds 'y', which the delta does not"):
        Codec().encode({"x": torch.zeros(2)}, {"y": torch.zeros(2)}, seed=0)
    with pytest.raises(FederationError, match=r"the residual of tensor x has shape \(1\), its delta \(2\)"):
        Codec().encode({"x": torch.zeros(2)}, {"x": torch.zeros(1)}, seed=0)


def test_a_kind_that_does_not_exist_is_refused():
    with pytest.raises(FederationError, match="codec is 'int4'; it must be one of float32, float16, int8"):
        Codec("int4")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("head.row", "sparse tensor head.row is not among 'head.bias', 'head.rows'"), ("scale", "scale is one number")],
)
def test_a_sparse_tensor_must_exist_and_have_rows(name, reason):
    codec = Codec("int8", frozenset({name}))
    with pytest.raises(FederationError, match=reason):
        codec.encode(REFERENCE, {}, seed=0)
    with pytest.raises(FederationError, match=reason):
        codec.decode({}, REFERENCE)
    with pytest.raises(FederationError, match=reason):
        codec.expected_bytes({name: tuple(tensor.shape) for name, tensor in REFERENCE.items()})


def test_rows_that_int32_cannot_count_are_not_sent_sparsely():
    with pytest.raises(FederationError, match="more rows than int32 can count"):
        Codec("int8", frozenset({"x"})).expected_bytes({"x": (2**31, 4)})
