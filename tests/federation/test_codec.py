import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from caravan.errors import FederationError
from caravan.federation.codec import Codec, add, subtract

KINDS = ["float32", "float16", "int8"]
SHAPES = {
    "adapter.matrix": (6, 6),
    "head.bias": (9,),
    "head.log_scale": (),
    "head.one": (1, 1),
    "head.pre.none": (0, 4),
    "head.rows": (9, 5),
    "head.thin": (3, 0),
    "head.void": (0,),
    "stack": (2, 3, 4),
}
SPARSE = frozenset({"head.rows", "head.bias"})


def some_delta(seed: int = 0, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def sparse_delta() -> dict[str, Tensor]:
    """Of the head's 9 rows, 0, 4 and 8 change; of its biases 2 and 3."""
    delta = some_delta()
    delta["head.rows"][[1, 2, 3, 5, 6, 7]] = 0
    delta["head.bias"][[0, 1, 4, 5, 6, 7, 8]] = 0
    return delta


def row_steps(packed: dict[str, Tensor], name: str, ndim: int) -> Tensor:
    """The lengths of the int8 steps of a tensor, in a shape that broadcasts over it."""
    scale = packed[f"{name}/scale"]
    return scale.reshape(-1, *[1] * (ndim - 1)) if scale.ndim else scale


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


def payload_bytes(packed: dict[str, Tensor]) -> int:
    return sum(len(tensor.numpy().tobytes()) for tensor in packed.values())


# Round trips


@pytest.mark.parametrize("sparse", [frozenset(), SPARSE])
def test_float32_arrives_bit_for_bit_and_leaves_nothing(sparse):
    delta = sparse_delta()
    delta["head.rows"][4, 0], delta["head.rows"][8, 1] = 1e-42, 3.4e38
    codec = Codec("float32", sparse)
    packed, left = codec.encode(delta, {}, seed=0)
    decoded = codec.decode(packed, delta)
    assert list(decoded) == list(delta)
    assert_equal(decoded, delta)
    assert left == {}


def test_float16_is_what_numpy_rounds_to():
    delta = some_delta()
    packed, left = Codec("float16").encode(delta, {}, seed=0)
    decoded = Codec("float16").decode(packed, delta)
    for name, tensor in delta.items():
        expected = torch.from_numpy(tensor.numpy().astype(np.float16).astype(np.float32)).reshape(tensor.shape)
        assert torch.equal(decoded[name], expected)
        assert torch.equal(left.get(name, torch.zeros(tensor.shape)), tensor - expected)


@pytest.mark.parametrize("sparse", [frozenset(), SPARSE])
def test_int8_arrives_within_one_step_of_its_row(sparse):
    delta = sparse_delta()
    codec = Codec("int8", sparse)
    packed, _ = codec.encode(delta, {}, seed=0)
    decoded = codec.decode(packed, delta)
    for name, tensor in delta.items():
        assert decoded[name].shape == tensor.shape
        if tensor.numel():
            rows = tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1)
            error = (decoded[name].reshape(rows.shape) - rows).abs().amax(1)
            assert bool((error <= rows.abs().amax(1) / 127 * (1 + 1e-6)).all()), name
            assert not decoded[name][tensor == 0].any()


def test_int8_steps_are_those_worked_out_by_hand():
    delta = {
        "rows": torch.tensor([[127.0, -2.0, 0.0], [0.0, 0.0, 0.0], [-254.0, 4.0, 2.0]]),
        "bias": torch.tensor(-63.5),
    }
    packed, left = Codec("int8").encode(delta, {}, seed=0)
    assert packed["rows/int8"].tolist() == [[127, -2, 0], [0, 0, 0], [-127, 2, 1]]
    assert packed["rows/scale"][[0, 2]].tolist() == [1.0, 2.0]
    assert (packed["bias/int8"].item(), packed["bias/scale"].item()) == (-127, 0.5)
    assert left == {}
    assert_equal(Codec("int8").decode(packed, delta), delta)


