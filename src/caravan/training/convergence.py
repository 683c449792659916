"""What theory promises of FedAvg: a bound on its gradients, term by term, and the learning rate that this allows.

The statement has the form of theorem 5.5 of arXiv:2509.16508 (smooth non-convex losses, local steps, clipping, Gaussian
noise, mild assumptions on the gradients' variance and diversity). It is not a quotation: the theorem's text was not at
hand, so constants and proof are ours, along the usual lines (Koloskova et al. 2020, arXiv:2003.10422; Wang et al. 2021,
arXiv:2107.06917; for what clipping leaves behind Koloskova et al. 2023, arXiv:2305.01588).

Owners i with weights w_i that sum to 1 take tau local steps at rate eta between averages, T steps in all. A step moves
by clip(g_i) + z, with

- f_i L-smooth,
- E ||g_i - ∇f_i||² <= sigma² (clipping never makes this larger: it is a projection, so 1-Lipschitz),
- Σ w_i ||∇f_i - ∇f||² <= zeta²,
- ||E clip(g_i) - ∇f_i|| <= beta,
- z Gaussian with E ||z||² = nu² (d numbers of standard deviation noise multiplier · clip / batch each).

Let a = 1, n = 3 without clipping bias (beta = 0) and a = 2, n = 4 with it, and kappa = n eta² L² tau (tau - 1). If
eta L <= 1 and kappa <= 1/4, the average x over owners obeys

    mean_t E ||∇f(x_t)||² <= c · (descent + variance + drift + clipping + noise),    c = 1 / (1 - a kappa / (1 - kappa))

    descent  = 2 (f(x_0) - min f) / (eta T)
    variance = eta L sigma² Σ w_i²
    drift    = a eta² L² (tau - 1) (sigma² + n tau zeta²) / (1 - kappa)
    clipping = a beta² / (1 - kappa)
    noise    = nu² (eta L Σ w_i² + a eta² L² (tau - 1) / (1 - kappa))

Proof. With h = Σ w_i ∇f_i(x_i) and b the mean bias, smoothness and 2⟨u, v⟩ = ||u||² + ||v||² - ||u - v||² give, for
eta L <= 1,

    E f(x_{t+1}) <= f(x_t) - eta/2 ||∇f||² + eta/2 ||∇f - h - b||² + eta² L/2 (sigma² + nu²) Σ w_i²

and ||∇f - h - b||² <= a (L² V + beta²) with V = Σ w_i ||x_i - x||². V is at most D_k, the mean squared distance that
owners have gone after k steps of a round, and

    D_k <= 2 eta² k (sigma² + nu²) + 2 n eta² k Σ_{j<k} (L² D_j + zeta² + beta² + ||∇f(x_j)||²).

Summed over a round, Σ D <= eta² tau (tau - 1) (sigma² + nu²) + n eta² tau (tau - 1) Σ_j (...): solve for Σ D and insert
it. With one local step nothing drifts, and c = 1.
"""

import math
from dataclasses import dataclass, fields

from caravan.errors import TrainingError


