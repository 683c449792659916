"""What differentially private training costs: (epsilon, delta) of steps that are taken, by libraries' accountants.

Adjacency is "add or remove one unit" (an example, or a user) throughout. Two accountants give upper bounds by
construction and the tighter one is quoted: privacy loss distributions (PLD; dp-accounting) and Renyi differential
privacy (RDP; dp-accounting). Opacus' PRV is shown beside them as a check: it looks at removal alone, and its source
says that its domain departs from the theory. Gaussian differential privacy (GDP) is an approximation that comes out
too low, and is never computed.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from caravan.errors import PrivacyError

_FINEST = 1e-4  # the grid of privacy losses; each coarser one takes every tenth point, so its bound is never the lower
_COARSE = 1e-3  # 0.4 % above the finest one on 14,000 steps of epsilon 2.4, and ten times as fast
_LEAST_DELTA_OF_PLD = 1e-10  # rounding errors of the Fourier transform stay far below this
_MOST_OF_PLD = 1e4  # an epsilon above says nothing; a finer bound of it is not worth the memory
_MOST_OF_PRV = 50.0  # Opacus' grid does not grow with epsilon: above, minutes
_LARGEST_NOISE = 1e6
_PRECISION = 1.001  # of a noise multiplier that is looked for, relative
# dp-accounting's orders end at 1.1 below; what has very little noise is bound best by orders near 1.
_ORDERS = (
    *(1.01, 1.02, 1.03, 1.05),
    *(1 + tenths / 10 for tenths in range(1, 100)),
    *range(11, 64),
    *(64, 72, 80, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024),
)

Group = tuple[float, float, int]  # sampling, noise multiplier, steps


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


def epsilon(mechanisms: Sequence[Mechanism], delta: float) -> Guarantee:
    """Compose mechanisms, taken one after the other on the same data, and give the tightest sound bound.

    Args:
        mechanisms: in any order.
        delta: in (0, 1).

    Raises:
        PrivacyError: delta is out of range, or the extra "private" is not installed.
    """
    _check_delta(delta)
    return _guarantee(_grouped(mechanisms), delta, _FINEST)


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
    by_rdp = _by_rdp(groups, delta)
    by_pld = _by_pld(groups, delta, by_rdp, _FINEST)
    given: dict[str, float | None] = {"PLD": by_pld, "RDP": by_rdp, "PRV": None}
    if min(value for value in given.values() if value is not None) <= _MOST_OF_PRV:
        given["PRV"] = _by_prv(groups, delta)
    return {name: None if value is None or math.isinf(value) else value for name, value in given.items()}


def noise_for(
    target_epsilon: float, delta: float, plan: Sequence[tuple[float, int]], spent: Sequence[Mechanism] = ()
) -> float:
    """Find the least noise multiplier with which a plan stays within an epsilon, to 0.1 % and never above it.

    Args:
        target_epsilon: more than 0.
        delta: in (0, 1).
        plan: (sampling, steps) pairs, all with the noise that is looked for.
        spent: what the same data has been used for before, where the target is to hold for all together.

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

    def within(grid: float) -> Callable[[float], bool]:
        def holds(noise: float) -> bool:
            planned = [Mechanism(sampling, noise, steps) for sampling, steps in plan]
            return _guarantee(_grouped([*spent, *planned]), delta, grid).epsilon <= target_epsilon

        return holds

    high = 1.0
    while not within(_COARSE)(high):
        high *= 2
        if high > _LARGEST_NOISE:
            raise PrivacyError(
                f"epsilon = {target_epsilon:g} leaves too little for this plan beside {before}; raise the target"
            )
    # The coarse grid's noise is enough on the fine one too, and hardly more than the least.
    near = _least(within(_COARSE), high, ratio=2.0, precision=1.003)
    return _least(within(_FINEST), near, ratio=1.003, precision=_PRECISION)


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
    by_rdp = _by_rdp(groups, delta)
    by_pld = _by_pld(groups, delta, by_rdp, finest)
    if by_pld is not None and by_pld <= by_rdp:
        return Guarantee(by_pld, delta, "PLD")
    return Guarantee(by_rdp, delta, "RDP" if math.isfinite(by_rdp) else "none")


