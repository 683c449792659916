"""The classifier head, which is the index: one row a document, at the start maximum-inner-product search."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from caravan.config import HeadConfig
from caravan.model.factors import Factors


class FlatHead(nn.Module):
    """One linear row a document, a learned scale, and on demand a pre-classifier layer before the rows.

    Scores are s · (f(z) · Wᵀ) + b, where f is the identity or, with `hidden`, z + relu(z·P + p)·Q (the paper's MLP as
    a residual, Q = 0 at the start). With W the document vectors, b = 0 and any s the ranking at the start is that of
    MIPS. Sizes: B queries, C documents, H width.

    Attributes:
        rows: float32 (C, H), W.
        bias: float32 (C,), b.
        log_scale: float32 (), ln s.
    """

    def __init__(self, rows: Tensor, config: HeadConfig) -> None:
        super().__init__()
        count, width = rows.shape
        self.rows = nn.Parameter(rows.detach().clone().to(torch.float32))
        self.bias = nn.Parameter(torch.zeros(count, device=rows.device))
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.scale), device=rows.device))
        self.pre = _PreClassifier(width, config.hidden).to(rows.device) if config.hidden else None

    def forward(self, queries: Tensor) -> Tensor:
        """Score every document: float32 (B, H) to logits float32 (B, C)."""
        if self.pre is not None:
            queries = self.pre(queries)
        return self.log_scale.exp() * (queries @ self.rows.T) + self.bias

    @torch.no_grad()
    def new_rows(self, vectors: Tensor, *, normalize: bool) -> tuple[Tensor, Tensor]:
        """Make rows and biases for documents that were not trained on.

        A row is f(d) of the document's vector d: what a query that reads like the document becomes, so that of all
        rows of that length this one gives it the highest score. The bias is the mean one: a new document is neither
        preferred nor held back. Of an untrained head with unit rows the row is d itself, so that MIPS stays MIPS.

        Args:
            vectors: float32 (N, H), of the documents.
            normalize: give the rows the mean length of those that are there, which training may have changed; for
                encoders whose vectors have norm 1.

        Returns:
            float32 (N, H) and (N,).
        """
        rows = vectors if self.pre is None else self.pre(vectors)
        if normalize:
            rows = functional.normalize(rows, dim=1) * self.rows.norm(dim=1).mean()
        return rows.clone(), self.bias.mean().repeat(len(vectors))

    @torch.no_grad()
    def gradient_factors(self, queries: Tensor, score_gradients: Tensor) -> dict[str, Factors]:
        """Say what each query's gradients are made of; nothing of size B · C · H is.

        Args:
            queries: float32 (B, H), what was scored.
            score_gradients: float32 (B, C), of query i's loss with respect to its scores.

        Returns:
            Factors with T = 1 by the names of `named_parameters`.
        """
        inner = queries if self.pre is None else self.pre(queries)
        scaled, slopes = self.log_scale.exp() * inner, score_gradients.unsqueeze(1)
        inner_gradients = self.log_scale.exp() * (score_gradients @ self.rows)
        along = (inner * inner_gradients).sum(dim=1)  # Σ_c δ_c (score_c - b_c), without the scores
        factors = {
            "rows": Factors(slopes, scaled.unsqueeze(1), self.rows.shape),
            "bias": Factors.of_bias(slopes, self.bias.shape),
            "log_scale": Factors.of_bias(along[:, None, None], self.log_scale.shape),
        }
        if self.pre is not None:
            own = self.pre.gradient_factors(queries, inner_gradients)
            factors |= {f"pre.{name}": factor for name, factor in own.items()}
        return factors


class _PreClassifier(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        # Fixed seed: every client of a federation must start from the same layer.
        generator = torch.Generator().manual_seed(0)
        self.inner = nn.Parameter(torch.randn(width, hidden, generator=generator) * (2 / width) ** 0.5)
        self.inner_bias = nn.Parameter(torch.zeros(hidden))
        self.outer = nn.Parameter(torch.zeros(hidden, width))

    def forward(self, queries: Tensor) -> Tensor:
        return queries + torch.relu(queries @ self.inner + self.inner_bias) @ self.outer

    def gradient_factors(self, queries: Tensor, gradients: Tensor) -> dict[str, Factors]:
        """Say what the gradients are made of, for float32 (B, H) and the gradients (B, H) at what came out."""
        hidden = torch.relu(queries @ self.inner + self.inner_bias)
        hidden_gradients = ((gradients @ self.outer.T) * (hidden > 0)).unsqueeze(1)
        return {
            "inner": Factors(queries.unsqueeze(1), hidden_gradients, self.inner.shape),
            "inner_bias": Factors.of_bias(hidden_gradients, self.inner_bias.shape),
            "outer": Factors(hidden.unsqueeze(1), gradients.unsqueeze(1), self.outer.shape),
        }


class OutputAdapterHead(nn.Module):
    """A rival to the input-side adapter: a square map after the encoder, in front of fixed document rows.

    Scores are s · norm(z·M) · Wᵀ with W fixed and M = I at the start; nothing is backpropagated through the encoder.

    Attributes:
        matrix: float32 (H, H), M.
        log_scale: float32 (), ln s.
        rows: float32 (C, H), W, not trained.
    """

    rows: Tensor

    def __init__(self, rows: Tensor, config: HeadConfig) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(rows.shape[1], device=rows.device))
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.scale), device=rows.device))
        self.register_buffer("rows", rows.detach().clone().to(torch.float32), persistent=False)

    def forward(self, queries: Tensor) -> Tensor:
        """Score every document: float32 (B, H) to logits float32 (B, C)."""
        return self.log_scale.exp() * functional.normalize(queries @ self.matrix, dim=1) @ self.rows.T
