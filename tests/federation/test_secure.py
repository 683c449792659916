import io

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.serverapp import ServerApp

from caravan.config import FederationConfig
from caravan.errors import FederationError
from caravan.federation.flower import run_federation
from caravan.federation.messages import decode, encode
from caravan.federation.rounds import Failure
from caravan.federation.secure import draw_masks, mask, secure_sum
from caravan.federation.simulation import run_in_process
from toy_federation import SITES, reports_of, start_tensors, toy_train

START = {"head": torch.linspace(-1, 1, 12).reshape(3, 4), "adapter": torch.eye(3)}
COUNTS = (10, 30, 60)


def step(place: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(place)
    return {name: 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in START.items()}


def play(train=None, *, clients=3, seen=None, max_examples=100):
    """One round over so many clients; the server's view of it, and the messages that it got."""
    app, sums = ClientApp(), []

    @app.train(mods=[mask])
    def answer(message, context):
        place = int(context.node_config["partition-id"])
        if train is not None and (answered := train(place)) is not None:
            return Message(answered, reply_to=message)
        received = decode(message.content.array_records["arrays"])
        moved = {name: tensor + step(place)[name] for name, tensor in received.items()}
        metrics = MetricRecord({"num-examples": COUNTS[place % len(COUNTS)]})
        return Message(RecordDict({"arrays": encode(moved), "metrics": metrics}), reply_to=message)

    def listening(message, context):
        reply = app(message, context)
        if seen is not None:
            seen.append(reply)
        return reply

    server = ServerApp()

    @server.main()
    def main(grid, context):
        words = ConfigRecord({"max_examples": max_examples})
        messages = [
            Message(RecordDict({"arrays": encode(START), "config": words}), node, MessageType.TRAIN)
            for node in grid.get_node_ids()
        ]
        sums.append(secure_sum(grid, messages, START, number=1, max_examples=max_examples, timeout=60.0))

    run_in_process(server, listening, clients)
    return sums[0]


def failure(reason: str) -> RecordDict:
    return RecordDict({"config": ConfigRecord({"failure": reason})})


def mean_step(places) -> dict[str, torch.Tensor]:
    counts = [COUNTS[place % len(COUNTS)] for place in places]
    return {
        name: sum(count * step(place)[name] for count, place in zip(counts, places, strict=True)) / sum(counts)
        for name in START
    }


def assert_change(ours, theirs):
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-4, msg=name)


def test_the_server_gets_the_weighted_mean_of_what_changed():
    secured = play()
    assert secured.failures == {}
    assert secured.nodes == {2, 3, 4}
    assert set(secured.sent) == {2, 3, 4}
    assert min(secured.sent.values()) > 8 * (12 + 9)  # masked numbers are sent as 64 bits
    assert_change(secured.change, mean_step(range(3)))


def test_no_message_to_the_server_shows_an_update_or_a_count():
    seen = []
    play(seen=seen)
    vectors = []
    for reply in seen:
        for name, record in reply.content.array_records.items():
            assert list(record) == [], name
        for record in reply.content.metric_records.values():
            assert all(value == 1 for key, value in record.items() if key == "num_examples")
        for record in reply.content.config_records.values():
            masked = record.get(Key.MASKED_PARAMETERS, [])
            vectors += [np.load(io.BytesIO(part)).ravel() for part in masked]
    numbers = np.concatenate([vector for vector in vectors if vector.size > 1]) / 2**32
    assert numbers.size == 3 * (12 + 9)
    # Unmasked, all of them would lie within a few thousandths of each other.
    assert numbers.std() > 0.2


def test_a_client_that_fails_is_left_out_and_the_others_sum_is_unmasked():
    secured = play(lambda place: failure("no data") if place == 3 else None, clients=4)
    assert secured.failures == {5: "no data"}
    assert secured.nodes == {2, 3, 4}
    assert_change(secured.change, mean_step(range(3)))


