import pytest
import torch

from caravan.config import FederationConfig, PrivacyConfig
from caravan.errors import FederationError, PrivacyError
from caravan.federation.central_noise import CentralNoise
from caravan.federation.rounds import Update
from caravan.federation.strategies import Strategy
from caravan.training.accounting import Mechanism, epsilon
from toy_privacy import seeded

START = {"head.rows": torch.zeros(2, 2), "head.bias": torch.ones(2)}


def update(client, rows, bias=(1.0, 1.0), examples=1):
    return Update(client, {"head.rows": torch.tensor(rows), "head.bias": torch.tensor(bias)}, examples)


def noise(*, clients=2, rounds=3, asked=2, **settings):
    config = PrivacyConfig(**{"mode": "client-level", "noise_multiplier": 0.0, "clip": 5.0, **settings})
    return CentralNoise(config, clients, rounds, asked, source=seeded())


def test_steps_are_cut_and_each_client_weighs_the_same():
    # Of norm 5, left alone, and of norm 20 over both tensors, cut to 5; the counts are not looked at.
    small = update("a", [[3.0, 0.0], [0.0, 4.0]], examples=1000)
    large = update("b", [[16.0, 0.0], [0.0, 0.0]], bias=(13.0, 1.0))
    mean = noise().mean([small, large], START)
    torch.testing.assert_close(mean["head.rows"], torch.tensor([[(3 + 4) / 2, 0.0], [0.0, 2.0]]))
    torch.testing.assert_close(mean["head.bias"], torch.tensor([1 + 3 / 2, 1.0]))


def test_who_does_not_answer_changes_nothing_of_what_is_divided_by():
    mean = noise(asked=4).mean([update("a", [[3.0, 0.0], [0.0, 4.0]])], START)
    torch.testing.assert_close(mean["head.rows"], torch.tensor([[0.75, 0.0], [0.0, 1.0]]))


def test_the_noise_on_the_sum_is_sigma_times_the_clip():
    start = {"head.rows": torch.zeros(300, 300)}
    made = noise(noise_multiplier=2.0, clip=0.5, asked=4)
    mean = made.mean([Update("a", {"head.rows": torch.zeros(300, 300)}, 1)], start)
    assert float(mean["head.rows"].std()) == pytest.approx(2.0 * 0.5 / 4, rel=0.02)


def test_every_round_is_a_release_that_drawing_clients_does_not_amplify():
    made = noise(clients=100, rounds=7, noise_multiplier=3.0)
    assert made.delta == pytest.approx(100**-1.1)
    assert made.guarantee == epsilon([Mechanism(1.0, 3.0, 7)], made.delta)
    aimed = noise(clients=100, rounds=7, noise_multiplier=None, epsilon=4.0)
    assert 3.9 < aimed.guarantee.epsilon <= 4.0
    assert "for each client as a whole" in aimed.statement()


@pytest.mark.parametrize("settings", [{"noise_multiplier": None}, {"epsilon": 2.0}])
def test_noise_must_be_said_in_one_way(settings):
    with pytest.raises(PrivacyError, match=r"privacy\.epsilon or privacy\.noise_multiplier"):
        noise(**settings)


def test_a_round_without_updates_is_an_error():
    with pytest.raises(FederationError, match="no update to average"):
        noise().mean([], START)


def test_the_strategy_hands_its_updates_over():
    updates = [update("a", [[3.0, 0.0], [0.0, 4.0]], examples=9), update("b", [[1.0, 0.0], [0.0, 0.0]])]
    combined = Strategy(FederationConfig(), noise()).combine(1, updates, START)
    torch.testing.assert_close(combined["head.rows"], torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
