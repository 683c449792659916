"""A retrieval task that trains in milliseconds: documents and queries are letters, each document prefers its own."""

import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from caravan.config import (
    AdapterConfig,
    AdapterStageConfig,
    BackboneConfig,
    HeadConfig,
    HeadStageConfig,
    TrainingConfig,
)
from caravan.data.catalogue import Catalogue
from caravan.data.records import Document, Example
from caravan.model.adapter import IdentityAdapter
from caravan.model.backbone import Backbone, load_backbone
from caravan.model.encoder import Encoder
from caravan.model.retriever import Retriever
from caravan.training.progress import Progress
from caravan.training.trainer import Stage, fit
from tiny_models import make_tiny_bert

LETTERS = {"d0": "abcde", "d1": "fghij", "d2": "klmno", "d3": "pqrst", "d4": "uvwxy"}
CATALOGUE = Catalogue([Document(doc_id, " ".join(letters)) for doc_id, letters in LETTERS.items()])
UNSEEN = 4  # d4 is gold for no query


def toy_backbone(folder: Path, **settings: Any) -> Backbone:
    return load_backbone(BackboneConfig(**{"name": str(make_tiny_bert(folder)), "max_tokens": 24, **settings}))


def toy_retriever(backbone: Backbone, *, adapter: str = "full", **head: Any) -> Retriever:
    """An untrained retriever that ranks by inner product."""
    encoder = Encoder(backbone, IdentityAdapter(backbone.embedding_width))
    rows = encoder.encode([document.content for document in CATALOGUE])
    settings = HeadConfig(**{"hidden": 0, "scale": 5.0, **head})
    return Retriever.start(backbone, CATALOGUE, rows, adapter=AdapterConfig(kind=adapter, rank=4), head=settings)


def toy_examples(count: int = 48, *, seed: int = 0, noise: float = 0.4) -> list[Example]:
    """Queries of 2 to 16 letters, most of them the gold document's, over d0 to d3; all texts differ."""
    source = random.Random(seed)
    examples: dict[str, Example] = {}
    while len(examples) < count:
        gold = f"d{source.randrange(4)}"
        letters = [
            source.choice("abcdefghijklmnopqrst" if source.random() < noise else LETTERS[gold])
            for _ in range(source.randint(2, 16))
        ]
        text = " ".join(letters)
        examples.setdefault(text, Example(text, (gold,), query_id=f"q{len(examples)}"))
    return list(examples.values())


EXAMPLES = toy_examples(48)
VALIDATION = toy_examples(40, seed=1)


def toy_config(*, epochs: int = 3, batch_size: int = 8, rate: float = 0.05, **settings: Any) -> TrainingConfig:
    """Settings of both stages alike; further ones are those of `TrainingConfig` or of the stages."""
    stage = {name: settings.pop(name) for name in ("weight_decay", "label_smoothing") if name in settings}
    stage = {"weight_decay": 0.0, "label_smoothing": 0.0, "epochs": epochs, "batch_size": batch_size, **stage}
    dropout, token_dropout = settings.pop("dropout", 0.0), settings.pop("token_dropout", 0.0)
    rates = {"learning_rate": rate / 10, "head_learning_rate": rate}
    return TrainingConfig(
        head=HeadStageConfig(learning_rate=rate, dropout=dropout, **stage),
        adapter=AdapterStageConfig(**rates, dropout=dropout, token_dropout=token_dropout, **stage),
        **{"precision": "float32", **settings},
    )


def trained(
    backbone: Backbone,
    stage: Stage,
    config: TrainingConfig,
    examples: Sequence[Example] | None = None,
    *,
    start: dict[str, Tensor] | None = None,
    head: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """The trainable state after a training from the same start, on 48 examples unless others are given."""
    retriever = toy_retriever(backbone, **(head or {}))
    if start is not None:
        retriever.load_trainable_state(start)
    fit(retriever, toy_examples() if examples is None else examples, stage, config, **{"seed": 0, **options})
    return retriever.trainable_state()


def recall(retriever: Retriever, examples: Sequence[Example]) -> float:
    hits = [retriever.search(example.text, 1)[0].doc_id in example.doc_ids for example in examples]
    return sum(hits) / len(hits)


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((tensor - theirs[name]).abs().max()) for name, tensor in ours.items())


def move(before: dict[str, Tensor], after: dict[str, Tensor], names: Iterable[str] | None = None) -> float:
    """The L2 norm of what training did to all tensors together."""
    return math.sqrt(sum(float((after[name] - before[name]).square().sum()) for name in names or before))


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def differ(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that are not bit-identical."""
    return {name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])}


class Log:
    """A report that keeps what it is told and, after so many steps of training, raises `StoppedError`."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.told: list[Progress] = []
        self.stop_after = stop_after

    @property
    def steps(self) -> list[Progress]:
        return [progress for progress in self.told if progress.task.startswith("training")]

    def __call__(self, progress: Progress) -> None:
        self.told.append(progress)
        if self.stop_after is not None and len(self.steps) >= self.stop_after:
            raise StoppedError


class StoppedError(Exception):
    pass