@pytest.mark.parametrize("kind", KINDS)
def test_a_delta_may_lie_in_memory_in_any_order(kind):
    transposed = {"matrix": some_delta()["head.rows"].T, "every": torch.arange(10.0)[::2]}
    plain = {name: tensor.contiguous() for name, tensor in transposed.items()}
    packed, _ = Codec(kind).encode(transposed, {}, seed=3)
    assert all(tensor.is_contiguous() for tensor in packed.values())
    assert_equal(packed, Codec(kind).encode(plain, {}, seed=3)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparse", [frozenset(), SPARSE])
def test_packed_tensors_survive_numpy(kind, sparse):
    delta = sparse_delta()
    codec = Codec(kind, sparse)
    packed, _ = codec.encode(delta, {}, seed=1)
    received = {name: torch.from_numpy(np.array(tensor.numpy())) for name, tensor in packed.items()}
    assert_equal(codec.decode(received, delta), codec.decode(packed, delta))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_packed_decoded_or_left_shares_no_memory_with_what_was_given(kind):
    delta = some_delta()
    packed, left = Codec(kind).encode(delta, {}, seed=1)
    decoded = Codec(kind).decode(packed, delta)
    before = {name: tensor.clone() for name, tensor in (packed | decoded).items()}
    left_before = {name: tensor.clone() for name, tensor in left.items()}
    for tensor in delta.values():
        tensor.zero_()
    assert_equal(packed | decoded, before)
    for tensor in packed.values():
        tensor.zero_()
    assert_equal(decoded, {name: before[name] for name in decoded})
    assert_equal(left, left_before)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_seeds_give_equal_bytes_whatever_the_order_of_the_names(kind):
    delta = some_delta()
    packed, left = Codec(kind).encode(delta, {}, seed=5)
    again, left_again = Codec(kind).encode(dict(reversed(delta.items())), {}, seed=5)
    assert_equal(again, packed)
    assert_equal(left_again, left)
    other, _ = Codec(kind).encode(delta, {}, seed=6)
    assert all(torch.equal(other[name], packed[name]) for name in packed) == (kind != "int8")


# Sparse rows


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_sparse_tensor_only_the_rows_that_changed_are_sent(kind):
    delta = sparse_delta()
    packed, _ = Codec(kind, SPARSE).encode(delta, {}, seed=2)
    assert packed["head.rows/rows"].tolist() == [0, 4, 8]
    assert packed["head.bias/rows"].tolist() == [2, 3]
    assert packed[f"head.rows/{kind}"].shape == (3, 5)
    assert {name for name in packed if name.endswith("/rows")} == {"head.rows/rows", "head.bias/rows"}
    decoded = Codec(kind, SPARSE).decode(packed, delta)
    assert not decoded["head.rows"][[1, 2, 3, 5, 6, 7]].any()


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_sparse_and_dense_say_the_same(kind):
    delta = sparse_delta()
    dense, dense_left = Codec(kind).encode(delta, {}, seed=2)
    sparse, sparse_left = Codec(kind, SPARSE).encode(delta, {}, seed=2)
    assert_equal(Codec(kind, SPARSE).decode(sparse, delta), Codec(kind).decode(dense, delta))
    assert_equal(sparse_left, dense_left)


def test_a_sparse_tensor_without_changes_costs_its_scale_at_most():
    delta = {"head.rows": torch.zeros(9, 5), "head.bias": torch.zeros(9)}
    for kind, expected in (("float32", 0), ("float16", 0), ("int8", 4)):  # the scale of the bias
        packed, left = Codec(kind, SPARSE).encode(delta, {}, seed=0)
        assert payload_bytes(packed) == expected
        assert left == {}
        assert_equal(Codec(kind, SPARSE).decode(packed, delta), delta)


def test_what_is_left_of_a_row_waits_until_the_row_changes_again():
    codec = Codec("float16", frozenset({"rows"}))
    first, still = {"rows": torch.tensor([[1 / 3], [0.0]])}, {"rows": torch.tensor([[0.0], [1.0]])}
    _, left = codec.encode(first, {}, seed=0)
    assert left["rows"][0, 0] != 0
    packed, waiting = codec.encode(still, left, seed=0)
    assert packed["rows/rows"].tolist() == [1]
    assert torch.equal(waiting["rows"], left["rows"])
    packed, settled = codec.encode(first, waiting, seed=0)
    arrived = codec.decode(packed, first)["rows"] + settled["rows"]
    assert torch.equal(arrived, first["rows"] + left["rows"])


# Rounding at random, and error feedback


def test_int8_rounding_has_the_number_itself_as_its_mean():
    # 127 sets the step to 1; the mean of n roundings, each within a step of length 1, has a standard deviation of at
    # most 1/2 / sqrt(n). Rounding to nearest would be off by up to 0.5, rounding down by up to 1.
    values, repeats = torch.tensor([127.0, -127.0, 0.25, -0.25, 0.5, 3.9, -100.1, 126.75, 1e-6]), 40_000
    delta = {"rows": values.repeat(repeats, 1)}
    codec = Codec("int8")
    decoded = codec.decode(codec.encode(delta, {}, seed=8)[0], delta)["rows"].double()
    assert torch.equal(decoded[:, :2].unique(dim=0), torch.tensor([[127.0, -127.0]]).double())
    assert float((decoded.mean(0) - values).abs().max()) < 5 * 0.5 / math.sqrt(repeats)


def test_different_seeds_round_independently():
    delta = {"vector": torch.cat([torch.tensor([127.0]), torch.full((10_000,), 0.5)])}
    ups = [Codec("int8").encode(delta, {}, seed=seed)[0]["vector/int8"][1:].double() for seed in (1, 2)]
    correlation = float(((ups[0] - 0.5) * (ups[1] - 0.5)).mean() / 0.25)
    assert abs(correlation) < 5 / math.sqrt(10_000)


@st.composite
def runs_of_deltas(draw):
    """Deltas of several rounds, of one shape and of magnitudes that float16 holds; some rows do not change."""
    shape = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    number = st.one_of(st.just(0.0), st.floats(-1000, 1000, width=32))
    numbers = st.lists(number, min_size=math.prod(shape), max_size=math.prod(shape))
    return [torch.tensor(draw(numbers)).reshape(shape) for _ in range(draw(st.integers(1, 6)))]


@settings(deadline=None)
@given(runs_of_deltas(), st.sampled_from(KINDS), st.booleans(), st.integers(0, 2**31))
def test_the_sum_of_what_arrived_stays_within_one_step_of_the_sum_of_the_deltas(deltas, kind, sparse, seed):
    shape = deltas[0].shape
    codec = Codec(kind, frozenset({"x"}) if sparse and shape else frozenset())
    residual: dict[str, Tensor] = {}
    arrived, wanted = torch.zeros(shape).double(), torch.zeros(shape).double()
    step, slack = torch.zeros(shape).double(), 0.0
    for number, delta in enumerate(deltas):
        packed, residual = codec.encode({"x": delta}, residual, seed=seed + number)
        decoded = codec.decode(packed, {"x": delta})["x"]
        arrived += decoded
        wanted += delta
        if kind == "float16":  # the distance of float16 numbers of this size; nearest rounding is off by half of it
            latest = (decoded.abs() * 2.0**-10).clamp_min(2.0**-24).double()
        else:
            latest = torch.zeros(shape).double()
            if kind == "int8" and codec.sparse:
                rows = packed["x/rows"].long()
                latest[rows] = row_steps(packed, "x", delta.ndim).double().expand(packed["x/int8"].shape)
            elif kind == "int8":
                latest += row_steps(packed, "x", delta.ndim)
        changed = (delta != 0).flatten(1).any(1) if delta.ndim > 1 else delta != 0
        if codec.sparse:  # a row that is not sent keeps what its last sending left
            latest = torch.where(changed.reshape(-1, *[1] * (delta.ndim - 1)), latest, step)
        step = latest
        slack += 2.0**-22 * float(delta.abs().max() + decoded.abs().max())  # of adding the residual in float32
        assert bool(((arrived - wanted).abs() <= step + slack).all())


def test_without_error_feedback_the_sum_of_what_arrived_drifts_away():
    delta = {"x": torch.tensor([1.0, 1e-9])}  # the second is lost in float16, each time
    codec = Codec("float16")
    sums = {}
    for feedback in (True, False):
        residual, total = {}, torch.zeros(2).double()
        for number in range(100):
            packed, left = codec.encode(delta, residual, seed=number)
            residual = left if feedback else {}
            total += codec.decode(packed, delta)["x"]
        sums[feedback] = total[1].item()
    assert sums[False] == 0
    assert abs(sums[True] - 1e-7) <= 2**-24


def distance_from_optimum(kind: str, *, feedback: bool) -> float:
    """Two clients pull towards far apart centres, so that their deltas do not vanish at the optimum: their mean."""
    codec = Codec(kind)
    centres = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)) * 10
    held = torch.zeros(3, 16)
    residuals: dict[int, dict[str, Tensor]] = {}

    def send(sender: int, change: Tensor, number: int) -> Tensor:
        residual = residuals.get(sender, {}) if feedback else {}
        packed, residuals[sender] = codec.encode({"x": change}, residual, seed=3 * number + sender)
        return codec.decode(packed, {"x": held})["x"]

    for number in range(200):
        changes = [send(client, 0.05 * (centre - held), number) for client, centre in enumerate(centres)]
        held = held + send(2, torch.stack(changes).mean(0), number)  # 2 is the server
    return (held - centres.mean(0)).square().mean().sqrt().item()