@dataclass(frozen=True, kw_only=True)
class Ingredients:
    """What the bound is made of; estimates of these are in `smoothness` and `moments`.

    Attributes:
        smoothness: L.
        gap: f(x_0) - min f; the loss itself is an upper bound of it, nats.
        variance: sigma², of one step's gradient: `Moments.variance` over the batch size.
        dissimilarity: zeta², `Diversity.dissimilarity`; 0 for one owner.
        clipping_bias: beta, `Moments.clipping_bias`; 0 without clipping.
        noise: nu², mean squared L2 norm of the noise on one owner's step; see `noise_power`.
        owners: Σ w_i² of their weights in the average: 1 / k for k alike, 1 for one owner.
        local_steps: tau, between averages; 1 for one owner.
    """

    smoothness: float
    gap: float
    variance: float = 0.0
    dissimilarity: float = 0.0
    clipping_bias: float = 0.0
    noise: float = 0.0
    owners: float = 1.0
    local_steps: int = 1

    def __post_init__(self) -> None:
        """Refuse what is no constant of a loss.

        Raises:
            TrainingError: a value is negative or not finite, L is 0, or there is no local step.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise TrainingError(f"{field.name} = {value} of the bound; give a finite number from 0 on")
        if self.smoothness == 0 or self.local_steps < 1 or not 0 < self.owners <= 1:
            raise TrainingError(
                f"smoothness = {self.smoothness}, local_steps = {self.local_steps}, owners = {self.owners}; the bound "
                "needs a smoothness above 0, a local step or more, and 0 < owners <= 1"
            )


@dataclass(frozen=True)
class Bound:
    """The right-hand side, each term times c: what the mean squared gradient norm stays below.

    Attributes:
        descent: of the start, falls as 1 / T.
        variance: of sampling, falls with eta and with owners.
        drift: of owners going their own ways between averages.
        clipping: a floor that no rate removes.
        noise: a floor that falls with eta.
    """

    descent: float
    variance: float
    drift: float
    clipping: float
    noise: float

    @property
    def total(self) -> float:
        """The whole right-hand side."""
        return self.descent + self.floor

    @property
    def floor(self) -> float:
        """What remains after any number of steps."""
        return self.variance + self.drift + self.clipping + self.noise


def noise_power(noise_multiplier: float, clip: float, batch: float, numbers: int) -> float:
    """Give nu² of DP-SGD: d · (noise multiplier · clip / batch)² (Abadi et al. 2016, arXiv:1607.00133).

    Args:
        noise_multiplier: standard deviation of the noise on the sum, over the clip.
        clip: L2 norm at which each unit's gradient is cut.
        batch: expected units of a step.
        numbers: d, how many are trained.
    """
    return numbers * (noise_multiplier * clip / batch) ** 2


def largest_rate(ingredients: Ingredients) -> float:
    """Give the largest eta that the bound allows: 1 / L, or 1 / (2 L √(n tau (tau - 1))) if that is less."""
    _, n = _factors(ingredients)
    steps = ingredients.local_steps
    drift = 2 * math.sqrt(n * steps * (steps - 1))
    return 1 / (ingredients.smoothness * max(1.0, drift))


def best_rate(ingredients: Ingredients, steps: int) -> float:
    """Give the eta that balances descent against variance and noise over T steps, within what is allowed.

    √(2 gap / (T L (sigma² + nu²) Σ w_i²)): with it the bound falls as 1 / √T. Without variance and noise the rate is
    the largest that is allowed, and the bound falls as 1 / T.
    """
    random = ingredients.smoothness * (ingredients.variance + ingredients.noise) * ingredients.owners
    balanced = math.sqrt(2 * ingredients.gap / (steps * random)) if random else math.inf
    return min(balanced, largest_rate(ingredients))


def bound(ingredients: Ingredients, rate: float, steps: int) -> Bound:
    """Give the bound on mean_t E ||∇f(x_t)||² over T steps at a constant rate.

    Raises:
        TrainingError: the rate is beyond `largest_rate`, or there are no steps.
    """
    limit = largest_rate(ingredients)
    if not 0 < rate <= limit * (1 + 1e-9) or steps < 1:
        raise TrainingError(f"rate {rate:g} over {steps} steps; the bound holds for rates above 0 up to {limit:g}")
    a, n = _factors(ingredients)
    tau, curved = ingredients.local_steps, rate * ingredients.smoothness
    kappa = n * curved**2 * tau * (tau - 1)
    c = 1 / (1 - a * kappa / (1 - kappa))
    apart = a * curved**2 * (tau - 1) / (1 - kappa)
    return Bound(
        descent=c * 2 * ingredients.gap / (rate * steps),
        variance=c * curved * ingredients.variance * ingredients.owners,
        drift=c * apart * (ingredients.variance + n * tau * ingredients.dissimilarity),
        clipping=c * a * ingredients.clipping_bias**2 / (1 - kappa),
        noise=c * ingredients.noise * (curved * ingredients.owners + apart),
    )


def _factors(ingredients: Ingredients) -> tuple[int, int]:
    return (2, 4) if ingredients.clipping_bias else (1, 3)
