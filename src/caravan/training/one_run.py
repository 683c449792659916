"""What the guesses about canaries prove: a lower bound on epsilon from one training (arXiv:2305.08846)."""

import dataclasses
import math
from dataclasses import dataclass

from torch import Tensor

from caravan.errors import PrivacyError
from caravan.training.accounting import Guarantee

# Of the canaries, guessed: at an epsilon of 2 to 4 more guesses are too unsure, and fewer prove too little.
_GUESSED = 0.2
_PRECISION = 1e-6  # of a bound


@dataclass(frozen=True)
class Audit:
    """What one attacked training showed.

    Attributes:
        canaries: how many coins there were.
        guesses: for how many of them a guess was made; set beforehand, not by what it brought.
        correct: how many guesses were right.
        confidence: of the lower bound.
        accounted: what the accountant allows.
    """

    canaries: int
    guesses: int
    correct: int
    confidence: float
    accounted: Guarantee

    @property
    def lower_bound(self) -> float:
        """An epsilon that the training exceeds, at this confidence and the accountant's delta."""
        return one_run_lower_bound(
            self.correct, self.guesses, self.accounted.delta, self.canaries, confidence=self.confidence
        )

    @property
    def ceiling(self) -> float:
        """What the lower bound would be had every guess been right."""
        return dataclasses.replace(self, correct=self.guesses).lower_bound

    @property
    def passed(self) -> bool:
        """Whether the accountant is not contradicted."""
        return self.lower_bound <= self.accounted.epsilon


def one_run_lower_bound(
    guesses_correct: int, guesses: int, delta: float, total_canaries: int, *, confidence: float = 0.95
) -> float:
    """Give the largest epsilon that so many correct guesses refute (arXiv:2305.08846, corollary 5.4, appendix D).

    Under (epsilon, delta)-differential privacy with q = 1 / (1 + exp(-epsilon)), the chance of v or more correct ones
    among r guesses of m coins is at most P[B >= v] + 2 m delta max_i P[v > B >= v - i] / i, where B is binomial (r, q).
    The number of guesses must not depend on which of them are right: choose it beforehand, or divide 1 - confidence by
    the number of choices that were tried.

    Args:
        guesses_correct: v.
        guesses: r, without abstentions.
        delta: in [0, 1).
        total_canaries: m, with abstentions; each was included by a fair coin of its own.
        confidence: chance with which the bound holds, in (0, 1).

    Returns:
        At least 0; no more than 1e-6 below the exact value.

    Raises:
        PrivacyError: the numbers contradict each other.
    """
    if not 0 <= guesses_correct <= guesses <= total_canaries:
        raise PrivacyError(
            f"{guesses_correct} of {guesses} guesses correct, of {total_canaries} canaries: each number must be at "
            "least the one before it; count again"
        )
    if not 0 <= delta < 1 or not 0 < confidence < 1:
        raise PrivacyError(f"delta = {delta}, confidence = {confidence}: must lie in (0, 1); 1e-5 and 0.95 are usual")

    def refuted(tried: float) -> bool:
        return _chance(guesses_correct, guesses, delta, total_canaries, tried) < 1 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def guesses_of(canaries: int) -> int:
    """Say for how many canaries a guess is made, an even number: beforehand, so that the bound holds."""
    return 2 * max(1, round(canaries * _GUESSED / 2))


def count_correct(scores: Tensor, included: Tensor, guesses: int) -> int:
    """Count how often the highest scores are included ones and the lowest are not, half of the guesses each."""
    order = scores.argsort()
    lowest, highest = order[: guesses // 2], order[len(order) - guesses // 2 :]
    return int(included[highest].sum()) + int((~included[lowest]).sum())


def _chance(correct: int, guesses: int, delta: float, canaries: int, tried: float) -> float:
    """Bound the chance of so many correct guesses or more under (tried, delta)-differential privacy."""
    likely = -math.log1p(math.exp(-tried))  # ln q
    unlikely = likely - tried  # ln (1 - q)
    ways = math.lgamma(guesses + 1)
    exactly = [
        math.exp(ways - math.lgamma(v + 1) - math.lgamma(guesses - v + 1) + v * likely + (guesses - v) * unlikely)
        for v in range(guesses + 1)
    ]
    steepest, below = 0.0, 0.0
    for distance in range(1, correct + 1):
        below += exactly[correct - distance]
        steepest = max(steepest, below / distance)
    return math.fsum(exactly[correct:]) + 2 * canaries * delta * steepest
