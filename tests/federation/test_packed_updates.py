"""Federated rounds whose updates are sent as packed changes."""

import pytest
import torch

from caravan.config import FederationConfig
from caravan.federation.flower import run_federation
from caravan.federation.rounds import Update
from toy_federation import SITES, assert_same_bits, start_tensors, toy_train


def rounds_with(codec, local_train=toy_train, *, rounds=3, initial=None):
    reports = []
    tensors = run_federation(
        initial or start_tensors(),
        SITES,
        local_train,
        rounds=rounds,
        settings=FederationConfig(codec=codec),
        seed=5,
        on_round=lambda report, tensors: reports.append(report),
    )
    return tensors, reports


def largest_difference(ours, theirs):
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


@pytest.mark.parametrize(("codec", "step"), [("float32", 1e-6), ("float16", 5e-3), ("int8", 0.1)])
def test_packed_rounds_come_near_those_that_send_whole_tensors(codec, step):
    whole, _ = rounds_with("none")
    packed, reports = rounds_with(codec)
    assert largest_difference(packed, whole) < step
    assert not any(report.failures for report in reports)
    assert largest_difference(whole, start_tensors()) > 1  # what the steps are to be compared with


def test_int8_sends_a_quarter_of_the_bytes_and_float16_half():
    initial = {"rows": torch.zeros(300, 256)}

    def train(client, tensors, number):
        return Update(client, {"rows": tensors["rows"] + torch.ones(300, 256)}, 1)

    sent = {codec: rounds_with(codec, train, rounds=1, initial=initial)[1][0] for codec in ("none", "float16", "int8")}
    whole = 3 * 300 * 256 * 4
    assert sent["none"].bytes_up == pytest.approx(whole, rel=0.01)
    assert sent["float16"].bytes_up == pytest.approx(whole / 2, rel=0.01)
    assert sent["int8"].bytes_up == pytest.approx(whole / 4 + 3 * 300 * 4, rel=0.03)  # with one scale a row
    assert all(report.bytes_down == pytest.approx(whole, rel=0.01) for report in sent.values())  # the first round


def test_packing_follows_from_the_seed():
    assert_same_bits(rounds_with("int8")[0], rounds_with("int8")[0])


def test_what_a_round_could_not_send_is_sent_later():
    """One large number makes the steps coarse; what is smaller than a step adds up over the rounds all the same."""
    initial = {"row": torch.zeros(1, 64)}
    change = torch.full((1, 64), 0.3)
    change[0, 0] = 127.0

    def train(client, tensors, number):
        return Update(client, {"row": tensors["row"] + change}, 1)

    for rounds in (1, 20):
        tensors, _ = rounds_with("int8", train, rounds=rounds, initial=initial)
        assert float((tensors["row"] - rounds * change).abs().max()) <= 1.01  # a step, however many rounds there were


@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_a_change_that_cannot_be_packed_is_that_clients_failure_alone(codec):
    def train(client, tensors, number):
        update = toy_train(client, tensors, number)
        return Update(client, {"adapter": update.tensors["adapter"]}, 1) if client == "lima" else update

    _, reports = rounds_with(codec, train, rounds=1)
    assert [failure.client for failure in reports[0].failures] == ["lima"]
    assert "scale" in reports[0].failures[0].reason
    assert reports[0].clients == ("oslo", "pune")
