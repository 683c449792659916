"""What differentially private training costs: (epsilon, delta) of steps that are taken, by libraries' accountants.

Adjacency is "add or remove one unit" (an example, or a user) throughout. Two accountants give upper bounds by
construction and the tighter one is quoted; a third is shown beside them as a check (`caravan.training.accountants`).
Gaussian differential privacy (GDP) is an approximation that comes out too low, and is never computed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from caravan.errors import PrivacyError
from caravan.training.accountants import COARSE, FINEST, MOST_OF_PRV, Group, by_pld, by_prv, by_rdp

_LARGEST_NOISE = 1e6
_PRECISION = 1.001  # of a noise multiplier that is looked for, relative
_MOST_LINES = 12  # of interpolating before halving, which always ends


@dataclass(frozen=True)
class Mechanism:
    """Steps of the Poisson-subsampled Gaussian mechanism.

    Attributes:
        sampling: q in (0, 1], the chance with which each unit takes part in a step, independent of the others.
        noise_multiplier: sigma, the noise's standard deviation by the most that one unit changes the sum; 0 for none.
        steps: how many, 1 or more.
    """

    sampling: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.sampling <= 1:  # not a number fails, too
            raise PrivacyError(f"sampling = {self.sampling}: is a chance in (0, 1]; give batch size by examples")
        if not 0 <= self.noise_multiplier < math.inf:
            raise PrivacyError(f"noise_multiplier = {self.noise_multiplier}: must be a number of 0 or more; change it")
        if self.steps < 1 or self.steps != int(self.steps):
            raise PrivacyError(f"steps = {self.steps}: must be a whole number of 1 or more; count the steps")


@dataclass(frozen=True)
class Guarantee:
    """(epsilon, delta)-differential privacy under adding or removing one unit.

    Attributes:
        epsilon: infinity where nothing is guaranteed.
        delta: in (0, 1).
        accountant: whose bound it is, "PLD" or "RDP"; "none" where there is nothing to bound.
    """

    epsilon: float
    delta: float
    accountant: str

    def __str__(self) -> str:
        """Give it in words."""
        return f"epsilon = {in_figures(self.epsilon)} at delta = {self.delta:.3g} ({self.accountant})"


@dataclass(frozen=True)
class PaperGuarantee:
    """What the mode that clips and adds noise as arXiv:2509.16508 does is worth.

    Attributes:
        proved: of the mode itself.
        reasons: why it is no more than that.
        accounted: of DP-SGD with the same noise, sampling and steps, where every step is sampled, clipped by example
            and noised as the accountant takes it to be.
    """

    proved: Guarantee
    reasons: tuple[str, ...]
    accounted: Guarantee

    def __str__(self) -> str:
        """Give both in words."""
        if not self.reasons:
            return f"Proved: {self.proved}."
        return (
            f"Proved: epsilon = infinity, since {'; '.join(self.reasons)}. "
            f"DP-SGD with the same noise and without these faults would have {self.accounted}."
        )


def epsilon(mechanisms: Sequence[Mechanism], delta: float, *, rough: bool = False) -> Guarantee:
    """Compose mechanisms, taken one after the other on the same data, and give the tightest sound bound.

    Args:
        mechanisms: in any order.
        delta: in (0, 1).
        rough: a bound that is as sound and up to a percent higher, in a tenth of the time.

    Raises:
        PrivacyError: delta is out of range, or the extra "private" is not installed.
    """
    _check_delta(delta)
    return _guarantee(_grouped(mechanisms), delta, COARSE if rough else FINEST)


def epsilons(mechanisms: Sequence[Mechanism], delta: float) -> dict[str, float | None]:
    """Compose mechanisms by each accountant: "PLD", "RDP" and "PRV"; None where one has no answer.

    PLD has none above 10,000 and for delta below 1e-10, PRV (arXiv:2106.02848, its upper bound) none above 50.

    Raises:
        PrivacyError: delta is out of range, or the extra "private" is not installed.
    """
    _check_delta(delta)
    groups = _grouped(mechanisms)
    if not _is_finite(groups) or not groups:
        return dict.fromkeys(("PLD", "RDP", "PRV"), math.inf if groups else 0.0)
    rdp = by_rdp(groups, delta)
    given: dict[str, float | None] = {"PLD": by_pld(groups, delta, rdp, FINEST), "RDP": rdp, "PRV": None}
    if min(value for value in given.values() if value is not None) <= MOST_OF_PRV:
        given["PRV"] = by_prv(groups, delta)
    return {name: None if value is None or math.isinf(value) else value for name, value in given.items()}


def default_delta(units: int) -> float:
    """Give the chance of failure that is meant where none is said: n^-1.1, less than one unit of all of them.

    Raises:
        PrivacyError: there is no second unit to be mistaken for.
    """
    if units < 2:
        raise PrivacyError(f"examples = {units}: a single one cannot be hidden among others; give two or more")
    return units**-1.1


def noise_for(
    target_epsilon: float,
    delta: float,
    plan: Sequence[tuple[float, int]],
    spent: Sequence[Mechanism] = (),
    *,
    rough: bool = False,
) -> float:
    """Find the least noise multiplier with which a plan stays within an epsilon, to 0.1 % and never above it.

    Args:
        target_epsilon: more than 0.
        delta: in (0, 1).
        plan: (sampling, steps) pairs, all with the noise that is looked for.
        spent: what the same data has been used for before, where the target is to hold for all together.
        rough: stop where it is enough but may be some percent more than needed, in half of the time.

    Raises:
        PrivacyError: no noise is enough, a number is out of range, or the extra "private" is not installed.
    """
    _check_delta(delta)
    if not 0 < target_epsilon < math.inf:
        raise PrivacyError(f"epsilon = {target_epsilon}: the target must be a number above 0; 1 to 10 are usual")
    before = epsilon(spent, delta)
    if before.epsilon >= target_epsilon:
        raise PrivacyError(
            f"epsilon = {target_epsilon:g} is spent: what this data was used for comes to {before}; raise the target"
        )

    def by_noise(grid: float) -> Callable[[float], float]:
        def of(noise: float) -> float:
            planned = [Mechanism(sampling, noise, steps) for sampling, steps in plan]
            return _guarantee(_grouped([*spent, *planned]), delta, grid).epsilon

        return of

    # The coarse grid's noise is enough on the fine one too, and hardly more than the least.
    least = _least(by_noise(COARSE), target_epsilon, 1.0, ratio=2.0, precision=1.01 if rough else 1.003)
    if math.isfinite(least) and not rough:
        least = _least(by_noise(FINEST), target_epsilon, least, ratio=1.003, precision=_PRECISION)
    if math.isinf(least):
        raise PrivacyError(
            f"epsilon = {target_epsilon:g} leaves too little for this plan beside {before}; raise the target"
        )
    return least


def paper_guarantee(
    mechanism: Mechanism,
    delta: float,
    *,
    noise_free_steps: int = 0,
    clipping: Literal["batch", "example"] = "batch",
    private_quantile: bool = True,
    poisson: bool = False,
) -> PaperGuarantee:
    """Say what can be proved of the paper's mode, and what its noise would be worth in accounted DP-SGD.

    Args:
        mechanism: its noise, the share of the data in a batch, and its steps after the warm-up.
        delta: in (0, 1).
        noise_free_steps: of its warm-up on private data.
        clipping: of a batch's gradient, or of each example's.
        private_quantile: the clipping norm follows a quantile of the examples' norms that is taken without noise.
        poisson: batches are sampled, not dealt from a shuffled list.

    Raises:
        PrivacyError: as `epsilon` does.
    """
    reasons = []
    if noise_free_steps:
        reasons.append(f"the {noise_free_steps:,} steps of the warm-up add no noise")
    if clipping == "batch":
        reasons.append(
            "the gradient of a batch is clipped as a whole, so one example can turn it and the noise is not measured "
            "by what an example changes"
        )
    if private_quantile:
        reasons.append("the clipping norm follows a quantile of private norms that is taken without noise")
    if not poisson:
        reasons.append("shuffled batches are no Poisson sample, which the amplification by sampling needs")
    accounted = epsilon([mechanism], delta)
    proved = Guarantee(math.inf, delta, "none") if reasons else accounted
    return PaperGuarantee(proved, tuple(reasons), accounted)


def _grouped(mechanisms: Sequence[Mechanism]) -> tuple[Group, ...]:
    """Steps of equal sampling and noise as one, in a fixed order: the same history has the same bound to the bit."""
    steps: dict[tuple[float, float], int] = {}
    for each in mechanisms:
        kind = (float(each.sampling), float(each.noise_multiplier))
        steps[kind] = steps.get(kind, 0) + int(each.steps)
    return tuple(sorted((*kind, count) for kind, count in steps.items()))


def _is_finite(groups: Sequence[Group]) -> bool:
    return all(noise > 0 for _, noise, _ in groups)


@lru_cache(maxsize=4096)
def _guarantee(groups: tuple[Group, ...], delta: float, finest: float) -> Guarantee:
    if not groups:
        return Guarantee(0.0, delta, "none")
    if not _is_finite(groups):
        return Guarantee(math.inf, delta, "none")
    rdp = by_rdp(groups, delta)
    pld = by_pld(groups, delta, rdp, finest)
    if pld is not None and pld <= rdp:
        return Guarantee(pld, delta, "PLD")
    return Guarantee(rdp, delta, "RDP" if math.isfinite(rdp) else "none")


def _least(value: Callable[[float], float], target: float, start: float, *, ratio: float, precision: float) -> float:
    """Find the least x at which a falling function is no more than a target; never one at which it is more.

    Args:
        value: falls about like a power of x, so lines through logarithms lead near.
        target: above 0.
        start: where to look first.
        ratio: of the first step from there, until x lies between two of them; further ones are up to 2.
        precision: at most so many times the least x is given.

    Returns:
        Infinity where x would be above 1,000,000.
    """
    low = high = start
    at_low = at_high = value(start)
    while at_low <= target:
        high, at_high = low, at_low
        low /= ratio
        at_low = value(low)
        ratio = min(ratio * ratio, 2.0)
    while at_high > target:
        low, at_low = high, at_high
        high *= ratio
        ratio = min(ratio * ratio, 2.0)
        if high > _LARGEST_NOISE:
            return math.inf
        at_high = value(high)
    turns = 0
    while high / low > precision:
        turns += 1
        middle = math.sqrt(low * high)
        if turns < _MOST_LINES and at_high > 0 and math.isfinite(at_low):
            share = math.log(at_low / target) / math.log(at_low / at_high)
            crossing = low * (high / low) ** share
            # A hair beside it, towards the end that is farther away, so that both ends come close.
            beside = crossing * precision ** (0.4 if high / crossing > crossing / low else -0.4)
            middle = beside if low < beside < high else middle
        at_middle = value(middle)
        if at_middle <= target:
            high, at_high = middle, at_middle
        else:
            low, at_low = middle, at_middle
    return high


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise PrivacyError(f"delta = {delta}: must lie between 0 and 1; below 1 by the number of examples is usual")


def in_figures(value: float) -> str:
    """Write an epsilon with four figures, rounded up: what is printed is still guaranteed."""
    if math.isinf(value):
        return "infinity"
    digits = 0 if value >= 1000 or not value else min(3 - math.floor(math.log10(value)), 9)
    return f"{math.ceil(round(value * 10**digits, 6)) / 10**digits:,.{digits}f}"
