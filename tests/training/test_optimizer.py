import pytest
import torch
from torch.nn import Parameter

from caravan.config import AdapterStageConfig, HeadStageConfig
from caravan.training.optimizer import make_optimizer, rate_factor

PARAMETERS = {
    "adapter.matrix": Parameter(torch.zeros(2, 2)),
    "head.rows": Parameter(torch.zeros(3, 2)),
    "head.bias": Parameter(torch.zeros(3)),
    "head.log_scale": Parameter(torch.zeros(())),
}


def test_the_schedule_warms_up_and_falls_as_worked_out_by_hand():
    factors = [rate_factor(step, 10, 0.3) for step in range(10)]
    # min(1, (step + 1) / 3) * (1 + cos(18 degrees * step)) / 2
    expected = [
        1 / 3 * 1.0,
        2 / 3 * (1 + 0.9510565) / 2,
        (1 + 0.8090170) / 2,
        (1 + 0.5877853) / 2,
        (1 + 0.3090170) / 2,
        0.5,
        (1 - 0.3090170) / 2,
        (1 - 0.5877853) / 2,
        (1 - 0.8090170) / 2,
        (1 - 0.9510565) / 2,
    ]
    assert factors == pytest.approx(expected, abs=1e-7)


def test_the_schedule_ends_near_zero_and_never_leaves_its_bounds():
    factors = [rate_factor(step, 1000, 0.1) for step in range(1000)]
    assert 0 < factors[-1] < 1e-5
    assert max(factors) <= 1
    assert factors.index(max(factors)) == 99  # the last step of the warm-up: from there on the cosine falls
    assert factors[99:] == sorted(factors[99:], reverse=True)


def test_a_single_step_goes_at_full_rate():
    assert rate_factor(0, 1, 0.1) == 1
    assert rate_factor(0, 1, 0.0) == 1


def test_the_head_and_the_adapter_have_their_own_rates_and_only_the_heads_matrices_decay():
    settings = AdapterStageConfig(learning_rate=1e-3, head_learning_rate=2e-2, weight_decay=0.3)
    groups = make_optimizer(PARAMETERS, settings, "adamw").param_groups
    assert [group["params"] for group in groups] == [[parameter] for parameter in PARAMETERS.values()]
    assert [group["lr"] for group in groups] == [1e-3, 2e-2, 2e-2, 2e-2]
    assert [group["weight_decay"] for group in groups] == [0, 0.3, 0, 0]


def test_sgd_has_no_momentum():
    optimizer = make_optimizer(PARAMETERS, HeadStageConfig(learning_rate=0.5), "sgd")
    assert type(optimizer) is torch.optim.SGD
    assert {group["momentum"] for group in optimizer.param_groups} == {0}
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
