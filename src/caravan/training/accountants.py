"""Three accountants' bounds on the Poisson-subsampled Gaussian mechanism, by their libraries; all that calls these.

Upper bounds by construction are privacy loss distributions (PLD; dp-accounting) and Renyi differential privacy (RDP;
dp-accounting). Opacus' PRV is a check: it looks at removal alone, and its source says that its domain departs from the
theory.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from caravan.errors import PrivacyError

FINEST = 1e-4  # the grid of privacy losses; each coarser one takes every tenth point, so its bound is never the lower
COARSE = 1e-3  # 0.4 % above the finest one on 14,000 steps of epsilon 2.4, and ten times as fast
_LEAST_DELTA_OF_PLD = 1e-10  # rounding errors of the Fourier transform stay far below this
_MOST_OF_PLD = 1e4  # an epsilon above says nothing; a finer bound of it is not worth the memory
MOST_OF_PRV = 50.0  # Opacus' grid does not grow with epsilon: above, minutes
# dp-accounting's orders end at 1.1 below; what has very little noise is bound best by orders near 1. Fractions cost the
# most time, and between these the bound hardly moves.
_ORDERS = (
    *(1.01, 1.02, 1.03, 1.05, 1.1, 1.2, 1.3, 1.5, 1.75),
    *(2 + halves / 2 for halves in range(12)),
    *range(8, 24),
    *range(24, 64, 2),
    *(64, 72, 80, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024),
)

Group = tuple[float, float, int]  # sampling, noise multiplier, steps


def by_rdp(groups: Sequence[Group], delta: float) -> float:
    """Bound epsilon by Renyi divergences (arXiv:1908.10530), converted as in arXiv:2004.00010, proposition 12.

    Args:
        groups: with noise.
        delta: in (0, 1).

    Returns:
        Infinity where no order has a bound.

    Raises:
        PrivacyError: dp-accounting is not installed.
    """
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


def by_pld(groups: Sequence[Group], delta: float, rdp: float, finest: float) -> float | None:
    """Bound epsilon by privacy loss distributions, for removal and addition (arXiv:1906.03049, arXiv:2207.04380).

    Args:
        groups: with noise.
        delta: in (0, 1).
        rdp: what `by_rdp` gives.
        finest: the finest grid that may be used.

    Returns:
        None for an `rdp` above 10,000, and for delta below 1e-10.
    """
    if rdp > _MOST_OF_PLD or delta < _LEAST_DELTA_OF_PLD:
        return None
    # As many points for a large epsilon as for a small one; RDP's bound grows with what is composed, so the grid never
    # becomes finer, and the bound not lower, by adding steps.
    grid = next(grid for grid, most in ((FINEST, 30), (1e-3, 300), (1e-2, math.inf)) if rdp <= most)
    composed = None
    for group in groups:
        one = _losses(*group, max(grid, finest))
        composed = one if composed is None else composed.compose(one)
    assert composed is not None
    return float(composed.get_epsilon_for_delta(delta))


@lru_cache(maxsize=8)  # some MiB each; what comes of them is kept, too
def _losses(sampling: float, noise: float, steps: int, grid: float) -> Any:
    return _losses_of_one(sampling, noise, grid).self_compose(steps)


@lru_cache(maxsize=64)
def _losses_of_one(sampling: float, noise: float, grid: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise, value_discretization_interval=grid, sampling_prob=sampling
    )


def by_prv(groups: Sequence[Group], delta: float) -> float | None:
    """Give Opacus' upper bound on epsilon (arXiv:2106.02848); None where its grid does not fit.

    Raises:
        PrivacyError: Opacus is not installed.
    """
    _require("opacus")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its RDP, and of a logarithm of 0 at sampling 1
        from opacus.accountants import PRVAccountant

        accountant = PRVAccountant()
        accountant.history = [(noise, sampling, steps) for sampling, noise, steps in groups]
        try:
            return float(accountant.get_epsilon(delta))
        except (RuntimeError, ValueError):
            return None


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
