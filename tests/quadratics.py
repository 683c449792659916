"""FedAvg on losses of which every constant is known: quadratics, each owner's with a minimum of its own."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from caravan.training.convergence import Ingredients

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Quadratics:
    """f_i(x) = 1/2 Σ_j curvatures_j (x_j - centres_ij)², for k owners alike in weight.

    L is the largest curvature; ∇f_i - ∇f = curvatures (mean centre - centre_i), so zeta² is the same everywhere.
    """

    curvatures: Vector  # (d,)
    centres: Vector  # (k, d)

    def slope(self, x: Vector) -> Vector:
        """∇f at x (d,)."""
        return self.curvatures * (x - self.centres.mean(axis=0))

    def ingredients(self, start: Vector, **others: float) -> Ingredients:
        centre = self.centres.mean(axis=0)
        apart = ((self.curvatures * (centre - self.centres)) ** 2).sum(axis=1).mean()
        gap = 0.5 * float((self.curvatures * (start - centre) ** 2).sum())
        values = {"smoothness": float(self.curvatures.max()), "gap": gap, "dissimilarity": float(apart)}
        return Ingredients(**{**values, "owners": 1 / len(self.centres), **others})  # pyright: ignore


def simulate(
    losses: Quadratics,
    start: Vector,
    *,
    rate: float,
    steps: int,
    local_steps: int = 1,
    spread: float = 0.0,
    clip: float = np.inf,
    noise: float = 0.0,
    draw: Callable[[np.random.Generator, tuple[int, ...]], Vector] | None = None,
    runs: int = 50,
    seed: int = 0,
) -> Vector:
    """Give ||∇f||² at the average of owners before each step, the mean over runs: float64 (steps,).

    Args:
        losses: of k owners.
        start: x_0, (d,).
        rate: eta.
        steps: T.
        local_steps: tau.
        spread: sigma, of a step's gradient, all numbers together: normal unless `draw` says otherwise.
        clip: L2 norm at which a step's gradient is cut.
        noise: nu, of what is added after clipping, all numbers together.
        draw: from a generator and a shape to deviations of variance 1 a number.
        runs: independent repetitions.
        seed: of all of them.
    """
    source = np.random.default_rng(seed)
    owners, width = losses.centres.shape
    shape = (runs, owners, width)
    points = np.broadcast_to(start, shape).copy()
    curve = np.empty(steps)
    for step in range(steps):
        if step % local_steps == 0:
            points[:] = points.mean(axis=1, keepdims=True)
        curve[step] = (losses.slope(points.mean(axis=1)) ** 2).sum(axis=1).mean()
        drawn = draw(source, shape) if draw else source.standard_normal(shape)
        gradients = losses.curvatures * (points - losses.centres) + spread / np.sqrt(width) * drawn
        lengths = np.linalg.norm(gradients, axis=2, keepdims=True)
        gradients *= np.minimum(1.0, clip / np.maximum(lengths, 1e-300))
        points -= rate * (gradients + noise / np.sqrt(width) * source.standard_normal(shape))
    return curve
