import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from caravan.errors import FederationError
from caravan.federation.rounds import (
    Failure,
    Update,
    average,
    check,
    check_plan,
    judge,
    list_reasons,
    update_norm,
)


def update(client: str, values: list[float], examples: int = 1) -> Update:
    return Update(client, {"head": torch.tensor(values)}, examples)


REFERENCE = {"head": torch.zeros(2)}


def test_the_average_weighs_each_client_by_its_examples():
    averaged = average([update("a", [1.0, 0.0], examples=1), update("b", [5.0, 2.0], examples=3)])
    assert averaged["head"].tolist() == [4.0, 1.5]  # (1*1 + 3*5)/4, (1*0 + 3*2)/4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_the_average_equals_numpys_and_keeps_shapes_and_dtype(dtype):
    generator = torch.Generator().manual_seed(3)
    counts = [7, 1, 250, 33]
    updates = [
        Update(
            f"client-{index}",
            {
                "adapter": torch.randn(5, 4, generator=generator).to(dtype),
                "bias": torch.randn((), generator=generator).to(dtype),
            },
            count,
        )
        for index, count in enumerate(counts)
    ]
    averaged = average(updates)
    for name in ("adapter", "bias"):
        stacked = np.stack([item.tensors[name].double().numpy() for item in updates])
        expected = torch.from_numpy(np.asarray(np.average(stacked, axis=0, weights=counts)))
        assert averaged[name].dtype == dtype
        torch.testing.assert_close(
            averaged[name].double(), expected.to(dtype).double(), rtol=torch.finfo(dtype).eps, atol=0
        )


def test_the_average_does_not_depend_on_who_answered_first():
    generator = torch.Generator().manual_seed(4)
    updates = [
        Update(f"c{index}", {"head": torch.randn(64, generator=generator, dtype=torch.float64)}, 3 * index + 1)
        for index in range(9)
    ]
    assert torch.equal(average(updates)["head"], average(updates[::-1])["head"])
    assert torch.equal(average(updates)["head"], average(updates[4:] + updates[:4])["head"])


def test_updates_are_averaged_as_they_come_and_not_kept():
    alive = []

    def come():
        for index in range(20):
            one = Update(f"c{index}", {"head": torch.full((8,), float(index))}, 1)
            alive.append(weakref.ref(one.tensors["head"]))
            yield one
            del one
            assert sum(reference() is not None for reference in alive) <= 2  # the first gives the form

    assert average(come())["head"].tolist() == [9.5] * 8


def test_the_average_of_equal_updates_is_that_update():
    values = torch.randn(100, generator=torch.Generator().manual_seed(5))
    averaged = average([Update(f"c{count}", {"head": values.clone()}, count) for count in (1, 3, 7, 1000)])
    assert torch.equal(averaged["head"], values)


def test_the_average_of_one_update_is_a_bit_identical_copy():
    values = torch.tensor([0.1, -0.0, 1e-42, 3.4e38])
    averaged = average([Update("a", {"head": values}, 3)])["head"]
    assert averaged.numpy().tobytes() == values.numpy().tobytes()
    averaged.zero_()
    assert values[0] != 0


weighted_values = st.lists(
    st.tuples(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(1, 2**40)),
    min_size=1,
    max_size=12,
)


@given(weighted_values)
def test_the_average_lies_between_the_smallest_and_the_largest_value(pairs):
    updates = [update(f"c{index}", [value], examples=count) for index, (value, count) in enumerate(pairs)]
    averaged = average(updates)["head"].item()
    assert min(value for value, _ in pairs) <= averaged <= max(value for value, _ in pairs)