def test_with_too_few_left_nothing_is_unmasked():
    secured = play(lambda place: failure("no data") if place else None, clients=4)
    assert secured.change is None
    assert secured.nodes == frozenset()
    assert set(secured.failures.values()) == {"no data"}


@pytest.mark.parametrize(
    ("value", "count", "reason"),
    [
        (5.0, 10, "tensor head changed by more than 4"),
        (float("nan"), 10, "tensor head changed by more than 4"),
        (0.1, 101, "its example count is above max_examples = 100"),
    ],
)
def test_a_client_refuses_what_would_be_cut_off_or_spoil_the_sum(value, count, reason):
    def train(place):
        if place:
            return None
        tensors = {**START, "head": START["head"] + value}
        return RecordDict({"arrays": encode(tensors), "metrics": MetricRecord({"num-examples": count})})

    secured = play(train, clients=4)
    assert reason in secured.failures[2]
    assert secured.nodes == {3, 4, 5}


def test_a_message_without_the_protocol_is_answered_as_ever():
    message = Message(RecordDict({"arrays": ArrayRecord()}), 2, MessageType.TRAIN)
    assert mask(message, None, lambda message, context: "the answer") == "the answer"


SECURE = FederationConfig(secure_aggregation=True, max_examples=10)


def test_a_federated_run_comes_to_the_same_tensors_with_and_without():
    plain = run_federation(start_tensors(), SITES, toy_train, rounds=3)
    masked = run_federation(start_tensors(), SITES, toy_train, rounds=3, settings=SECURE)
    for name, tensor in plain.items():
        torch.testing.assert_close(masked[name], tensor, rtol=0, atol=1e-4, msg=name)


def test_the_reports_of_a_masked_run_know_who_but_not_how_much():
    (report,) = reports_of(toy_train, settings=SECURE)
    assert report.asked == report.clients == tuple(SITES)
    assert report.examples == (0, 0, 0)
    assert report.metrics == ({}, {}, {})
    assert report.bytes_up == sum(counts["up"] for counts in report.traffic.values()) > 0


def test_a_client_that_fails_is_reported_and_the_others_are_summed():
    def train(client, tensors, number):
        if client == "lima":
            raise ValueError("no data")
        return toy_train(client, tensors, number)

    masked = run_federation(start_tensors(), SITES, train, rounds=1, settings=SECURE)
    plain = run_federation(start_tensors(), [site for site in SITES if site != "lima"], toy_train, rounds=1)
    for name, tensor in plain.items():
        torch.testing.assert_close(masked[name], tensor, rtol=0, atol=1e-4, msg=name)
    (report,) = reports_of(train, settings=SECURE)
    assert report.clients == ("oslo", "pune")
    assert report.failures == (Failure("lima", "ValueError: no data"),)


def test_with_too_few_clients_left_the_round_is_tried_again_and_then_the_run_ends():
    calls = []

    def train(client, tensors, number):
        calls.append(client)
        if client != "oslo":
            raise ValueError("no data")
        return toy_train(client, tensors, number)

    with pytest.raises(FederationError, match=r"round 1: 0 of 3 clients .* in 2 attempts.*lima, pune: ValueError"):
        run_federation(start_tensors(), SITES, train, rounds=1, settings=SECURE)
    assert calls.count("oslo") == 2


def test_masks_come_from_the_whole_secret_and_fill_the_range():
    # Flower's own fold a secret into 32 bits by exclusive or: these two would give the same masks.
    first, second = bytes(range(32)), bytes(range(4, 32)) + bytes(range(4))
    shapes = [(1000,), (), (3, 5)]
    one, again, other = (draw_masks(secret, 2**32, shapes) for secret in (first, first, second))
    assert [array.shape for array in one] == shapes
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not np.array_equal(one[0], other[0])
    assert 0.45 < one[0].mean() / 2**32 < 0.55
    assert max(array.max() for array in draw_masks(first, 2**8, shapes)) < 2**8
