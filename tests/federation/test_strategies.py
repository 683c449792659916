"""Every strategy against values worked out in NumPy, not by Flower."""

import math
from typing import get_args

import numpy as np
import pytest
import torch

from caravan.config import FederationConfig, StrategyName
from caravan.errors import FederationError
from caravan.federation.flower import run_federation
from caravan.federation.rounds import Update, average
from caravan.federation.strategies import Strategy, proximal_mu
from toy_federation import SITES, assert_same_bits, start_tensors, toy_train

OPTIMIZERS = ("fedavgm", "fedadam", "fedyogi")
ROBUST = ("median", "trimmed_mean", "krum", "multi_krum", "bulyan")
COUNT = 11  # what bulyan needs against two


@pytest.fixture(scope="module", autouse=True)
def _flower_is_loaded():
    run_federation({"head": torch.ones(1)}, ["a"], lambda client, tensors, _: Update(client, tensors, 1), rounds=1)


def make(name: str, **settings) -> Strategy:
    return Strategy(FederationConfig(strategy=name, **{"byzantine_clients": 2, **settings}))


def updates(count: int = COUNT, *, dtype: torch.dtype = torch.float32) -> list[Update]:
    generator = torch.Generator().manual_seed(2)
    return [
        Update(
            f"client {index:02}",
            {
                "adapter": torch.randn(3, 4, generator=generator).to(dtype),
                "scale": torch.randn((), generator=generator).to(dtype),
            },
            index + 1,
        )
        for index in range(count)
    ]


REFERENCE = {"adapter": torch.full((3, 4), 0.5), "scale": torch.tensor(2.0)}


def flat(tensors) -> np.ndarray:
    return np.concatenate([tensor.double().numpy().ravel() for tensor in tensors.values()])


def stacked(given: list[Update]) -> np.ndarray:
    return np.stack([flat(update.tensors) for update in given])


def krum_order(rows: np.ndarray, byzantine: int) -> list[int]:
    """Rows by their sum of squared distances to their n - f - 2 nearest others (Blanchard et al., 2017)."""
    squared = ((rows[:, None] - rows[None]) ** 2).sum(axis=2)
    scores = [np.sort(np.delete(squared[i], i))[: len(rows) - byzantine - 2].sum() for i in range(len(rows))]
    return np.argsort(scores).tolist()