def _by_rdp(groups: Sequence[Group], delta: float) -> float:
    """Mironov, Talwar, Zhang (arXiv:1908.10530); its conversion is that of arXiv:2004.00010, proposition 12."""
    _require("dp_accounting")
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant, compute_epsilon

    accountant = RdpAccountant(_ORDERS)
    with _silent():
        try:
            for sampling, noise, steps in groups:
                accountant.compose(PoissonSampledDpEvent(sampling, GaussianDpEvent(noise)), steps)
        except (OverflowError, ZeroDivisionError):  # next to no noise
            return math.inf
        # What rounding has made negative, or no number, would count as epsilon 0: such an order is left out.
        bounds = [value if value >= 0 else math.inf for value in map(float, accountant._rdp)]
        return float(compute_epsilon(_ORDERS, bounds, delta)[0])


def _by_pld(groups: Sequence[Group], delta: float, by_rdp: float, finest: float) -> float | None:
    """Koskela et al. (arXiv:1906.03049), pessimistic by "connect the dots" (arXiv:2207.04380), both directions."""
    if by_rdp > _MOST_OF_PLD or delta < _LEAST_DELTA_OF_PLD:
        return None
    # As many points for a large epsilon as for a small one; RDP's bound grows with what is composed, so the grid never
    # becomes finer, and the bound not lower, by adding steps.
    grid = next(grid for grid, most in ((_FINEST, 30), (1e-3, 300), (1e-2, math.inf)) if by_rdp <= most)
    composed = None
    for group in groups:
        one = _losses(*group, max(grid, finest))
        composed = one if composed is None else composed.compose(one)
    assert composed is not None
    return float(composed.get_epsilon_for_delta(delta))


@lru_cache(maxsize=64)
def _losses(sampling: float, noise: float, steps: int, grid: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    one = privacy_loss_distribution.from_gaussian_mechanism(
        noise, value_discretization_interval=grid, sampling_prob=sampling
    )
    return one.self_compose(steps)


def _by_prv(groups: Sequence[Group], delta: float) -> float | None:
    _require("opacus")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its RDP, and of a logarithm of 0 at sampling 1
        from opacus.accountants import PRVAccountant

        accountant = PRVAccountant()
        accountant.history = [(noise, sampling, steps) for sampling, noise, steps in groups]
        try:
            return float(accountant.get_epsilon(delta))
        except (RuntimeError, ValueError):  # its grid does not fit
            return None


def _least(holds: Callable[[float], bool], high: float, *, ratio: float, precision: float) -> float:
    """The least number for which something holds that holds for all above it, from above, to a relative precision."""
    low = high / ratio
    while holds(low):
        high, low = low, low / ratio
    while high / low > precision:
        middle = math.sqrt(high * low)
        high, low = (middle, low) if holds(middle) else (high, middle)
    return high


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise PrivacyError(f"delta = {delta}: must lie between 0 and 1; below 1 by the number of examples is usual")


def _require(module: str) -> None:
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise PrivacyError(f"privacy cannot be accounted for: {module} is missing; pip install 'caravan[private]'")


@contextmanager
def _silent() -> Iterator[None]:
    """Keep dp-accounting from telling on standard error which orders it leaves out."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def in_figures(value: float) -> str:
    """Write an epsilon with four figures, rounded up: what is printed is still guaranteed."""
    if math.isinf(value):
        return "infinity"
    digits = 0 if value >= 1000 or not value else min(3 - math.floor(math.log10(value)), 9)
    return f"{math.ceil(round(value * 10**digits, 6)) / 10**digits:,.{digits}f}"
