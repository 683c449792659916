import importlib
import importlib.machinery
import logging
import random
import sys
import threading

import pytest
import torch

from caravan.config import FederationConfig
from caravan.errors import FederationError
from caravan.federation import messages, server
from caravan.federation.flower import Failure, run_federation
from caravan.federation.rounds import Update
from toy_federation import SITES, assert_same_bits, plain_loop, reports_of, start_tensors, toy_train


@pytest.mark.parametrize("count", [1, 3, 10, 50])
def test_a_federated_run_equals_a_plain_loop_of_local_training_and_averaging(count):
    clients = [f"client {index}" for index in range(count)]
    assert_same_bits(run_federation(start_tensors(), clients, toy_train, rounds=3), plain_loop(clients, range(1, 4)))


def test_a_resumed_run_equals_the_uninterrupted_one():
    checkpoints = {}
    whole = run_federation(
        start_tensors(),
        SITES,
        toy_train,
        rounds=5,
        on_round=lambda report, tensors: checkpoints.update({report.round: tensors}),
    )
    assert list(checkpoints) == [1, 2, 3, 4, 5]
    assert_same_bits(checkpoints[5], whole)
    resumed_reports = []
    resumed = run_federation(
        checkpoints[2],
        SITES,
        toy_train,
        rounds=5,
        first_round=3,
        on_round=lambda report, _: resumed_reports.append(report.round),
    )
    assert resumed_reports == [3, 4, 5]
    assert_same_bits(resumed, whole)


def test_a_run_resumed_after_its_last_round_returns_what_it_was_given():
    def never(client, tensors, round_number):
        raise AssertionError("there is no round left")

    assert_same_bits(run_federation(start_tensors(), SITES, never, rounds=2, first_round=3), start_tensors())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_tensors_arrive_bit_identical_on_both_legs(dtype):
    tiny = torch.finfo(dtype).smallest_normal / 4  # subnormal
    sent = {
        "values": torch.tensor([0.1, -0.0, tiny, torch.finfo(dtype).max], dtype=dtype),
        "scalar": torch.tensor(1 / 3, dtype=dtype),
        "transposed": torch.arange(6, dtype=dtype).reshape(2, 3).T,
        "none": torch.zeros(0, 3, dtype=dtype),
    }
    seen = []

    def echo(client, tensors, round_number):
        seen.append(tensors)
        return Update(client, tensors, 1)

    returned = run_federation(sent, ["a"], echo, rounds=2)
    assert_same_bits(seen[0], {name: tensor.contiguous() for name, tensor in sent.items()})
    assert_same_bits(seen[1], seen[0])
    assert_same_bits(returned, seen[0])


def test_what_a_client_does_to_its_tensors_reaches_nobody_else():
    initial = start_tensors()

    def overwrite(client, tensors, round_number):
        assert_same_bits(tensors, start_tensors())
        update = Update(client, {name: tensor.clone() for name, tensor in tensors.items()}, 1)
        for tensor in tensors.values():
            tensor.zero_()
        return update

    returned = run_federation(
        initial, SITES, overwrite, rounds=2, on_round=lambda _, tensors: [t.zero_() for t in tensors.values()]
    )
    assert_same_bits(initial, start_tensors())
    assert_same_bits(returned, start_tensors())


def test_clients_run_in_the_given_order_in_the_calling_thread():
    calls = []

    def note(client, tensors, round_number):
        calls.append((client, round_number, threading.current_thread() is threading.main_thread()))
        return Update(client, tensors, 1)

    before = random.getstate()
    run_federation(start_tensors(), SITES, note, rounds=2)
    assert calls == [(client, number, True) for number in (1, 2) for client in SITES]
    assert random.getstate() == before


