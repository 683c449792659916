"""How smooth a loss is: the largest curvature by power iteration, and a bound in closed form for the head's rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from caravan.config import TrainingConfig
from caravan.data.records import Example
from caravan.errors import TrainingError
from caravan.model.head import FlatHead
from caravan.model.retriever import Retriever
from caravan.training.features import FeatureStore
from caravan.training.landscape import Direction, Landscape, inner
from caravan.training.stages import Stage


@dataclass(frozen=True)
class Curvature:
    """The largest curvature that power iteration found.

    Attributes:
        value: |lambda| of the Hessian's eigenvalue of largest magnitude, from below.
        iterations: Hessian-vector products that it took.
        settled: whether the last two iterations agreed.
    """

    value: float
    iterations: int
    settled: bool


def smoothness(
    retriever: Retriever,
    examples: Sequence[Example],
    stage: Stage,
    config: TrainingConfig,
    *,
    passages: Sequence[Example] = (),
    iterations: int = 30,
    tolerance: float = 0.01,
    seed: int = 0,
    store: FeatureStore | None = None,
) -> Curvature:
    """Estimate the smoothness L_i of an owner's loss where the retriever stands, by power iteration.

    A loss is L-smooth if no eigenvalue of its Hessian is larger than L in magnitude anywhere. This is that eigenvalue
    here, so a lower estimate of L: elsewhere on the way it may be larger.

    Args:
        retriever: adapter and head, unchanged.
        examples: the owner's queries.
        stage: "head": over the head's parameters; "adapter": over the adapter's and the head's.
        config: label smoothing, weights of classes, batch size.
        passages: trained on like `examples`.
        iterations: Hessian-vector products at most, each a pass over all examples.
        tolerance: relative change at which to stop.
        seed: of the first direction.
        store: where vectors are kept.
    """
    landscape = Landscape(retriever, examples, stage, config, passages=passages, seed=seed, store=store)
    try:
        generator = torch.Generator().manual_seed(seed)
        start = {
            name: torch.randn(parameter.shape, generator=generator).to(parameter.device)
            for name, parameter in landscape.parameters.items()
        }
        return largest_curvature(landscape.curve, start, iterations=iterations, tolerance=tolerance)
    finally:
        landscape.close()


def largest_curvature(
    product: Callable[[Direction], Direction], start: Direction, *, iterations: int = 30, tolerance: float = 0.01
) -> Curvature:
    """Find the magnitude of a symmetric matrix's largest eigenvalue by power iteration (von Mises, 1929).

    What is given is ||A v|| for a unit vector v, which rises to it also where lambda and -lambda are both eigenvalues.

    Args:
        product: from v to A v.
        start: the first v, of any length above 0.
        iterations: products at most.
        tolerance: relative change at which to stop.

    Raises:
        TrainingError: a product is not finite.
    """
    vector, value, done = start, 0.0, 0
    for done in range(1, iterations + 1):
        length = inner(vector, vector) ** 0.5
        vector = product({name: own / length for name, own in vector.items()})
        before, value = value, inner(vector, vector) ** 0.5
        if not value < float("inf"):
            raise TrainingError("the loss has no finite curvature here; lower the learning rate it was trained with")
        if value == 0 or abs(value - before) <= tolerance * value:
            return Curvature(value, done, True)
    return Curvature(value, done, False)


@torch.no_grad()
def rows_smoothness_bound(head: FlatHead, vectors: Tensor, weights: Tensor | None = None) -> float:
    """Bound the smoothness of softmax cross-entropy in the head's rows and bias, wherever these stand.

    An example's Hessian is (diag p - p pᵀ) ⊗ x xᵀ with x = (s f(z), 1), whatever the targets are, smoothed ones too.
    diag p - p pᵀ is at most (I - 1 1ᵀ / C) / 2, so with weights w_i the largest eigenvalue is at most half that of
    (1/N) Σ w_i x_i x_iᵀ (Böhning 1992, "Multinomial logistic regression algorithm"), which is at most max_i w_i (s²
    ||f(z_i)||² + 1) / 2. The scale s and the pre-classifier f count as they are now: in these the loss is not globally
    smooth, and there is no such bound.

    Args:
        head: rows, bias, scale and pre-classifier.
        vectors: float32 (N, H), queries.
        weights: float32 (N,), of the examples in the loss; 1 if None.
    """
    inner_vectors = vectors if head.pre is None else head.pre(vectors)
    scaled = (head.log_scale.exp() * inner_vectors).double()
    x = torch.cat([scaled, scaled.new_ones(len(scaled), 1)], dim=1)
    weighted = x if weights is None else x * weights.double().unsqueeze(1)
    return 0.5 * float(torch.linalg.eigvalsh(x.T @ weighted / len(x))[-1])