def test_with_error_feedback_on_both_legs_a_federation_comes_closer_to_its_optimum():
    lossless = distance_from_optimum("float32", feedback=True)
    assert lossless < 1e-3
    assert distance_from_optimum("float32", feedback=False) == lossless
    assert distance_from_optimum("float16", feedback=True) < 1.1 * lossless
    assert distance_from_optimum("float16", feedback=False) > 3 * lossless
    assert 2 * distance_from_optimum("int8", feedback=True) < distance_from_optimum("int8", feedback=False)


@pytest.mark.parametrize(
    ("kind", "value", "first"),
    [("float16", 150_000.0, 65_504.0), ("int8", torch.finfo(torch.float32).max, 127 * 2.0**121)],
)
def test_what_is_too_large_saturates_and_the_rest_follows(kind, value, first):
    codec, delta = Codec(kind), {"x": torch.tensor([[value, -value]])}
    packed, left = codec.encode(delta, {}, seed=0)
    assert codec.decode(packed, delta)["x"].tolist() == [[first, -first]]
    sent = codec.decode(packed, delta)["x"].double()
    for number in range(1, 4):
        packed, left = codec.encode({"x": torch.zeros(1, 2)}, left, seed=number)
        sent += codec.decode(packed, delta)["x"]
    assert bool(((sent - delta["x"]).abs() <= 1e-6 * value).all())


