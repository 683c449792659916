"""The gradient of every example by itself, as the two factors of its outer products: no (B, p, q) tensor is made."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """The gradients of B examples with respect to one parameter: that of example i is Σ_t left_it ⊗ right_it.

    Every map of this package is linear in each of its parameters, so the gradient of an example's loss is such a sum
    over its T places (tokens, or 1 in a head): what went in, times the gradient at what came out.

    Attributes:
        left: float (B, T, p).
        right: float (B, T, q), 0 at padding.
        shape: of the parameter; it has p · q numbers.
    """

    left: Tensor
    right: Tensor
    shape: torch.Size

    @classmethod
    def of_bias(cls, gradients: Tensor, shape: torch.Size) -> "Factors":
        """Factors of what is added at every place: 1, and the gradient float (B, T, q) there."""
        return cls(gradients.new_ones(*gradients.shape[:2], 1), gradients, shape)
