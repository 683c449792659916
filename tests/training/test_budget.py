import math

import pytest

from caravan.config import PrivacyConfig
from caravan.data.records import Example
from caravan.errors import PrivacyError
from caravan.training.accounting import Mechanism, epsilon
from caravan.training.budget import Budget
from caravan.training.ledger import read_ledger

EXAMPLES = [Example(f"query {number}", ("d0",), columns={"user": f"u{number % 20}"}) for number in range(100)]


@pytest.fixture
def budget(tmp_path):
    def make(examples=EXAMPLES, epochs=None, folder=tmp_path / "ledger", **settings):
        config = PrivacyConfig(**{"mode": "dp-sgd", "batch": 25, **settings})
        paper = {"head": 10, "adapter": 5}
        return Budget(examples, config, epochs or {"head": 3, "adapter": 2}, folder=folder, paper_batch=paper)

    return make


def test_a_plan_has_the_rate_and_the_steps_that_the_mechanism_takes(budget):
    plan = budget(noise_multiplier=1.5).plan
    assert (plan.sampling, plan.sigma) == (0.25, 1.5)
    assert plan.steps == {"head": 12, "adapter": 8}  # 100 queries, 25 a step
    assert plan.delta == pytest.approx(100**-1.1)
    assert plan.mechanisms == [Mechanism(0.25, 1.5, 12), Mechanism(0.25, 1.5, 8)]
    assert plan.guarantee.epsilon == pytest.approx(epsilon([Mechanism(0.25, 1.5, 20)], plan.delta).epsilon, rel=1e-3)


def test_users_are_counted_where_they_are_the_unit(budget):
    plan = budget(noise_multiplier=1.5, unit="user", user_column="user", batch=5).plan
    assert (plan.sampling, plan.steps["head"]) == (0.25, 12)
    assert plan.delta == pytest.approx(20**-1.1)


def test_a_target_epsilon_is_met_by_both_stages_together_and_never_exceeded(budget):
    plan = budget(epsilon=3.0).plan
    assert 2.9 < plan.guarantee.epsilon <= 3.0


@pytest.mark.parametrize("settings", [{}, {"epsilon": 3.0, "noise_multiplier": 1.0}])
def test_noise_must_be_said_in_one_way(budget, settings):
    with pytest.raises(PrivacyError, match=r"needs privacy\.epsilon or privacy\.noise_multiplier"):
        budget(**settings)


def test_steps_are_in_the_ledger_before_they_are_taken(budget, tmp_path):
    made = budget(noise_multiplier=1.5)
    assert read_ledger(tmp_path / "ledger") == []
    so_far = made.steps("head").spend(4)
    ((ledger, entries),) = read_ledger(tmp_path / "ledger")
    assert [(entry.stage, entry.mechanism) for entry in entries] == [("head", Mechanism(0.25, 1.5, 4))]
    assert so_far is not None
    assert so_far >= ledger.guarantee(made.plan.delta).epsilon > 0


def test_what_was_spent_on_the_data_before_counts_for_all_later_trainings(budget):
    first = budget(noise_multiplier=1.5)
    first.steps("head").spend(12)
    second = budget(examples=EXAMPLES[1:], noise_multiplier=1.5)  # one query fewer is no new data
    second.steps("head").spend(12)
    both = second.facts()["all_runs"]["epsilon"]
    assert both == pytest.approx(epsilon([Mechanism(0.25, 1.5, 12), second.plan.mechanisms[0]], 99**-1.1).epsilon)
    assert both > first.plan.guarantee.epsilon * 0.99


def test_a_cap_refuses_a_training_before_its_first_step_and_writes_nothing(budget, tmp_path):
    made = budget(epsilon=3.0, epsilon_cap=2.0)
    with pytest.raises(PrivacyError, match=r"epsilon_cap is 2; nothing was done"):
        made.check(["head", "adapter"])
    assert read_ledger(tmp_path / "ledger") == []
    made.check([])  # nothing more to do: nothing is crossed


def test_a_cap_that_another_training_has_reached_meanwhile_stops_at_the_next_epoch(budget):
    made, other = budget(epsilon=3.0, epsilon_cap=3.2), budget(epsilon=3.0)
    made.check(["head", "adapter"])
    other.steps("head").spend(12)
    other.steps("adapter").spend(8)
    with pytest.raises(PrivacyError, match=r"the cap is 3\.2"):
        made.steps("head").spend(4)


def test_a_stage_keeps_its_steps_from_round_to_round(budget):
    made = budget(noise_multiplier=1.5)
    assert made.steps("head") is made.steps("head")
    assert made.steps("head") is not made.steps("adapter")


def test_no_noise_is_no_guarantee_and_saved_as_none(budget):
    facts = budget(noise_multiplier=0.0).facts()
    assert facts["epsilon"] is None
    assert budget(noise_multiplier=0.0).steps("head").spend(4) is None


def test_the_papers_mode_says_why_it_guarantees_nothing_and_what_its_noise_would_be_worth(budget, tmp_path):
    made = budget(mode="paper", epochs={"head": 10, "adapter": 10})
    facts = made.facts()
    assert facts["epsilon"] is None
    assert len(facts["reasons"]) >= 3
    assert facts["accounted"]["epsilon"] > 100
    assert math.isinf(made.paper().proved.epsilon)
    assert "no guarantee" in made.statement()
    made.steps("head")
    ((_, entries),) = read_ledger(tmp_path / "ledger")
    assert [entry.mechanism for entry in entries] == [Mechanism(0.1, 0.0, 100)]  # 10 epochs of 10 batches, no proof


def test_a_statement_names_epsilon_delta_unit_and_what_is_not_protected(budget):
    text = budget(epsilon=3.0).statement()
    for word in (
        "epsilon = ",
        "delta = ",
        "PLD",
        "each training query",
        "dp-sgd",
        "number of queries",
        "not protected",
    ):
        assert word in text


def test_there_must_be_queries(budget):
    with pytest.raises(PrivacyError, match="no training queries"):
        budget(examples=[], epsilon=3.0)
