import math
from fractions import Fraction

import pytest
import torch

from caravan.errors import PrivacyError
from caravan.training.accounting import Guarantee
from caravan.training.one_run import Audit, count_correct, guesses_of, one_run_lower_bound


def chance(correct: int, guesses: int, delta: Fraction, canaries: int, epsilon: float) -> float:
    """Corollary 5.4 of arXiv:2305.08846 in exact fractions, term by term as it is printed."""
    q = Fraction(1 / (1 + math.exp(-epsilon)))

    def between(low: int, high: int) -> Fraction:
        terms = range(max(low, 0), high)
        return sum((math.comb(guesses, v) * q**v * (1 - q) ** (guesses - v) for v in terms), Fraction(0))

    steepest = max((between(correct - i, correct) / i for i in range(1, canaries + 1)), default=Fraction(0))
    return float(between(correct, guesses + 1) + 2 * canaries * delta * steepest)


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "delta", "printed"),
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
)
def test_the_bound_is_the_one_that_the_paper_prints(canaries, guesses, correct, delta, printed):
    # Appendix D and section 7 of arXiv:2305.08846.
    assert one_run_lower_bound(correct, guesses, delta, canaries) == pytest.approx(printed, abs=1e-3)


def test_ten_right_guesses_prove_what_can_be_worked_out_by_hand():
    # All ten are right with chance q^10, which is 0.05 at q = 0.05^0.1.
    q = 0.05**0.1
    assert one_run_lower_bound(10, 10, 0.0, 10) == pytest.approx(math.log(q / (1 - q)), abs=2e-6)


@pytest.mark.parametrize(
    ("correct", "guesses", "canaries", "delta", "confidence"),
    [(30, 30, 60, Fraction(1, 1000), 0.95), (27, 30, 60, Fraction(1, 1000), 0.95), (45, 60, 60, Fraction(0), 0.99)],
)
def test_the_bound_is_where_exact_sums_cross_the_level(correct, guesses, canaries, delta, confidence):
    bound = one_run_lower_bound(correct, guesses, float(delta), canaries, confidence=confidence)
    assert bound > 0.1
    assert chance(correct, guesses, delta, canaries, bound) < 1 - confidence
    assert chance(correct, guesses, delta, canaries, bound + 2e-6) >= 1 - confidence


def test_the_bound_exceeds_the_truth_as_seldom_as_is_promised():
    # Answers by randomised response of epsilon 1 are right with chance q, each by itself: the worst that there is.
    guesses, q = 60, 1 / (1 + math.exp(-1.0))
    wrong = sum(
        math.comb(guesses, correct) * q**correct * (1 - q) ** (guesses - correct)
        for correct in range(guesses + 1)
        if one_run_lower_bound(correct, guesses, 0.0, guesses) > 1.0
    )
    assert 0.01 < wrong <= 0.05


def test_delta_and_more_abstentions_and_more_confidence_lower_the_bound():
    plain = one_run_lower_bound(90, 100, 1e-5, 1000)
    assert plain > one_run_lower_bound(90, 100, 1e-4, 1000) > 0
    assert plain > one_run_lower_bound(90, 100, 1e-5, 4000) > 0
    assert plain > one_run_lower_bound(90, 100, 1e-5, 1000, confidence=0.99) > 0


@pytest.mark.parametrize(("correct", "guesses"), [(0, 0), (0, 10), (5, 10), (50, 100)])
def test_guesses_that_are_no_better_than_chance_prove_nothing(correct, guesses):
    assert one_run_lower_bound(correct, guesses, 1e-5, 100) == 0.0


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ((11, 10, 0.0, 20), "11 of 10 guesses correct, of 20 canaries"),
        ((5, 30, 0.0, 20), "5 of 30 guesses correct, of 20 canaries"),
        ((5, 10, 1.0, 20), r"delta = 1\.0, confidence = 0\.95: must lie in"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(numbers, says):
    with pytest.raises(PrivacyError, match=says):
        one_run_lower_bound(*numbers)


def test_the_highest_scores_are_told_in_and_the_lowest_out():
    included = torch.tensor([True, False, True, False, True, False])
    scores = torch.tensor([0.9, 0.8, 0.5, 0.4, 0.1, 0.2])
    # In: 0.9 (right) and 0.8 (wrong); out: 0.1 (wrong) and 0.2 (right); the two between are not guessed.
    assert count_correct(scores, included, 4) == 2
    assert count_correct(scores, included, 2) == 1


def test_a_fifth_of_the_canaries_is_guessed_and_always_an_even_number():
    assert [guesses_of(canaries) for canaries in (2, 10, 99, 1000)] == [2, 2, 20, 200]


def test_an_audit_passes_up_to_what_is_accounted():
    audit = Audit(1000, 200, 190, 0.95, Guarantee(3.0, 1e-5, "PLD"))
    assert audit.lower_bound == one_run_lower_bound(190, 200, 1e-5, 1000) < 3.0 < audit.ceiling
    assert audit.passed
    assert not Audit(1000, 200, 190, 0.95, Guarantee(audit.lower_bound - 1e-9, 1e-5, "PLD")).passed
    assert audit.ceiling == one_run_lower_bound(200, 200, 1e-5, 1000)
