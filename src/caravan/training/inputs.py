"""What the head is fed while training: vectors computed once, or tokens encoded anew at every step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from caravan.config import TrainingConfig
from caravan.model.backbone import Backbone
from caravan.model.encoder import Encoder, pad
from caravan.training.features import FeatureStore
from caravan.training.progress import Progress, Report


@dataclass(frozen=True)
class Traced:
    """Vectors of a batch, and what the adapter's gradients are made of where it has any.

    Attributes:
        vectors: float32 (B, H); differentiable with respect to `soft`, and to nothing else.
        embeddings: float (B, T, E), what the adapter mapped; None without an adapter to train.
        soft: float32 (B, T, E), what it made of them: a leaf that requires a gradient.
        mask: bool (B, T), True on tokens.
    """

    vectors: Tensor
    embeddings: Tensor | None = None
    soft: Tensor | None = None
    mask: Tensor | None = None


class Inputs(Protocol):
    """N queries, in a form from which batches of vectors are made.

    Attributes:
        lengths: N numbers; queries of like number cost least together.
    """

    lengths: list[int]

    def queries(self, batch: Sequence[int], noise: torch.Generator | None = None) -> Tensor:
        """Give the vectors of the queries numbered in `batch`, float32 (B, H).

        Args:
            batch: B numbers.
            noise: draws what is dropped, as the settings say, against learning queries by heart; None: nothing is.
        """
        ...

    def traced(self, batch: Sequence[int], noise: torch.Generator | None = None) -> Traced:
        """Give what `queries` gives, cut off from the adapter's parameters, with what their gradients are made of."""
        ...

    def close(self) -> None:
        """Leave the encoder as it was found."""
        ...


class VectorInputs:
    """Queries as vectors (N, H) computed once: nothing before the head is trained."""

    def __init__(self, vectors: Tensor, dropout: float = 0.0) -> None:
        self.vectors = vectors
        self.lengths = [1] * len(vectors)
        self.dropout = dropout

    def queries(self, batch: Sequence[int], noise: torch.Generator | None = None) -> Tensor:
        """Look vectors up; with noise, set a share of their numbers to 0 and scale the rest up."""
        return _dropped(self.vectors[torch.tensor(batch, device=self.vectors.device)], self.dropout, noise)

    def traced(self, batch: Sequence[int], noise: torch.Generator | None = None) -> Traced:
        """Look vectors up, as `queries` does: there is no adapter before them."""
        return Traced(self.queries(batch, noise))

    def close(self) -> None:
        """There is nothing to undo."""


class TokenInputs:
    """Queries as tokens, encoded at every step because the adapter changes."""

    def __init__(self, encoder: Encoder, texts: Sequence[str], config: TrainingConfig) -> None:
        self.encoder = encoder
        self.tokens = encoder.tokenize(texts)
        self.lengths = [len(ids) for ids in self.tokens]
        self.dropout, self.token_dropout = config.adapter.dropout, config.adapter.token_dropout
        self.backbone = encoder.backbone.cast(training_dtype(config, encoder.backbone))
        if config.activation_checkpointing:
            self.backbone.checkpoint_activations(True)

    def queries(self, batch: Sequence[int], noise: torch.Generator | None = None) -> Tensor:
        """Encode, differentiably with respect to the adapter; with noise, leave tokens and numbers of vectors out."""
        embeddings, mask = self._embeddings(batch, noise)
        return self._vectors(self.encoder.adapter(embeddings), mask, noise)

    def traced(self, batch: Sequence[int], noise: torch.Generator | None = None) -> Traced:
        """Encode, differentiably with respect to the soft embeddings."""
        embeddings, mask = self._embeddings(batch, noise)
        adapter = self.encoder.adapter
        with torch.no_grad():
            soft = adapter(embeddings)
            if next(adapter.parameters(), None) is None:
                return Traced(self._vectors(soft, mask, noise))
        soft.requires_grad_()
        return Traced(self._vectors(soft, mask, noise), embeddings, soft, mask)

    def _embeddings(self, batch: Sequence[int], noise: torch.Generator | None) -> tuple[Tensor, Tensor]:
        tokens = [self.tokens[index] for index in batch]
        if noise is not None and self.token_dropout:
            tokens = [_thinned(ids, self.token_dropout, noise) for ids in tokens]
        input_ids, mask = pad(tokens, device=self.encoder.device)
        return self.encoder.backbone.embed(input_ids), mask

    def _vectors(self, soft: Tensor, mask: Tensor, noise: torch.Generator | None) -> Tensor:
        return _dropped(self.encoder.vectors(soft, mask, backbone=self.backbone), self.dropout, noise)

    def close(self) -> None:
        """Stop checkpointing activations: the blocks may be the retriever's own."""
        self.backbone.checkpoint_activations(False)


def _dropped(vectors: Tensor, rate: float, noise: torch.Generator | None) -> Tensor:
    """With noise, set a share of the numbers to 0 and scale the rest up (dropout; arXiv:1207.0580)."""
    if noise is None or not rate:
        return vectors
    kept = torch.rand(vectors.shape, generator=noise) >= rate
    return vectors * kept.to(vectors.device) / (1 - rate)


def _thinned(ids: list[int], rate: float, noise: torch.Generator) -> list[int]:
    """Leave tokens out at a rate, never the first or last: these are the special ones, and one of them is pooled."""
    kept = (torch.rand(len(ids), generator=noise) >= rate).tolist()
    return [token for place, token in enumerate(ids) if kept[place] or place in (0, len(ids) - 1)]


def encode_inputs(
    encoder: Encoder,
    queries: Sequence[str],
    validation: Sequence[str],
    store: FeatureStore,
    report: Report | None,
    *,
    dropout: float = 0.0,
) -> VectorInputs:
    """Encode N queries to train on and M for validation, and number them in this order."""
    # Apart, because vectors depend in their last bits on what shares a batch: validation must change nothing.
    vectors = [encode_with_progress(encoder, queries, store, report)]
    if validation:
        vectors.append(encode_with_progress(encoder, validation, store, report, task="encoding validation queries"))
    return VectorInputs(torch.cat(vectors), dropout)


def encode_with_progress(
    encoder: Encoder, texts: Sequence[str], store: FeatureStore, report: Report | None, *, task: str = "encoding"
) -> Tensor:
    """Vectors of texts from the store, float32 (B, H), reported as `task`."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if report is not None:
            report(Progress(task, done, len(texts)))

    return store.encode(encoder, texts, progress=advance)


def training_dtype(config: TrainingConfig, backbone: Backbone) -> torch.dtype:
    """In which dtype the frozen blocks compute while training.

    "auto" takes bfloat16 only where the processor multiplies it natively (measured: 5 times slower than float32 on one
    without, 3 to 5 times faster on one with it), and never widens a backbone that was loaded narrower.
    """
    if config.precision == "float32" or backbone.blocks_dtype != torch.float32:
        return backbone.blocks_dtype
    if config.precision == "bfloat16":
        return torch.bfloat16
    device = torch.device(backbone.config.device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32