def test_averaging_one_full_batch_step_of_each_client_is_the_central_step_on_the_pooled_data():
    generator = torch.Generator().manual_seed(6)
    inputs = torch.randn(60, 8, generator=generator)
    labels = torch.randint(0, 5, (60,), generator=generator)
    start = torch.randn(5, 8, generator=generator)

    def step(rows: slice) -> torch.Tensor:
        weight = start.clone().requires_grad_()
        loss = functional.cross_entropy(inputs[rows] @ weight.T, labels[rows])
        return start - 0.7 * torch.autograd.grad(loss, weight)[0]

    shards = {"north": slice(0, 4), "south": slice(4, 21), "west": slice(21, 60)}
    updates = [Update(name, {"head": step(rows)}, rows.stop - rows.start) for name, rows in shards.items()]
    central = step(slice(0, 60))
    assert (central - start).abs().max() > 1e-2  # a step that moves nothing would prove nothing
    torch.testing.assert_close(average(updates)["head"], central, rtol=0, atol=1e-6)


def test_no_update_at_all_is_an_error_and_never_an_empty_model():
    with pytest.raises(FederationError, match="no update to average"):
        average([])


def test_two_updates_of_one_client_are_not_averaged():
    with pytest.raises(FederationError, match="client a: it sent two updates"):
        average([update("a", [1.0, 2.0]), update("b", [1.0, 2.0]), update("a", [1.0, 2.0])])


def test_updates_that_would_only_broadcast_are_not_averaged():
    with pytest.raises(FederationError, match=r"client b: tensor head has shape \(1,\), the global one \(2,\)"):
        average([update("a", [1.0, 2.0]), update("b", [1.0])])


def test_whole_number_tensors_are_not_averaged():
    steps = Update("a", {"steps": torch.tensor([1, 2])}, 1)
    with pytest.raises(FederationError, match=r"tensor steps is torch\.int64"):
        average([steps, replace(steps, client="b")])