def expected(name: str, rows: np.ndarray) -> np.ndarray:
    match name:
        case "median":
            return np.sort(rows, axis=0)[COUNT // 2]
        case "trimmed_mean":
            return np.sort(rows, axis=0)[2:-2].mean(axis=0)
        case "krum":
            return rows[krum_order(rows, 2)[0]]
        case "multi_krum":
            return rows[krum_order(rows, 2)[: COUNT - 2 - 2]].mean(axis=0)
        case _:  # bulyan: 7 by Krum, and of these, in each place, the mean of the 3 that are nearest to the median
            chosen = rows[krum_order(rows, 2)[:7]]
            near = np.argsort(np.abs(chosen - np.median(chosen, axis=0)), axis=0)[:3]
            return np.take_along_axis(chosen, near, axis=0).mean(axis=0)


@pytest.mark.parametrize("name", ROBUST)
def test_a_robust_strategy_gives_what_its_paper_says(name):
    given = updates()
    np.testing.assert_allclose(
        flat(make(name).combine(1, given, REFERENCE)), expected(name, stacked(given)), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("name", ROBUST)
def test_a_robust_strategy_does_not_look_at_example_counts(name):
    given = updates()
    boasting = [Update(given[3].client, given[3].tensors, 10**9) if i == 3 else u for i, u in enumerate(given)]
    assert_same_bits(make(name).combine(1, boasting, REFERENCE), make(name).combine(1, given, REFERENCE))


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_fedavg_and_fedprox_are_our_average(name):
    assert_same_bits(make(name).combine(1, updates(), REFERENCE), average(updates()))


def test_krum_is_not_misled_by_tensors_that_are_far_from_zero():
    # In float32 the squared norms, 1e10, would swallow distances around 1.
    far = {"head": torch.full((50,), 1e4)}
    generator = torch.Generator().manual_seed(5)
    given = [Update(f"{i}", {"head": far["head"] + torch.randn(50, generator=generator)}, 1) for i in range(9)]
    best = krum_order(np.stack([flat(update.tensors) for update in given]), 2)[0]
    assert_same_bits(make("krum").combine(1, given, far), given[best].tensors)


def test_fedavgm_without_momentum_and_at_rate_1_is_the_average():
    strategy = make("fedavgm", server_momentum=0.0)
    assert_same_bits(strategy.combine(1, updates(), REFERENCE), average(updates()))
    assert strategy.state() == {}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_server_optimizer_takes_the_steps_of_its_paper_over_rounds(name):
    strategy = make(name, server_learning_rate=0.3, server_momentum=0.8, server_second_momentum=0.95)
    theta, tensors, m, v = flat(REFERENCE), REFERENCE, 0.0, 0.0
    for number in (1, 2, 3):
        given = [Update(u.client, {k: t * number for k, t in u.tensors.items()}, u.examples) for u in updates(4)]
        tensors = strategy.combine(number, given, tensors)
        change = flat(average(given)) - theta
        if name == "fedavgm":
            m = 0.8 * m + change
            theta = theta + 0.3 * m
        else:
            m = 0.8 * m + 0.2 * change
            square = change**2
            v = 0.95 * v + 0.05 * square if name == "fedadam" else v - 0.05 * square * np.sign(v - square)
            # Flower corrects FedAdam's start as if the first round were the second.
            rate = 0.3 * (math.sqrt(1 - 0.95 ** (number + 1)) / (1 - 0.8 ** (number + 1)) if name == "fedadam" else 1)
            theta = theta + rate * m / (np.sqrt(v) + 1e-3)
        np.testing.assert_allclose(flat(tensors), theta, rtol=1e-5)
        theta = flat(tensors)
    assert {tensor.dtype for tensor in strategy.state().values()} == {torch.float64}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_server_optimizer_goes_on_to_the_same_bits_and_a_fresh_one_does_not(name):
    whole = make(name)
    after = whole.combine(1, updates(4), REFERENCE)
    state = whole.state()
    end = whole.combine(2, updates(5), after)
    resumed, fresh = make(name), make(name)
    resumed.restore(dict(reversed(state.items())))  # a file may give the names in another order
    assert_same_bits(resumed.combine(2, updates(5), after), end)
    assert not torch.equal(fresh.combine(2, updates(5), after)["adapter"], end["adapter"])
    for tensor in state.values():
        tensor.zero_()
    assert_same_bits(resumed.state(), whole.state())


@pytest.mark.parametrize("name", get_args(StrategyName))
def test_the_result_does_not_depend_on_who_answered_first_and_keeps_names_shapes_and_dtypes(name):
    for dtype in (torch.float64, torch.float32, torch.float16):
        given, reference = updates(dtype=dtype), {key: tensor.to(dtype) for key, tensor in REFERENCE.items()}
        combined = make(name).combine(1, given, reference)
        assert [(key, t.shape, t.dtype) for key, t in combined.items()] == [
            (key, t.shape, t.dtype) for key, t in reference.items()
        ]
        assert_same_bits(make(name).combine(1, given[::-1], reference), combined)


@pytest.mark.parametrize("name", get_args(StrategyName))
def test_names_may_come_in_any_order(name):
    given, reference = updates(), {"a": REFERENCE["adapter"], "b": 2 * REFERENCE["adapter"]}
    given = [Update(u.client, {"a": u.tensors["adapter"], "b": -u.tensors["adapter"]}, u.examples) for u in given]
    turned = [
        Update(u.client, dict(reversed(u.tensors.items())) if index % 2 else u.tensors, u.examples)
        for index, u in enumerate(given)
    ]
    strategies = make(name), make(name)
    for number in (1, 2):
        ours, theirs = (s.combine(number, sent, reference) for s, sent in zip(strategies, (turned, given), strict=True))
        assert_same_bits(ours, theirs)
        reference = ours
    backwards = dict(reversed(reference.items()))
    assert list(make(name).combine(1, given, backwards)) == ["b", "a"]


@pytest.mark.parametrize("name", get_args(StrategyName))
def test_clients_that_change_nothing_change_nothing(name):
    still = [Update(f"{index}", {key: t.clone() for key, t in REFERENCE.items()}, 1 + index) for index in range(COUNT)]
    assert_same_bits(make(name).combine(1, still, REFERENCE), REFERENCE)


def test_an_overflow_of_finite_updates_is_an_error_that_names_the_strategy():
    huge = [Update(name, {"head": torch.tensor([1e308], dtype=torch.float64)}, 100) for name in ("a", "b")]
    with pytest.raises(FederationError, match=r'round 4: strategy = "fedavg" makes tensor head overflow; .*_norm'):
        make("fedavg").combine(4, huge, {"head": torch.zeros(1, dtype=torch.float64)})


def test_only_fedprox_pulls_the_clients():
    assert {name: proximal_mu(FederationConfig(strategy=name, proximal_mu=0.3)) for name in get_args(StrategyName)} == {
        name: 0.3 if name == "fedprox" else 0.0 for name in get_args(StrategyName)
    }


@pytest.mark.parametrize("name", [name for name in get_args(StrategyName) if name not in ROBUST])
def test_a_whole_run_of_a_strategy_is_its_steps_one_after_another(name):
    settings = FederationConfig(strategy=name)
    by_hand, tensors = Strategy(settings), start_tensors()
    for number in (1, 2, 3):
        tensors = by_hand.combine(number, [toy_train(site, tensors, number) for site in SITES], tensors)
    assert_same_bits(run_federation(start_tensors(), SITES, toy_train, rounds=3, settings=settings), tensors)


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedavgm"])
def test_rows_that_a_client_left_alone_do_not_hold_the_others_back_where_that_is_asked_for(strategy):
    start = {"rows": torch.zeros(2, 3)}
    updates = [
        Update("lima", {"rows": torch.tensor([[1.0, 2, 3], [0, 0, 0]])}, 1),
        Update("oslo", {"rows": torch.tensor([[0.0, 0, 0], [4, 5, 6]])}, 9),
    ]
    settings = FederationConfig(strategy=strategy, rows="trained", server_momentum=0.0)
    joined = Strategy(settings).combine(1, updates, start)
    torch.testing.assert_close(joined["rows"], torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
