"""What an epoch shows of itself is what it would be by hand, and says nothing of what privacy hides."""

import math

import pytest
import torch
from torch.nn import Parameter

from caravan.training.vitals import EpochRecord, Vitals, promised_decrease, round_metrics


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_what_a_step_promises_is_the_gradient_times_the_step(kind):
    source = torch.Generator().manual_seed(0)
    parameters = [Parameter(torch.randn(5, 3, generator=source)), Parameter(torch.randn((), generator=source))]
    groups = [{"params": [each], "lr": 0.1, "weight_decay": 0.2} for each in parameters]
    optimizer = torch.optim.SGD(groups) if kind == "sgd" else torch.optim.AdamW(groups)
    if kind == "sgd":
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
    for _ in range(3):
        for each in parameters:
            each.grad = torch.randn(each.shape, generator=source)
        before = [each.detach().clone() for each in parameters]
        optimizer.step()
        expected = sum(
            float((each.grad * (old - each.detach())).sum()) for each, old in zip(parameters, before, strict=True)
        )
        assert promised_decrease(optimizer) == pytest.approx(expected, rel=1e-4)


def test_a_cut_gradient_promises_by_its_whole_length():
    parameter = Parameter(torch.zeros(1))
    optimizer, vitals = torch.optim.SGD([parameter], lr=0.5), Vitals(steps=1)
    parameter.grad = torch.ones(1)
    vitals.see_gradient(4.0, most=1.0)
    optimizer.step()
    vitals.see_decrease(optimizer)
    assert vitals.close(queries=1, private=False, padded=False)["predicted_decrease"] == 2.0  # 4 times 0.5 * 1 * 1


def test_an_epoch_is_the_mean_of_its_steps():
    vitals = Vitals()
    for loss, count, norm in ((2.0, 3, 3.0), (1.0, 1, 4.0)):
        vitals.see_loss(loss, count)
        vitals.see_gradient(norm, most=3.5)
        vitals.steps += 1
    vitals.see_lengths([[0, 1], [2]], [4, 2, 1], torch.device("cpu"))
    found = vitals.close(queries=4, private=False, padded=True)
    assert (found["loss"], found["first_loss"], found["clipped"]) == (1.75, 2.0, 0.5)
    assert found["gradient_norm"] == pytest.approx(math.sqrt(12.5))
    assert found["padding"] == pytest.approx(1 - 7 / 9)
    assert vitals == Vitals()


def test_texts_that_go_through_apart_are_not_padded_to_each_other():
    vitals = Vitals()
    vitals.see_lengths([[0, 1, 2]], [400, 2, 1], torch.device("cpu"))
    assert vitals.close(queries=3, private=False, padded=True)["padding"] == pytest.approx(1 - 403 / 404)


def test_the_signal_is_found_under_noise():
    source, vitals = torch.Generator().manual_seed(0), Vitals()
    for _ in range(200):
        vitals.see_noised([0.05 + 0.1 * torch.randn(1000, generator=source), None], 0.1)
        vitals.steps += 1
    found = vitals.close(queries=1, private=True, padded=True)
    assert found["noise_norm"] == pytest.approx(0.1 * math.sqrt(1000))
    assert found["gradient_norm"] == pytest.approx(0.05 * math.sqrt(1000), rel=0.05)
    hidden = ("loss", "first_loss", "clipped", "predicted_decrease", "padding")
    assert [found[name] for name in hidden] == [None] * 5


def test_no_signal_below_what_noise_lets_be_seen_is_claimed():
    vitals = Vitals(steps=1)
    vitals.see_noised([torch.zeros(50)], 1.0)
    found = vitals.close(queries=1, private=True, padded=False)
    assert found["gradient_norm"] == pytest.approx(100**0.25)  # (√(2 * 50))^½


def test_a_round_sums_what_adds_up_and_averages_the_rest():
    first = EpochRecord("head", 0, 2.0, None, 1.0, gradient_norm=3.0, predicted_decrease=0.5, first_loss=2.5)
    second = EpochRecord("head", 1, 1.0, None, 2.0, gradient_norm=1.0, predicted_decrease=0.25, first_loss=1.5)
    assert round_metrics([first, second]) == {
        "loss": 1.5,
        "first_loss": 2.5,
        "last_loss": 1.0,
        "seconds": 3.0,
        "gradient_norm": 2.0,
        "predicted_decrease": 0.75,
    }
    assert round_metrics([EpochRecord("head", 0, None, None, 1.0)]) == {"seconds": 1.0}
