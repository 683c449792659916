"""A thousand clients in one process: the memory of a few, and the result of the few that hold the same data."""

import tracemalloc

import pytest
import torch

from caravan.config import FederationConfig
from caravan.federation.flower import run_federation
from caravan.federation.rounds import Update
from toy_federation import start_tensors, toy_train

GROUPS = [f"site {letter}" for letter in "abcdefghij"]


def test_a_thousand_clients_come_to_the_result_of_the_ten_that_hold_the_same_data():
    def train_as_group(client, tensors, number):
        update = toy_train(GROUPS[int(client) % len(GROUPS)], tensors, number)
        return Update(client, update.tensors, update.examples)

    ten = run_federation(start_tensors(), GROUPS, toy_train, rounds=2)
    thousand = run_federation(start_tensors(), [str(place) for place in range(1000)], train_as_group, rounds=2)
    for name, tensor in ten.items():
        torch.testing.assert_close(thousand[name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(("strategy", "little"), [("fedavg", True), ("fedadam", True), ("median", False)])
def test_replies_are_kept_only_where_the_strategy_needs_all_of_them(strategy, little):
    clients, numbers = [str(place) for place in range(100)], 50_000

    def train(client, tensors, number):
        return Update(client, {"head": tensors["head"] + int(client)}, 1)

    settings = FederationConfig(strategy=strategy, byzantine_clients=1)
    run_federation({"head": torch.zeros(1)}, clients[:3], train, rounds=1, settings=settings)  # imports do not count
    tracemalloc.start()
    try:
        run_federation({"head": torch.zeros(numbers)}, clients, train, rounds=1, settings=settings)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    replies = 4 * numbers * len(clients)
    assert (peak < replies / 2) is little, f"{peak} bytes at the most, all replies have {replies}"
