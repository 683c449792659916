"""Per-example gradients in closed form: their norms, and their clipped sum, from one backward pass."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from caravan.errors import PrivacyError
from caravan.model.factors import Factors
from caravan.model.head import FlatHead
from caravan.model.retriever import Retriever
from caravan.training.inputs import Traced

_CHUNK = 1 << 20  # numbers that are widened to float64 at a time: 8 MiB, whatever the batch


def example_factors(
    retriever: Retriever, traced: Traced, losses: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Factors]]:
    """Go forward through the head and back once, and say what each example's gradients are made of.

    The backward pass ends at the soft embeddings and the scores: it makes no gradient of a parameter.

    Args:
        retriever: whose head scores; its head has to be a `FlatHead`.
        traced: B examples' vectors and what they were made of.
        losses: from scores float32 (B, C) to float32 (B,), each of its own row only.

    Returns:
        The losses, float32 (B,), and factors by the names of `Retriever.named_trainables`; adapter ones only where
        `traced` knows of an adapter.

    Raises:
        PrivacyError: the head has no closed form.
    """
    head = retriever.head
    if not isinstance(head, FlatHead):
        raise PrivacyError(f"{type(head).__name__} has no per-example gradients in closed form; train a FlatHead")
    scores = head(traced.vectors)
    each = losses(scores)
    ends = [scores] if traced.soft is None else [scores, traced.soft]
    slopes, *soft = torch.autograd.grad(each.sum(), ends)
    factors = {}
    if traced.embeddings is not None and traced.mask is not None:
        gradients = soft[0].masked_fill(~traced.mask.unsqueeze(2), 0)
        own = retriever.encoder.adapter.gradient_factors(traced.embeddings, gradients)
        factors = {f"adapter.{name}": factor for name, factor in own.items()}
    own = head.gradient_factors(traced.vectors.detach(), slopes)
    return each.detach(), factors | {f"head.{name}": factor for name, factor in own.items()}


def by_unit(factors: Mapping[str, Factors], units: Sequence[int]) -> dict[str, Factors]:
    """Lay the examples of a unit side by side, so that it has one gradient: the sum of theirs.

    Args:
        factors: of B examples.
        units: for each of them the number of its unit, of any value.

    Returns:
        Factors of U units, in the order of their first examples, with as many places as the widest has examples times
        T; the rest is 0.
    """
    members: dict[int, list[int]] = {}
    for row, unit in enumerate(units):
        members.setdefault(unit, []).append(row)
    widest = max(map(len, members.values()))
    rows = torch.tensor([[*own, *[-1] * (widest - len(own))] for own in members.values()])

    def side_by_side(each: Tensor) -> Tensor:
        places = rows.to(each.device)
        laid = each[places.clamp_min(0)].masked_fill((places < 0)[:, :, None, None], 0)  # (U, k, T, p)
        return laid.flatten(1, 2)

    return {
        name: Factors(side_by_side(factor.left), side_by_side(factor.right), factor.shape)
        for name, factor in factors.items()
    }


def joint_norms(factors: Mapping[str, Factors]) -> Tensor:
    """Give the L2 norm of each example's gradient over all parameters together, float64 (B,)."""
    return torch.stack([squared_norms(factor) for factor in factors.values()]).sum(dim=0).sqrt()


def squared_norms(factors: Factors) -> Tensor:
    """Give the squared L2 norm of each example's gradient with respect to one parameter.

    ||Σ_t a_t ⊗ b_t||² = Σ_ts (a_t·a_s)(b_t·b_s), the ghost norm (arXiv:2110.05679, section 4), needs 2T² numbers an
    example, the gradient itself p·q; whichever is smaller is made (arXiv:2205.10683, section 3). The terms of the
    ghost norm cancel, and a norm that comes out too small would let an example through unclipped: they are computed
    in float64.

    Returns:
        float64 (B,), never negative.
    """
    left, right = factors.left, factors.right
    count, places, p = left.shape
    q = right.shape[2]
    if places == 1:
        return _squares(left, -1).squeeze(1) * _squares(right, -1).squeeze(1)
    ghost = 2 * places**2 <= p * q
    rows = max(1, _CHUNK // max(places * (p + q), 2 * places**2 if ghost else p * q))
    norms = []
    for start in range(0, count, rows):
        a, b = left[start : start + rows].double(), right[start : start + rows].double()
        if ghost:
            norms.append(((a @ a.mT) * (b @ b.mT)).sum(dim=(1, 2)).clamp_min(0))
        else:
            norms.append(_squares(a.mT @ b, (1, 2)))
    return torch.cat(norms)


def clip_weights(norms: Tensor, clip: float) -> Tensor:
    """Give what each gradient is multiplied by so that its norm is at most `clip`: float64 (B,), 0 to 1.

    An example whose gradient is not finite has weight 0: it may neither spoil the sum nor stop the training, which
    would say that it was there.
    """
    weights = (clip / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1.0)
    return torch.where(torch.isfinite(norms), weights, 0.0)


def weighted_sums(factors: Mapping[str, Factors], weights: Tensor) -> dict[str, Tensor]:
    """Sum the gradients of B examples, each times its weight, in one matrix product a parameter.

    Args:
        factors: of B examples.
        weights: (B,); what has weight 0 is left out, finite or not.

    Returns:
        float32, of the parameters' shapes.
    """
    kept = weights > 0
    every = bool(kept.all())
    weights = weights[kept].to(torch.float32)[:, None, None]
    sums = {}
    for name, factor in factors.items():
        left, right = (factor.left, factor.right) if every else (factor.left[kept], factor.right[kept])
        total = left.flatten(0, 1).T @ (right * weights).flatten(0, 1)
        sums[name] = total.reshape(factor.shape)
    return sums


def _squares(numbers: Tensor, dim: int | tuple[int, int]) -> Tensor:
    return torch.linalg.vector_norm(numbers, dim=dim, dtype=torch.float64).square()