def test_a_report_says_who_took_part_with_what():
    reports = reports_of(toy_train, rounds=2)
    first = {client: toy_train(client, start_tensors(), 1) for client in SITES}
    assert [report.round for report in reports] == [1, 2]
    assert reports[0].clients == tuple(SITES)
    assert reports[0].examples == tuple(first[client].examples for client in SITES)
    assert reports[0].metrics == tuple(first[client].metrics for client in SITES)
    assert reports[0].failures == ()
    assert reports[0].seconds > 0


def test_the_reported_bytes_are_those_of_flowers_own_serialisation(monkeypatch):
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

    sent = []

    def count(content):
        sent.append((content, messages.content_bytes(content)))
        return sent[-1][1]

    def two_answer(client, tensors, round_number):
        if client == "lima":
            raise ValueError("no update is sent")
        return toy_train(client, tensors, round_number)

    monkeypatch.setattr(server, "content_bytes", count)
    (report,) = reports_of(two_answer)
    assert len(sent) == 6
    for content, counted in sent:
        objects = sum(len(each.deflate()) for each in get_all_nested_objects(content).values())
        assert counted == pytest.approx(objects + get_object_tree(content).ByteSize(), abs=10)
    down, up = [counted for _, counted in sent[:3]], [counted for _, counted in sent[3:]]
    assert (report.bytes_down, report.bytes_up) == (sum(down), sum(up))
    assert report.traffic == {client: {"up": up[n], "down": down[n]} for n, client in enumerate(SITES)}
    assert 0 < report.traffic["lima"]["up"] < report.traffic["oslo"]["up"] / 2  # a line, not tensors


def test_a_client_is_who_its_node_is_and_not_who_it_says():
    (report,) = reports_of(lambda client, tensors, number: Update("pune", tensors, 1))
    assert report.clients == tuple(SITES)


def test_a_client_that_raises_is_reported_and_the_round_goes_on_without_it():
    def lima_fails_once(client, tensors, round_number):
        if client == "lima" and round_number == 1:
            raise ValueError("row 7\n  has \x1b[31mno label")
        return toy_train(client, tensors, round_number)

    after_first = {}
    reports = []

    def keep(report, tensors):
        reports.append(report)
        after_first.setdefault("tensors", tensors)

    run_federation(start_tensors(), SITES, lima_fails_once, rounds=2, on_round=keep)
    assert reports[0].failures == (Failure("lima", "ValueError: row 7 has [31mno label"),)
    assert reports[0].clients == ("oslo", "pune")
    assert_same_bits(after_first["tensors"], plain_loop(["oslo", "pune"], range(1, 2)))
    assert reports[1].clients == tuple(SITES)


def test_a_long_reason_is_cut():
    def fail(client, tensors, round_number):
        if client == "oslo":
            raise ValueError("x" * 10_000)
        return toy_train(client, tensors, round_number)

    (report,) = reports_of(fail)
    assert len(report.failures[0].reason) == 300
    assert report.failures[0].reason.endswith("xxx...")


def bad(**changes):
    return lambda update: Update(**{**vars(update), **changes})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda u: Update(u.client, {**u.tensors, "scale": torch.tensor(float("nan"))}, 1),
            "1 of 1 values of tensor scale",
        ),
        (lambda u: Update(u.client, {**u.tensors, "scale": torch.ones(1)}, 1), "tensor scale has shape (1,)"),
        (
            lambda u: Update(u.client, {**u.tensors, "scale": u.tensors["scale"].double()}, 1),
            "tensor scale is torch.float64",
        ),
        (lambda u: Update(u.client, {**u.tensors, "scale": u.tensors["scale"].bfloat16()}, 1), "BFloat16"),
        (lambda u: Update(u.client, {"scale": u.tensors["scale"]}, 1), "tensor adapter is missing"),
        (lambda u: Update(u.client, {**u.tensors, "extra": torch.ones(1)}, 1), "tensor extra is unknown here"),
        (bad(tensors={}), "tensor adapter, scale is missing"),
        (bad(examples=0), "its example count is 0"),
        (bad(examples=-5), "its example count is -5"),
        (bad(examples=True), "the example count is True"),
        (bad(examples=2.5), "the example count is 2.5"),
        (bad(examples=2**70), "the example count is 1180591620717411303424"),
        (bad(metrics={"num-examples": 3.0}), "num-examples, which Flower reserves"),
        (lambda u: u.tensors, "local_train returned dict; return a rounds.Update"),
        (lambda u: None, "local_train returned NoneType; return a rounds.Update"),
    ],
)
def test_a_bad_update_is_refused_with_its_client_and_the_others_are_averaged(spoil, reason):
    def local_train(client, tensors, round_number):
        update = toy_train(client, tensors, round_number)
        return spoil(update) if client == "pune" else update

    reports = []
    tensors = run_federation(
        start_tensors(), SITES, local_train, rounds=1, on_round=lambda report, _: reports.append(report)
    )
    (failure,) = reports[0].failures
    assert failure.client == "pune"
    assert reason in failure.reason
    assert "client pune" not in failure.reason  # the name stands beside it already
    assert_same_bits(tensors, plain_loop(["oslo", "lima"], range(1, 2)))