def test_a_sound_update_passes_the_check():
    check(update("a", [1.0, -2.0], examples=2**53), REFERENCE)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({}, "tensor head is missing"),
        ({"tail": torch.zeros(2)}, "tensor head is missing"),
        ({"head": torch.zeros(2), "tail": torch.zeros(2)}, "tensor tail is unknown here; send only head"),
        ({"head": torch.zeros(2, 1)}, r"tensor head has shape \(2, 1\), the global one \(2,\)"),
        ({"head": torch.zeros(2, dtype=torch.float64)}, r"tensor head is torch.float64, the global one torch.float32"),
        ({"head": torch.tensor([1.0, float("nan")])}, "1 of 2 values of tensor head are not finite"),
        ({"head": torch.tensor([float("inf"), -float("inf")])}, "2 of 2 values of tensor head are not finite"),
    ],
)
def test_a_bad_tensor_is_refused_with_the_client_and_the_reason(tensors, reason):
    with pytest.raises(FederationError, match=f"client oslo: {reason}") as caught:
        check(Update("oslo", tensors, 1), REFERENCE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("examples", [0, -3, True, 2.0, float("nan"), "5", None, 2**53 + 1])
def test_a_bad_example_count_is_refused_with_the_client_and_the_count(examples):
    with pytest.raises(FederationError, match="client oslo: its example count is") as caught:
        check(Update("oslo", {"head": torch.zeros(2)}, examples), REFERENCE)
    assert repr(examples) in str(caught.value)


def test_an_answer_is_its_update_or_the_reason_why_there_is_none():
    usable = update("west", [2.0, 4.0], examples=1)
    assert judge("west", usable, REFERENCE) is usable
    assert judge("north", "ValueError: no data", REFERENCE) == Failure("north", "ValueError: no data")
    assert judge("south", update("south", [float("nan"), 0.0]), REFERENCE) == Failure(
        "south", "1 of 2 values of tensor head are not finite; lower its learning rate"
    )


def test_an_update_may_go_as_far_as_the_bound_and_no_farther():
    reference = {"head": torch.tensor([1.0, 1.0]), "scale": torch.tensor(2.0, dtype=torch.float16)}
    moved = Update("oslo", {"head": torch.tensor([3.0, 4.0]), "scale": torch.tensor(8.0, dtype=torch.float16)}, 1)
    assert update_norm(moved, reference) == 7.0  # the root of 2*2 + 3*3 + 6*6
    check(moved, reference, max_update_norm=7.0)
    with pytest.raises(FederationError, match=r"client oslo: its update has norm 7, max_update_norm is 6\.99;"):
        check(moved, reference, max_update_norm=6.99)


def test_the_norm_of_an_update_does_not_overflow():
    far = {"head": torch.tensor([3e38, 0.0])}
    assert update_norm(Update("a", far, 1), {"head": -far["head"]}) == pytest.approx(6e38)


def test_an_example_count_may_reach_the_cap_and_no_more():
    check(update("oslo", [1.0, 1.0], examples=50), REFERENCE, max_examples=50)
    with pytest.raises(FederationError, match=r"client oslo: its example count is 51, max_examples is 50;"):
        check(update("oslo", [1.0, 1.0], examples=51), REFERENCE, max_examples=50)


def test_an_answer_is_judged_by_the_bounds_too():
    answers = {"a": update("a", [9.0, 0.0]), "b": update("b", [1.0, 0.0], examples=9), "c": update("c", [1.0, 0.0])}
    verdicts = [judge(name, answer, REFERENCE, max_update_norm=2.0, max_examples=5) for name, answer in answers.items()]
    assert [isinstance(verdict, Failure) for verdict in verdicts] == [True, True, False]


def test_a_reason_that_many_clients_share_is_said_once():
    failures = [Failure("a", "disk full"), Failure("b", "no data"), Failure("c", "disk full")]
    assert list_reasons(failures) == "a, c: disk full; b: no data"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"initial": {}}, "no tensors to train"),
        ({"initial": {"head": torch.zeros(2, dtype=torch.bfloat16)}}, r"head is torch.bfloat16, which cannot be sent"),
        ({"initial": {"head": torch.zeros(2, dtype=torch.int64)}}, r"head is torch.int64, which cannot be sent"),
        ({"initial": {"head": torch.tensor([float("nan")])}}, "head is not finite at the start"),
        ({"clients": []}, r"one or more clients of distinct names, got \[\]"),
        ({"clients": ["a", "b", "a"]}, "distinct names"),
        ({"rounds": 0, "first_round": 0}, "first_round is 0"),
        ({"rounds": 3, "first_round": 5}, "first_round is 5, rounds is 3"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(changes, reason):
    plan = {"initial": REFERENCE, "clients": ["a", "b"], "rounds": 1, "first_round": 1, **changes}
    with pytest.raises(FederationError, match=reason):
        check_plan(**plan)


def test_a_row_is_averaged_over_those_that_trained_it_where_that_is_asked_for():
    start = {"rows": torch.zeros(4, 2), "bias": torch.ones(4), "scale": torch.tensor(5.0)}
    lima = Update("lima", {"rows": torch.tensor([[1.0, 0], [0, 0], [4, 4], [0, 0]]), "bias": torch.ones(4)}, 1)
    oslo = Update("oslo", {"rows": torch.tensor([[5.0, 2], [2, 2], [0, 0], [0, 0]]), "bias": 3 * torch.ones(4)}, 3)
    lima.tensors["scale"], oslo.tensors["scale"] = torch.tensor(7.0), torch.tensor(5.0)
    averaged = average([lima, oslo], trained_from=start)
    # Both trained row 0, (1 + 3 * 5) / 4; oslo alone row 1; lima alone row 2; nobody row 3.
    assert averaged["rows"].tolist() == [[4, 1.5], [2, 2], [4, 4], [0, 0]]
    assert averaged["bias"].tolist() == [3, 3, 3, 3]  # lima left all of it, oslo alone counts
    assert averaged["scale"].item() == 7
    assert average([lima, oslo])["rows"].tolist() == [[4, 1.5], [1.5, 1.5], [1, 1], [0, 0]]


def test_where_everybody_trains_every_row_both_averages_are_the_same_bits():
    generator = torch.Generator().manual_seed(3)
    start = {"rows": torch.zeros(5, 3), "scale": torch.tensor(1.0)}
    updates = [
        Update(name, {key: torch.randn(tensor.shape, generator=generator) for key, tensor in start.items()}, count)
        for name, count in (("lima", 3), ("oslo", 7), ("pune", 11))
    ]
    ours, plain = average(updates, trained_from=start), average(updates)
    assert all(torch.equal(ours[name], plain[name]) and ours[name].dtype == torch.float32 for name in start)
