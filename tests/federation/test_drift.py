"""How much updates agree, by hand; and what the last average undid."""

import pytest
import torch

from caravan.federation.diagnosis import undone_share
from caravan.federation.drift import Drift
from caravan.federation.rounds import Update

START = {"a": torch.ones(2), "b": torch.ones(())}


def agreement(*changes, weights=(1, 1, 1)):
    drift = Drift(START)
    updates = [
        Update(str(number), {"a": START["a"] + torch.tensor(change[:2]), "b": START["b"] + change[2]}, weight)
        for number, (change, weight) in enumerate(zip(changes, weights, strict=False))
    ]
    assert list(drift.watch(updates)) == updates
    return drift


def test_changes_agree_wholly_not_at_all_or_undo_each_other():
    same = agreement([3.0, 0.0, 4.0], [3.0, 0.0, 4.0])
    assert same.norms == {"0": 5.0, "1": 5.0}
    assert same.agreement == pytest.approx(1)
    assert agreement([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]).agreement == pytest.approx(1 / 3)
    assert agreement([1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]).agreement == pytest.approx(0)


def test_examples_weigh():
    drift = agreement([4.0, 0.0, 0.0], [0.0, 4.0, 0.0], weights=(3, 1))
    assert drift.agreement == pytest.approx((9 + 1) / 16)


def test_one_change_agrees_with_nothing():
    assert agreement([1.0, 0.0, 0.0]).agreement is None
    assert agreement([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]).agreement is None


def told(*losses):
    return [{"clients": ["x"], "metrics": [{"first_loss": first, "last_loss": last}]} for first, last in losses]


def test_only_the_latest_average_counts():
    assert undone_share(told((3.0, 1.0), (2.0, 1.0))) == pytest.approx(0.5)
    assert undone_share(told((3.0, 1.0), (3.0, 1.0), (1.0, 0.5))) == 0
    assert undone_share(told((3.0, 1.0))) is None
    assert undone_share([{"clients": ["x"], "metrics": [{}]}] * 2) is None