def test_all_clients_failing_is_an_error_that_names_them_and_never_an_empty_model():
    def fail(client, tensors, round_number):
        if client == "oslo":
            raise OSError(28, "No space left on device")
        return Update(client, {name: tensor * float("inf") for name, tensor in tensors.items()}, 1)

    rounds_done = []
    with pytest.raises(FederationError) as caught:
        run_federation(start_tensors(), SITES, fail, rounds=3, on_round=lambda report, _: rounds_done.append(report))
    assert str(caught.value).startswith(
        "round 1: 0 of 3 clients sent a usable update in 2 attempts, min_clients is 1 (oslo: OSError: "
    )
    assert "No space left on device; lima, pune: 16 of 16 values of tensor adapter are not finite" in str(caught.value)
    assert rounds_done == []


def test_fewer_usable_updates_than_asked_for_end_the_run_in_the_round_where_it_happens():
    def oslo_leaves(client, tensors, round_number):
        if client == "oslo" and round_number == 2:
            raise ConnectionError("gone")
        return toy_train(client, tensors, round_number)

    rounds_done = []
    with pytest.raises(FederationError, match=r"round 2: 2 of 3 .* min_clients is 3 \(oslo: ConnectionError: gone\)"):
        run_federation(
            start_tensors(),
            SITES,
            oslo_leaves,
            rounds=4,
            settings=FederationConfig(min_clients=3),
            on_round=lambda report, _: rounds_done.append(report.round),
        )
    assert rounds_done == [1]


def test_an_interrupt_in_a_client_stops_the_run_at_once_and_the_next_run_works():
    calls = []

    def interrupted(client, tensors, round_number):
        calls.append(client)
        if client == "lima":
            raise KeyboardInterrupt
        return toy_train(client, tensors, round_number)

    with pytest.raises(KeyboardInterrupt):
        run_federation(start_tensors(), SITES, interrupted, rounds=3)
    assert calls == ["oslo", "lima"]
    assert not logging.getLogger("flwr").disabled
    assert_same_bits(run_federation(start_tensors(), SITES, toy_train, rounds=2), plain_loop(SITES, range(1, 3)))


def test_what_on_round_raises_reaches_the_caller_as_it_is():
    def full_disk(report, tensors):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        run_federation(start_tensors(), SITES, toy_train, rounds=2, on_round=full_disk)


def test_a_missing_flower_is_said_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr.app", None)
    with pytest.raises(FederationError, match=r'needs Flower.*pip install "caravan\[federated\]"'):
        run_federation(start_tensors(), SITES, toy_train, rounds=1)


def test_a_missing_ray_is_said_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FederationError, match=r'needs Ray.*pip install "caravan\[ray\]" or use backend = "inprocess"'):
        run_federation(start_tensors(), SITES, toy_train, rounds=1, settings=FederationConfig(backend="ray"))
