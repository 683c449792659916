"""What the head is fed while training: vectors computed once, or tokens encoded anew at every step."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from caravan.config import TrainingConfig
from caravan.model.backbone import Backbone
from caravan.model.encoder import Encoder, pad
from caravan.training.features import FeatureStore
from caravan.training.progress import Progress, Report


class Inputs(Protocol):
    """N queries, in a form from which batches of vectors are made.

    Attributes:
        lengths: N numbers; queries of like number cost least together.
    """

    lengths: list[int]

    def queries(self, batch: Sequence[int]) -> Tensor:
        """Give the vectors of the queries numbered in `batch`, float32 (B, H)."""
        ...

    def close(self) -> None:
        """Leave the encoder as it was found."""
        ...


class VectorInputs:
    """Queries as vectors (N, H) computed once: nothing before the head is trained."""

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors
        self.lengths = [1] * len(vectors)

    def queries(self, batch: Sequence[int]) -> Tensor:
        """Look vectors up."""
        return self.vectors[torch.tensor(batch, device=self.vectors.device)]

    def close(self) -> None:
        """There is nothing to undo."""


class TokenInputs:
    """Queries as tokens, encoded at every step because the adapter changes."""

    def __init__(self, encoder: Encoder, texts: Sequence[str], config: TrainingConfig) -> None:
        self.encoder = encoder
        self.tokens = encoder.tokenize(texts)
        self.lengths = [len(ids) for ids in self.tokens]
        self.backbone = encoder.backbone.cast(training_dtype(config, encoder.backbone))
        if config.activation_checkpointing:
            self.backbone.checkpoint_activations(True)

    def queries(self, batch: Sequence[int]) -> Tensor:
        """Encode, differentiably with respect to the adapter."""
        input_ids, mask = pad([self.tokens[index] for index in batch], device=self.encoder.device)
        return self.encoder(input_ids, mask, backbone=self.backbone)

    def close(self) -> None:
        """Stop checkpointing activations: the blocks may be the retriever's own."""
        self.backbone.checkpoint_activations(False)


def encode_inputs(
    encoder: Encoder, queries: Sequence[str], validation: Sequence[str], store: FeatureStore, report: Report | None
) -> VectorInputs:
    """Encode N queries to train on and M for validation, and number them in this order."""
    # Apart, because vectors depend in their last bits on what shares a batch: validation must change nothing.
    vectors = [encode_with_progress(encoder, queries, store, report)]
    if validation:
        vectors.append(encode_with_progress(encoder, validation, store, report, task="encoding validation queries"))
    return VectorInputs(torch.cat(vectors))


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
