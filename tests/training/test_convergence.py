"""The bound's terms by hand, and FedAvg on quadratics with known constants, which must stay under them."""

import math
from dataclasses import replace

import numpy as np
import pytest

from caravan.errors import TrainingError
from caravan.training.convergence import Ingredients, best_rate, bound, largest_rate, noise_power
from quadratics import Quadratics, simulate

CURVATURES = np.array([4.0, 1.0, 0.25])
START = np.array([3.0, -2.0, 4.0])
ALIKE = Quadratics(CURVATURES, np.zeros((4, 3)))
APART = Quadratics(CURVATURES, np.array([[1.0, 0, 0], [-1, 0, 0], [0, 2, 0], [0, -2, 0]]))


def test_the_terms_are_those_worked_out_by_hand():
    one = Ingredients(smoothness=2, gap=3, variance=5, noise=7, owners=0.5)
    found = bound(one, 0.1, 10)
    # 2·3/(0.1·10), 0.1·2·5/2, nothing, nothing, 7·0.1·2/2
    assert (found.descent, found.variance, found.drift, found.clipping) == pytest.approx((6, 0.5, 0, 0))
    assert found.noise == pytest.approx(0.7)
    assert (found.floor, found.total) == pytest.approx((1.2, 7.2))


def test_local_steps_and_clipping_bring_their_terms_by_hand():
    one = Ingredients(smoothness=1, gap=1, variance=1, dissimilarity=2, clipping_bias=0.5, noise=3, local_steps=2)
    found = bound(one, 0.1, 100)  # kappa = 4 · 0.01 · 2 = 0.08, c = 1 / (1 - 0.16 / 0.92) = 0.92 / 0.76
    c, apart = 0.92 / 0.76, 2 * 0.01 / 0.92
    assert found.descent == pytest.approx(c * 0.2)
    assert found.variance == pytest.approx(c * 0.1)
    assert found.drift == pytest.approx(c * apart * (1 + 4 * 2 * 2))
    assert found.clipping == pytest.approx(c * 2 * 0.25 / 0.92)
    assert found.noise == pytest.approx(c * 3 * (0.1 + apart))


def test_the_largest_rate_is_one_over_the_smoothness_and_less_with_local_steps():
    one = Ingredients(smoothness=5, gap=1)
    assert largest_rate(one) == pytest.approx(0.2)
    assert largest_rate(replace(one, local_steps=4)) == pytest.approx(0.2 / (2 * math.sqrt(3 * 12)))
    with pytest.raises(TrainingError, match=r"up to 0\.2"):
        bound(one, 0.21, 10)


def test_the_noise_of_private_steps_is_that_of_their_numbers_by_hand():
    assert noise_power(1.5, 2.0, 10.0, 100) == pytest.approx(100 * 0.09)


@pytest.mark.parametrize("wrong", [{"gap": -1.0}, {"variance": math.nan}, {"smoothness": 0.0}, {"local_steps": 0}])
def test_what_is_no_constant_of_a_loss_is_refused(wrong):
    with pytest.raises(TrainingError):
        Ingredients(**{"smoothness": 1.0, "gap": 1.0, **wrong})


def test_without_any_noise_the_gradient_falls_as_one_over_the_steps_and_stays_under_the_bound():
    flat = Quadratics(np.geomspace(0.1, 1, 60), np.zeros((1, 60)))
    start = 1 / np.sqrt(flat.curvatures)
    one = flat.ingredients(start)
    means, limits = [], []
    for steps in (100, 1000):
        curve = simulate(flat, start, rate=best_rate(one, steps), steps=steps, runs=1)
        means.append(curve.mean())
        limits.append(bound(one, best_rate(one, steps), steps))
    assert limits[0].floor == 0
    assert limits[0].total == pytest.approx(10 * limits[1].total)
    assert all(mean <= limit.total for mean, limit in zip(means, limits, strict=True))
    assert means[0] / means[1] == pytest.approx(10, rel=0.01)


def test_with_variance_the_balanced_rate_gives_a_fall_as_one_over_the_root_of_the_steps():
    one = ALIKE.ingredients(START, variance=400.0)
    means = []
    for steps in (500, 8000):
        rate = best_rate(one, steps)
        assert rate < largest_rate(one)
        curve = simulate(ALIKE, START, rate=rate, steps=steps, spread=20.0, runs=20)
        limit = bound(one, rate, steps)
        assert limit.descent == pytest.approx(limit.variance)
        assert curve.mean() <= limit.total
        means.append(curve.mean())
    # Between the 4 of 1 / √T and a little more: descent on a quadratic ends sooner than the bound knows.
    assert 3.5 < means[0] / means[1] < 6


def test_noise_leaves_a_floor_that_the_steps_do_not_remove_and_the_rate_does():
    floors = []
    for rate in (0.2, 0.02):
        one = ALIKE.ingredients(START, noise=9.0)
        curve = simulate(ALIKE, START, rate=rate, steps=3000, noise=3.0)
        early, late = curve[1500:2250].mean(), curve[2250:].mean()
        assert early == pytest.approx(late, rel=0.1)
        # Of x ← (1 - eta h) x - eta z, h² Var x = eta h nu²_j / (2 - eta h), over k owners.
        exact = sum(rate * h * 3 / (2 - rate * h) for h in CURVATURES) / 4
        assert late == pytest.approx(exact, rel=0.1)
        assert late <= bound(one, rate, 2000).noise
        floors.append(late)
    assert floors[0] > 8 * floors[1]


def test_clipping_of_skewed_gradients_leaves_a_floor_that_no_rate_removes():
    line = Quadratics(np.array([1.0]), np.zeros((1, 1)))
    clip, share = 1.0, 0.1

    def skewed(source, shape):  # -1/3 or 3, of mean 0 and variance 1
        return np.where(source.random(shape) < share, 3.0, -1 / 3)

    # E clip(x + d) is 0 where 0.9 (x - 1/3) + 0.1 = 0, that is at x = 2/9: the squared gradient there is 4/81.
    late = [
        simulate(line, np.array([0.5]), rate=rate, steps=8000, spread=1.0, clip=clip, draw=skewed, runs=20)[4000:]
        for rate in (0.02, 0.002)
    ]
    assert late[1].mean() == pytest.approx(4 / 81, rel=0.1)
    # The bias where it goes, from 0 to 0.5: |0.9 (x - 1/3) + 0.1 - x| = 0.2 + 0.1 x.
    one = line.ingredients(np.array([0.5]), variance=1.0, clipping_bias=0.25)
    limit = bound(one, 0.002, 8000)
    assert late[1].mean() <= limit.clipping
    assert bound(one, 0.0002, 8000).clipping == limit.clipping
    assert late[0].mean() <= bound(one, 0.02, 8000).total


@pytest.mark.parametrize("local_steps", [1, 2, 8])
@pytest.mark.parametrize("share", [1.0, 0.1])
def test_owners_that_differ_stay_under_the_bound_and_drift_more_with_more_local_steps(local_steps, share):
    one = APART.ingredients(START, variance=1.0, noise=0.25, local_steps=local_steps)
    assert one.dissimilarity == pytest.approx((2 * 16 + 2 * 4) / 4)  # by hand: 4·1 twice, 1·2 twice, squared
    rate, steps = share * largest_rate(one), 800
    curve = simulate(APART, START, rate=rate, steps=steps, local_steps=local_steps, spread=1.0, noise=0.5)
    limit = bound(one, rate, steps)
    assert curve.mean() <= limit.total
    assert (limit.drift > 0) == (local_steps > 1)
