"""How much gradients differ: between an owner's examples, between owners, and from what clipping leaves of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from caravan.config import TrainingConfig
from caravan.data.records import Example
from caravan.errors import TrainingError
from caravan.model.retriever import Retriever
from caravan.training.clipping import clip_weights, example_factors, joint_norms, weighted_sums
from caravan.training.features import FeatureStore
from caravan.training.landscape import Direction, Landscape, inner
from caravan.training.stages import Stage


@dataclass(frozen=True)
class Moments:
    """The gradients of N examples at one point.

    Attributes:
        count: N.
        gradient: their mean, by the names of `Retriever.named_trainables`.
        squared_norm: of the mean.
        variance: sigma², mean squared distance of an example's gradient to the mean, with N - 1; of a batch of B drawn
            at random it is sigma² / B. 0 for one example.
        norms: float64 (N,), of each example's gradient.
        clipped_share: of examples with a gradient longer than the clip; 0 without one.
        clipping_bias: L2 distance between the mean of the clipped gradients and the mean; 0 without a clip.
    """

    count: int
    gradient: Direction
    squared_norm: float
    variance: float
    norms: Tensor
    clipped_share: float
    clipping_bias: float


def gradient_moments(
    retriever: Retriever,
    examples: Sequence[Example],
    stage: Stage,
    config: TrainingConfig,
    *,
    clip: float | None = None,
    passages: Sequence[Example] = (),
    store: FeatureStore | None = None,
) -> Moments:
    """Measure an owner's gradients where the retriever stands, in one pass over its examples.

    Args:
        retriever: adapter and head, unchanged; its head has to be a `FlatHead`.
        examples: the owner's queries.
        stage: whose parameters are looked at.
        config: label smoothing, weights of classes, batch size.
        clip: L2 norm at which each example's gradient is cut; None: none is.
        passages: trained on like `examples`.
        store: where vectors are kept.

    Raises:
        PrivacyError: the head has no per-example gradients in closed form.
        TrainingError: there is no example.
    """
    landscape = Landscape(retriever, examples, stage, config, passages=passages, store=store)
    norms: list[Tensor] = []
    total: Direction = {}
    cut: Direction = {}
    try:
        for batch in landscape.batches:

            def losses(scores: Tensor, batch: Sequence[int] = batch) -> Tensor:
                return landscape.targets.losses(scores, batch, landscape.smoothing)

            _, factors = example_factors(retriever, landscape.inputs.traced(batch), losses)
            norms.append(joint_norms(factors))
            _add(total, weighted_sums(factors, torch.ones_like(norms[-1])))
            if clip is not None:
                _add(cut, weighted_sums(factors, clip_weights(norms[-1], clip)))
    finally:
        landscape.close()
    every = torch.cat(norms)
    return _moments({name: own / len(every) for name, own in total.items()}, every, clip, cut)


def _moments(mean: Direction, norms: Tensor, clip: float | None, cut: Direction) -> Moments:
    count, squared = len(norms), inner(mean, mean)
    spread = max(0.0, float(norms.square().sum()) - count * squared)
    bias = {name: own / count - mean[name] for name, own in cut.items()}
    return Moments(
        count=count,
        gradient=mean,
        squared_norm=squared,
        variance=spread / (count - 1) if count > 1 else 0.0,
        norms=norms,
        clipped_share=0.0 if clip is None else float((norms > clip).double().mean()),
        clipping_bias=inner(bias, bias) ** 0.5,
    )


@dataclass(frozen=True)
class Diversity:
    """How much owners' gradients differ at one point.

    Attributes:
        dissimilarity: zeta² = Σ w_i ||∇f_i - ∇f||² (as in Koloskova et al. 2020, arXiv:2003.10422, assumption 3b).
        diversity: Λ = Σ w_i ||∇f_i||² / ||∇f||², 1 where all are alike, infinity where they cancel (Haddadpour and
            Mahdavi 2019, arXiv:1910.14425, definition 1).
        squared_norm: of the mean ∇f = Σ w_i ∇f_i.
    """

    dissimilarity: float
    diversity: float
    squared_norm: float


def gradient_diversity(gradients: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> Diversity:
    """Compare the gradients of k owners.

    Args:
        gradients: of each owner's loss at the same point, e.g. `Moments.gradient`.
        weights: of the owners in the average, above 0; they are scaled to sum to 1.

    Raises:
        TrainingError: there is no owner, or not one weight each.
    """
    if not gradients or len(gradients) != len(weights) or min(weights) <= 0:
        raise TrainingError(
            f"{len(gradients)} gradients and weights {list(weights)}; give one above 0 for each of them"
        )
    whole = sum(weights)
    shares = [weight / whole for weight in weights]
    mean: Direction = {}
    for share, own in zip(shares, gradients, strict=True):
        _add(mean, {name: share * tensor for name, tensor in own.items()})
    square = sum(share * inner(own, own) for share, own in zip(shares, gradients, strict=True))
    squared = inner(mean, mean)
    apart = 0.0
    for share, own in zip(shares, gradients, strict=True):
        difference = {name: tensor - mean[name] for name, tensor in own.items()}
        apart += share * inner(difference, difference)
    return Diversity(apart, square / squared if squared else float("inf"), squared)


def _add(total: Direction, parts: Mapping[str, Tensor]) -> None:
    for name, part in parts.items():
        total[name] = total[name] + part if name in total else part
