"""A whole data set of letters and settings that train on it in milliseconds."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from caravan.config import BackboneConfig, Config, EvaluationConfig, FederationConfig, HeadConfig
from caravan.data.catalogue import Catalogue
from caravan.data.dataset import Dataset
from caravan.data.records import Document, Example
from caravan.model.retriever import Retriever
from toy_training import CATALOGUE, LETTERS, toy_config, toy_examples

SITES = {"east": 6, "north": 4, "west": 2}  # of every twelve training queries


def toy_dataset(count: int = 48, *, validation: int = 20, test: int = 30, noise: float = 0.4) -> Dataset:
    """Queries over d0 to d3 of five documents, those of train from three sites of uneven size."""
    sites = [site for site, share in SITES.items() for _ in range(share)]
    train = [
        replace(example, columns={"site": sites[number % len(sites)]})
        for number, example in enumerate(toy_examples(count, seed=0, noise=noise))
    ]
    held_out = [toy_examples(size, seed=seed, noise=noise) for seed, size in ((1, validation), (2, test))]
    return Dataset("letters", CATALOGUE, train, *held_out)


def with_wrong_documents(dataset: Dataset) -> Dataset:
    """The same with documents whose text is another one's, so that only the queries tell what they are about."""
    letters = list(LETTERS.values())
    texts = [*letters[1:4], letters[0], letters[4]]
    documents = [Document(doc_id, " ".join(text)) for doc_id, text in zip(LETTERS, texts, strict=True)]
    return replace(dataset, catalogue=Catalogue(documents))


def with_wrong_queries(dataset: Dataset) -> Dataset:
    """The same with training queries of which each names the next document."""
    following = {"d0": "d1", "d1": "d2", "d2": "d3", "d3": "d0"}
    train = [replace(example, doc_ids=(following[example.doc_ids[0]],)) for example in dataset.train]
    return replace(dataset, train=train)


def toy_settings(backbone: BackboneConfig, *, seed: int = 13, **parts: Any) -> Config:
    """Settings with dropout in both stages; `head`, `federation` and `evaluation` change parts, the rest training."""
    head = {"hidden": 0, "scale": 5.0, "start": "documents", **parts.pop("head", {})}
    federation, evaluation = parts.pop("federation", {}), {"bootstrap": 20, **parts.pop("evaluation", {})}
    return Config(
        seed=seed,
        backbone=backbone,
        head=HeadConfig(**head),
        federation=FederationConfig(**federation),
        evaluation=EvaluationConfig(**evaluation),
        training=toy_config(**{"dropout": 0.2, "token_dropout": 0.1, **parts}),
    )


def share_found(retriever: Retriever, examples: Sequence[Example]) -> float:
    """Recall@1, counted by searching."""
    results = retriever.search([example.text for example in examples], 1)
    found = [hits[0].doc_id in example.doc_ids for hits, example in zip(results, examples, strict=True)]
    return sum(found) / len(found)
