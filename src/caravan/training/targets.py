"""What training aims at: gold rows, the loss over them, and the rows that stay as they are."""

from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from caravan.model.head import FlatHead


class Targets:
    """The gold rows of N examples, and the loss over them.

    Attributes:
        rows: int64 (N, G), each example's gold rows, filled up with its first one.
        share: float32 (N, G), how much of the target each gold row has; 0 on what was filled up.
        weights: float32 (N,), each example's weight in the loss, 1 on average.
        seen: int64, the rows that are gold for some query, ascending.
    """

    def __init__(
        self,
        gold: Sequence[Sequence[int]],
        *,
        queries: int,
        document_count: int,
        weighting: Literal["none", "sqrt", "balanced"],
        device: torch.device,
    ) -> None:
        """Lay the gold rows out.

        Args:
            gold: for each of N >= 1 examples its one or more gold rows; several share the target evenly.
            queries: how many of them, the first ones, are users' queries; the rest are passages of documents.
            document_count: C.
            weighting: how an example weighs by the number n of examples with the same first gold row: "none" alike,
                "sqrt" as 1 / √n, "balanced" as 1 / n.
            device: where the loss is computed.
        """
        widest = max(len(rows) for rows in gold)
        self.rows = torch.tensor([[*rows, *[rows[0]] * (widest - len(rows))] for rows in gold], device=device)
        counts = torch.tensor([len(rows) for rows in gold], device=device).unsqueeze(1)
        self.share = (torch.arange(widest, device=device) < counts) / counts
        self.seen = torch.unique(self.rows[:queries])
        first = self.rows[:, 0]
        frequency = torch.bincount(first, minlength=document_count).to(torch.float32)[first]
        weights = frequency ** {"none": 0.0, "sqrt": -0.5, "balanced": -1.0}[weighting]
        self.weights = weights / weights.mean()

    def loss(self, scores: Tensor, batch: Sequence[int], smoothing: float) -> Tensor:
        """Mean of `losses`, float32 (): divided by B, not by the sum of weights, so that an epoch's batches add up."""
        return self.losses(scores, batch, smoothing).mean()

    def losses(self, scores: Tensor, batch: Sequence[int], smoothing: float) -> Tensor:
        """Weighted cross-entropy (arXiv:2509.16508, eq. 4) with label smoothing (arXiv:1512.00567, section 7).

        Args:
            scores: float32 (B, C), logits.
            batch: the B examples' numbers.
            smoothing: share of each target that is spread evenly over all C documents.

        Returns:
            float32 (B,), nats; each depends on its own row of scores only.
        """
        index = torch.tensor(batch, device=scores.device)
        log_probability = functional.log_softmax(scores, dim=1)
        gold = (log_probability.gather(1, self.rows[index]) * self.share[index]).sum(dim=1)
        if smoothing:
            gold = (1 - smoothing) * gold + smoothing * log_probability.mean(dim=1)
        return -(gold * self.weights[index])


def plain_loss(scores: Tensor, gold: Sequence[Collection[int]]) -> Tensor:
    """Cross-entropy as one would measure it: without smoothing or weights.

    Args:
        scores: float32 (B, C), logits.
        gold: for each of the B queries its gold rows, which share the target evenly.

    Returns:
        float32 (B,), nats.
    """
    log_probability = functional.log_softmax(scores, dim=1)
    return torch.stack([-own[list(rows)].mean() for own, rows in zip(log_probability, gold, strict=True)])


class HeldRows:
    """Head rows of documents without training queries, kept at the values they have now."""

    def __init__(self, head: FlatHead, seen: Tensor) -> None:
        """Remember all rows of `head` but those in `seen` (int64)."""
        unseen = torch.ones(len(head.rows), dtype=torch.bool, device=seen.device)
        unseen[seen] = False
        self._head = head
        self._index = unseen.nonzero().squeeze(1)
        self._rows = head.rows.detach()[self._index].clone()
        self._bias = head.bias.detach()[self._index].clone()

    def drop_gradients(self) -> None:
        """Forget the held rows' gradients, so that they do not count when the gradient's norm is clipped."""
        for parameter in (self._head.rows, self._head.bias):
            if parameter.grad is not None:
                parameter.grad[self._index] = 0

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo what an optimizer step did to them: weight decay moves rows without a gradient too."""
        self._head.rows[self._index] = self._rows
        self._head.bias[self._index] = self._bias
