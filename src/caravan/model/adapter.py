"""Trainable linear maps on the token-embedding lookup; each is the identity at the start and folds into the table."""

import torch
from torch import Tensor, nn

from caravan.config import AdapterConfig
from caravan.model.factors import Factors


class Adapter(nn.Module):
    """A map of token embeddings e to soft embeddings e·A (+ b), with A = I at the start (arXiv:2509.16508, section 4).

    Children say what A is through `apply_map`, when it is I through `is_identity`, and what the gradients of its
    parameters are made of through `map_factors`. E is the width of the token embeddings.

    Attributes:
        width: E.
    """

    def __init__(self, width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.width = width
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def apply_map(self, embeddings: Tensor) -> Tensor:
        """Return e·A for float (..., E)."""
        raise NotImplementedError

    def map_factors(self, embeddings: Tensor, gradients: Tensor) -> dict[str, Factors]:
        """Return the factors of A's parameters, for float32 (B, T, E) and (B, T, E) as in `gradient_factors`."""
        raise NotImplementedError

    @torch.no_grad()
    def gradient_factors(self, embeddings: Tensor, gradients: Tensor) -> dict[str, Factors]:
        """Say what each example's gradients are made of (arXiv:1510.01799, for places that share their parameters).

        Args:
            embeddings: float (B, T, E), what was mapped.
            gradients: float32 (B, T, E), of example i's loss with respect to its soft embeddings; 0 at padding.

        Returns:
            Factors by the names of `named_parameters`.
        """
        factors = self.map_factors(embeddings.to(torch.float32), gradients)
        if self.bias is not None:
            factors["bias"] = Factors.of_bias(gradients, self.bias.shape)
        return factors

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map float (..., E) to soft embeddings of the same shape in the adapter's float32."""
        mapped = self.apply_map(embeddings.to(torch.float32))
        return mapped if self.bias is None else mapped + self.bias

    @torch.no_grad()
    def fold(self, table: Tensor, *, scale: float = 1.0) -> Tensor:
        """Give the table that a plain model can look up instead of adapting.

        A lookup that multiplies by s gives e = s·t for a row t of the table, and s·(t·A + b/s) = e·A + b, so only the
        bias has to know s.

        Args:
            table: float (V, E), the model's own token embeddings.
            scale: s, `Backbone.embedding_scale`.

        Returns:
            float32 (V, E), E' = table·A (+ b/s).
        """
        mapped = self.apply_map(table.to(torch.float32))
        return mapped.clone() if self.bias is None else mapped + self.bias / scale

    def is_identity(self) -> bool:
        """Whether the numbers are those of the start, at which nothing changes."""
        return self.bias is None or not bool(self.bias.any())


class FullAdapter(Adapter):
    """A square matrix, E x E: the paper's adapter."""

    def __init__(self, width: int, *, bias: bool = False) -> None:
        super().__init__(width, bias=bias)
        self.matrix = nn.Parameter(torch.eye(width))

    def apply_map(self, embeddings: Tensor) -> Tensor:
        """Return e·A."""
        return embeddings @ self.matrix

    def map_factors(self, embeddings: Tensor, gradients: Tensor) -> dict[str, Factors]:
        """Return e ⊗ g for A."""
        return {"matrix": Factors(embeddings, gradients, self.matrix.shape)}

    def is_identity(self) -> bool:
        """Whether A = I and b = 0."""
        return super().is_identity() and torch.equal(self.matrix, torch.eye(self.width, device=self.matrix.device))


class LowRankAdapter(Adapter):
    """A = I + U·V with U (E, r) random and V (r, E) zero at the start, as in LoRA (arXiv:2106.09685)."""

    def __init__(self, width: int, rank: int, *, seed: int, bias: bool = False) -> None:
        super().__init__(width, bias=bias)
        generator = torch.Generator().manual_seed(seed)
        self.down = nn.Parameter(torch.randn(width, rank, generator=generator) / width**0.5)
        self.up = nn.Parameter(torch.zeros(rank, width))

    def apply_map(self, embeddings: Tensor) -> Tensor:
        """Return e + (e·U)·V."""
        return embeddings + (embeddings @ self.down) @ self.up

    def map_factors(self, embeddings: Tensor, gradients: Tensor) -> dict[str, Factors]:
        """Return e ⊗ g·Vᵀ for U and e·U ⊗ g for V."""
        return {
            "down": Factors(embeddings, gradients @ self.up.T, self.down.shape),
            "up": Factors(embeddings @ self.down, gradients, self.up.shape),
        }

    def is_identity(self) -> bool:
        """Whether V = 0 and b = 0."""
        return super().is_identity() and not bool(self.up.any())


class CoreAdapter(Adapter):
    """A = I + U·R·Vᵀ with orthonormal U, V (E, r) frozen and drawn from a seed: only the r x r core R is trained."""

    down: Tensor
    up: Tensor

    def __init__(self, width: int, rank: int, *, seed: int, bias: bool = False) -> None:
        super().__init__(width, bias=bias)
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("down", _orthonormal(width, rank, generator), persistent=False)
        self.register_buffer("up", _orthonormal(width, rank, generator), persistent=False)
        self.core = nn.Parameter(torch.zeros(rank, rank))

    def apply_map(self, embeddings: Tensor) -> Tensor:
        """Return e + ((e·U)·R)·Vᵀ."""
        return embeddings + ((embeddings @ self.down) @ self.core) @ self.up.T

    def map_factors(self, embeddings: Tensor, gradients: Tensor) -> dict[str, Factors]:
        """Return e·U ⊗ g·V for R."""
        return {"core": Factors(embeddings @ self.down, gradients @ self.up, self.core.shape)}

    def is_identity(self) -> bool:
        """Whether R = 0 and b = 0."""
        return super().is_identity() and not bool(self.core.any())


class IdentityAdapter(Adapter):
    """A = I: nothing to train; the bare backbone."""

    def __init__(self, width: int) -> None:
        super().__init__(width)

    def apply_map(self, embeddings: Tensor) -> Tensor:
        """Return e."""
        return embeddings

    def map_factors(self, embeddings: Tensor, gradients: Tensor) -> dict[str, Factors]:
        """Return nothing: there is no parameter."""
        del embeddings, gradients
        return {}


def make_adapter(config: AdapterConfig, width: int) -> Adapter:
    """Make the adapter that `config.kind` names for token embeddings of `width` E; a rank above E is taken as E."""
    rank = min(config.rank, width)
    if config.kind == "full":
        return FullAdapter(width, bias=config.bias)
    if config.kind == "lowrank":
        return LowRankAdapter(width, rank, seed=config.seed, bias=config.bias)
    if config.kind == "core":
        return CoreAdapter(width, rank, seed=config.seed, bias=config.bias)
    return IdentityAdapter(width)


def _orthonormal(width: int, rank: int, generator: torch.Generator) -> Tensor:
    # float64 and a fixed sign: the same seed must give the same frame on every machine that draws it.
    columns, triangle = torch.linalg.qr(torch.randn(width, rank, generator=generator, dtype=torch.float64))
    return (columns * triangle.diagonal().sign()).to(torch.float32)
