"""A plan's figures are those of the accountants, its ratio is the definition's, and its advice holds when followed."""

import json
import math

import pytest

from caravan.app.planning import make_plan, noise_to_signal, trained_numbers
from caravan.config import config_from_dict
from caravan.errors import PrivacyError
from caravan.training.accounting import Mechanism, default_delta, epsilon


def test_a_plan_for_an_epsilon_stays_within_it_and_takes_the_steps_of_its_epochs():
    plan = make_plan(4_472, 10, 512, target_epsilon=3.0)
    assert plan.mechanism.steps == 90  # 4,472 / 512 is 8.7
    assert plan.mechanism.sampling == 512 / 4_472
    assert 2.98 < plan.guarantee.epsilon <= 3
    assert float(f"{plan.mechanism.noise_multiplier:.4g}") == plan.mechanism.noise_multiplier  # as it is printed
    assert plan.guarantee.delta == pytest.approx(4_472**-1.1) == default_delta(4_472)
    assert plan.guarantee == epsilon([plan.mechanism], plan.guarantee.delta)
    assert plan.by_accountant["PLD"] == plan.guarantee.epsilon
    assert plan.by_accountant["PLD"] < plan.by_accountant["PRV"] < plan.by_accountant["RDP"]
    assert plan.noise_to_signal is plan.runs_within_cap is plan.numbers is None


def test_a_plan_for_noise_gives_the_textbook_s_epsilon():
    plan = make_plan(60_000, 60, 256, noise_multiplier=1.1, delta=1e-5)
    assert plan.guarantee.epsilon == pytest.approx(2.38, rel=0.02)
    assert plan.mechanism == Mechanism(256 / 60_000, 1.1, 60 * 234)


def test_noise_to_signal_is_the_length_of_the_noise_on_a_mean_of_the_batch():
    # 10,000 numbers with a deviation of 2 C have length 200 C; a batch of 50 gradients of length C adds up to 50 C.
    assert noise_to_signal(Mechanism(0.05, 2.0, 7), 1_000, 10_000) == pytest.approx(4)
    plan = make_plan(1_000, 1, 50, noise_multiplier=2.0, numbers=10_000)
    assert plan.noise_to_signal == pytest.approx(4)
    assert any("4.0 times as long as its gradient" in sentence for sentence in plan.advice)


def test_runs_within_a_cap_are_as_many_as_fit_and_no_more():
    plan = make_plan(1_000, 2, 100, noise_multiplier=2.0, cap=6.0)
    count = plan.runs_within_cap
    assert count is not None
    both = [Mechanism(0.1, 2.0, 20 * times) for times in (count, count + 1)]
    delta = plan.guarantee.delta
    assert epsilon(both[:1], delta).epsilon <= 6 < epsilon(both[1:], delta).epsilon
    assert any(f"{count} times on the same data" in sentence for sentence in plan.advice)


def test_a_training_beyond_the_cap_and_one_that_hardly_counts_are_named():
    assert make_plan(1_000, 2, 100, noise_multiplier=2.0, cap=0.1).runs_within_cap == 0
    often = make_plan(1_000, 1, 1, noise_multiplier=1e4, cap=1.0)
    assert often.runs_within_cap == 1_000
    assert any("1,000 or more times" in sentence for sentence in often.advice)


def test_advice_names_what_promises_nothing():
    assert "Without noise nothing is guaranteed" in make_plan(100, 1, 10, noise_multiplier=0.0).advice[0]
    assert "above 10" in make_plan(100, 10, 10, noise_multiplier=0.3).advice[0]
    assert any("published outright" in each for each in make_plan(100, 1, 10, noise_multiplier=2.0, delta=0.01).advice)
    for sentence in make_plan(100, 1, 100, noise_multiplier=8.0).advice:
        assert "batch" not in sentence  # of all examples already, and one epoch


def test_the_advised_batch_and_epochs_keep_the_epsilon_with_the_noise_that_is_named():
    plan = make_plan(4_472, 10, 512, noise_multiplier=1.6)
    batch, epochs = plan.advice
    assert batch.startswith("A batch of 2,048 in place of 512 needs sigma ")
    assert epochs.startswith("5 epochs in place of 10 needs sigma ")
    for sentence, mechanism in ((batch, (2_048 / 4_472, 20)), (epochs, (512 / 4_472, 45))):
        noise = float(sentence.split("sigma ")[1].split(",")[0])
        found = epsilon([Mechanism(mechanism[0], noise, mechanism[1])], plan.guarantee.delta)
        assert found.epsilon == pytest.approx(plan.guarantee.epsilon, rel=0.02)


def test_numbers_are_those_of_head_and_adapter_and_of_the_head_alone():
    settings = {"adapter": {"kind": "core", "rank": 8}, "head": {"hidden": 0}}
    head = 77 * 384 + 77 + 1  # rows, biases, scale
    assert trained_numbers(config_from_dict(settings), 77) == head + 8 * 8
    assert trained_numbers(config_from_dict({**settings, "training": {"mode": "head"}}), 77) == head
    assert trained_numbers(config_from_dict({**settings, "adapter": {"kind": "none"}}), 77) == head


def test_a_plan_is_written_as_json_even_where_nothing_is_guaranteed():
    written = json.dumps(make_plan(100, 1, 10, noise_multiplier=0.0).to_dict(), allow_nan=False)
    assert json.loads(written)["guarantee"] == {"epsilon": "infinity", "delta": 100**-1.1, "accountant": "none"}
    assert json.loads(written)["by_accountant"] == dict.fromkeys(("PLD", "RDP", "PRV"), "infinity")


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        ((100, 1, 200), {"noise_multiplier": 1.0}, "batch = 200 is more than the 100 examples"),
        ((1, 1, 1), {"noise_multiplier": 1.0}, "examples = 1"),
        ((100, 1, 10), {"noise_multiplier": -1.0}, "noise_multiplier = -1.0"),
        ((100, 1, 10), {"target_epsilon": 0.0}, "epsilon = 0.0"),
        ((100, 1, 10), {"noise_multiplier": 1.0, "delta": math.nan}, "delta = nan"),
    ],
)
def test_a_plan_of_impossible_numbers_is_refused(arguments, options, says):
    with pytest.raises(PrivacyError, match=says):
        make_plan(*arguments, **options)
