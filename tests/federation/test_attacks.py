"""What clients that lie or break can do to the others: nothing where they are refused, little where outvoted."""

import math
from typing import get_args

import pytest
import torch

from caravan.config import FederationConfig, StrategyName
from caravan.federation.flower import run_federation
from caravan.federation.rounds import Update
from toy_federation import assert_same_bits

STRATEGIES = get_args(StrategyName)
CLIENTS = [f"client {index}" for index in range(12)]
START = {"adapter": torch.eye(4), "head": torch.ones(30)}
BOUNDS = {"max_update_norm": 10.0, "max_examples": 100}


def honest(client: str, tensors: dict[str, torch.Tensor], number: int) -> Update:
    """A step in a direction that all share, of about 1.7 in norm, and a little of the client's own."""
    generator = torch.Generator().manual_seed(100 * number + CLIENTS.index(client))
    moved = {
        name: tensor + 0.25 + 0.05 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()
    }
    return Update(client, moved, 10 + CLIENTS.index(client))


def poisoned(value):
    def attack(update, tensors):
        update.tensors["head"][3] = value
        return update

    return attack


def moved(factor):
    """The honest step times a factor."""

    def attack(update, tensors):
        steps = {name: tensor + factor * (update.tensors[name] - tensor) for name, tensor in tensors.items()}
        return Update(update.client, steps, update.examples)

    return attack


ATTACKS = {
    "nan": (poisoned(float("nan")), "values of tensor head are not finite"),
    "inf": (poisoned(float("inf")), "values of tensor head are not finite"),
    "scaled": (moved(1e6), "its update has norm"),
    "wrong shape": (
        lambda update, tensors: Update(update.client, {**update.tensors, "head": torch.ones(29)}, 1),
        "tensor head has shape (29,)",
    ),
    "inflated count": (
        lambda update, tensors: Update(update.client, update.tensors, 10**9),
        "its example count is 1000000000, max_examples is 100",
    ),
    "no count": (lambda update, tensors: Update(update.client, update.tensors, 0), "its example count is 0"),
}


def run(clients, *, attackers=(), attack=None, rounds=1, **settings):
    """The global tensors after some rounds, and the reports."""
    reports = []

    def local_train(client, tensors, number):
        update = honest(client, tensors, number)
        return attack(update, tensors) if client in attackers else update

    config = FederationConfig(**settings)
    on_round = lambda report, _: reports.append(report)  # noqa: E731
    return run_federation(START, clients, local_train, rounds=rounds, settings=config, on_round=on_round), reports


def distance(ours, theirs) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(ours[name] - theirs[name])) for name in theirs))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ATTACKS)
def test_a_refused_attack_changes_nothing_against_the_same_rounds_without_its_client(strategy, kind):
    attack, reason = ATTACKS[kind]
    settings = {"strategy": strategy, "byzantine_clients": 1, **BOUNDS}
    attacked, reports = run(CLIENTS, attackers=CLIENTS[4:5], attack=attack, rounds=2, **settings)
    without, _ = run([*CLIENTS[:4], *CLIENTS[5:]], rounds=2, **settings)
    assert_same_bits(attacked, without)
    for report in reports:
        (failure,) = report.failures
        assert failure.client == CLIENTS[4]
        assert reason in failure.reason
        assert report.clients == (*CLIENTS[:4], *CLIENTS[5:])


@pytest.mark.parametrize("kind", ["scaled", "inflated count"])
def test_without_bounds_the_average_is_at_the_mercy_of_one_client(kind):
    # So that the test above is about the bounds: the same attacks, not refused, take the average over.
    attack = moved(1e6) if kind == "scaled" else lambda u, t: Update(u.client, moved(-1)(u, t).tensors, 10**9)
    clean, _ = run(CLIENTS)
    attacked, (report,) = run(CLIENTS, attackers=CLIENTS[4:5], attack=attack)
    assert report.failures == ()
    assert distance(attacked, clean) > distance(clean, START)


# Two of ten (of twelve for bulyan, which needs eleven) send the opposite of what they learnt. Distances are shares of
# the honest step: 0 is where the honest clients alone would be, 1 where the round began.
FLIPPED = {
    "fedavg": 10,
    "fedprox": 10,
    "fedavgm": 10,
    "median": 10,
    "trimmed_mean": 10,
    "krum": 10,
    "multi_krum": 10,
    "bulyan": 12,
}
LITTLE, VISIBLE = 0.25, 0.3


def off_course(strategy, attack):
    clients = CLIENTS[: FLIPPED[strategy]]
    settings = {"strategy": strategy, "byzantine_clients": 2}
    attacked, _ = run(clients, attackers=(clients[1], clients[6]), attack=attack, **settings)
    course, _ = run([client for client in clients if client not in (clients[1], clients[6])])
    return distance(attacked, course) / distance(course, START)


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedavgm"])
def test_two_of_ten_clients_that_flip_their_step_move_an_average_visibly(strategy):
    assert off_course(strategy, moved(-1)) > VISIBLE


@pytest.mark.parametrize("strategy", ["median", "trimmed_mean", "krum", "multi_krum", "bulyan"])
@pytest.mark.parametrize("factor", [-1.0, -100.0, 1e6])
def test_two_of_ten_clients_that_flip_or_blow_up_their_step_hardly_move_a_robust_strategy(strategy, factor):
    assert off_course(strategy, moved(factor)) < LITTLE


@pytest.mark.parametrize("strategy", ["median", "trimmed_mean", "krum", "multi_krum"])
def test_seven_of_ten_clients_that_flip_their_step_win_against_any_strategy(strategy):
    # The limit of the promise, and the proof that the measure above can be large for a robust strategy too.
    clients = CLIENTS[:10]
    attacked, _ = run(clients, attackers=clients[3:], attack=moved(-1), strategy=strategy, byzantine_clients=2)
    course, _ = run(clients[:3])
    assert distance(attacked, course) / distance(course, START) > VISIBLE