@pytest.mark.parametrize("value", [1e-45, 1e-41, 1.2e-38])
def test_the_smallest_numbers_give_steps_that_no_machine_flushes_to_zero(value):
    codec, delta = Codec("int8"), {"x": torch.tensor([value, 0.0])}
    packed, left = codec.encode(delta, {}, seed=0)
    assert packed["x/scale"] >= torch.finfo(torch.float32).tiny
    assert torch.equal(codec.decode(packed, delta)["x"] + left.get("x", torch.zeros(2)), delta["x"])


# States and deltas


numbers = st.floats(-(2.0**126), 2.0**126, width=32)


@settings(deadline=None)
@given(numbers, numbers)
def test_start_and_decoded_delta_give_the_trained_number_within_one_unit_of_the_larger_ones_last_place(start, trained):
    before, after = {"x": torch.tensor([start])}, {"x": torch.tensor([trained])}
    packed, _ = Codec("float32").encode(subtract(after, before), {}, seed=0)
    reached = add(before, Codec("float32").decode(packed, before))["x"].item()
    assert abs(reached - trained) <= float(np.spacing(np.float32(max(abs(start), abs(trained)))))
    if trained == 0 or start == 0 or 0.5 <= trained / start <= 2:
        assert reached == trained


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({}, "tensor 'x' is on one side of a delta only"),
        ({"x": torch.zeros(2), "y": torch.zeros(2)}, "tensor 'y' is on one side of a delta only"),
        ({"x": torch.zeros(1)}, r"tensor x is torch\.float32 \([12]\) and torch\.float32 \([12]\)"),
        ({"x": torch.zeros(2, dtype=torch.float64)}, r"tensor x is torch.float\d\d \(2\) and torch.float\d\d \(2\)"),
    ],
)
def test_states_that_do_not_fit_give_no_delta(other, reason):
    state = {"x": torch.zeros(2)}
    for calculate in (subtract, add):
        with pytest.raises(FederationError, match=reason):
            calculate(state, other)


# Sizes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparse", [frozenset(), SPARSE])
def test_the_bytes_worked_out_from_shapes_are_those_of_what_is_packed(kind, sparse):
    packed, _ = Codec(kind, sparse).encode(sparse_delta(), {}, seed=0)
    changed = {"head.rows": 3, "head.bias": 2} if sparse else {}
    assert Codec(kind, sparse).expected_bytes(SHAPES, changed) == payload_bytes(packed)
    whole, _ = Codec(kind, sparse).encode(some_delta(), {}, seed=0)
    assert Codec(kind, sparse).expected_bytes(SHAPES) == payload_bytes(whole)


@pytest.mark.parametrize(("width", "documents"), [(2048, 10_000), (3072, 2_000_000)])  # TinyLlama, Llama-3.2-3B
def test_the_bytes_of_large_models_are_those_worked_out_by_hand(width, documents):
    shapes = {"adapter.matrix": (width, width), "head.rows": (documents, width), "head.bias": (documents,)}
    count = width**2 + documents * width + documents
    assert Codec("float32").expected_bytes(shapes) == 4 * count
    assert Codec("float16").expected_bytes(shapes) == 2 * count
    assert Codec("int8").expected_bytes(shapes) == count + 4 * (width + documents + 1)
    changed = {"head.rows": 50, "head.bias": 50}
    sparse = Codec("int8", SPARSE).expected_bytes(shapes, changed)
    assert sparse == (width**2 + 4 * width) + 50 * (width + 4 + 4) + (50 + 4 * 50 + 4)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"head.rows": 10}, "10 changed rows are given for head.rows, which has 9"),
        ({"head.rows": -1}, "-1 changed rows"),
        ({"adapter.matrix": 2}, "changed rows are given for 'adapter.matrix', of which all rows are sent"),
    ],
)
def test_rows_that_cannot_change_have_no_bytes(changed, reason):
    with pytest.raises(FederationError, match=reason):
        Codec("int8", SPARSE).expected_bytes(SHAPES, changed)
