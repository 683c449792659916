"""A whole data set of letters and settings that train on it in milliseconds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from caravan.config import BackboneConfig, Config, DataConfig, EvaluationConfig, FederationConfig, HeadConfig
from caravan.data.catalogue import Catalogue
from caravan.data.dataset import Dataset
from caravan.data.records import Document, Example
from caravan.model.retriever import Retriever
from caravan.training.progress import Progress
from command_line import write_table
from toy_training import CATALOGUE, LETTERS, toy_backbone, toy_config, toy_examples

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


DATASET = toy_dataset()  # no test changes it


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


class Raising:
    """A report that raises when a piece of work whose name begins with `task` is told of for the n-th time."""

    def __init__(self, task: str, error: BaseException, *, after: int = 1) -> None:
        self.task, self.error, self.left = task, error, after

    def __call__(self, progress: Progress) -> None:
        self.left -= progress.task.startswith(self.task)
        if self.left < 1 and progress.task.startswith(self.task):
            raise self.error


@dataclass(frozen=True)
class Place:
    """A data set on disk, and settings that train on it quickly.

    Attributes:
        data: the folder.
        config: makes settings; takes those of `toy_settings`, `path` for other data, and `validation_fraction`.
    """

    data: Path
    config: Callable[..., Config]


def make_place(root: Path) -> Place:
    """Write the data set of `toy_dataset` and a tiny backbone."""
    data, dataset = root / "letters", toy_dataset()
    for split in ("train", "validation", "test"):
        rows = [
            (example.text, example.doc_ids[0], example.columns.get("site", "east"))
            for example in getattr(dataset, split)
        ]
        write_table(data / f"{split}.csv", ("text", "label", "site"), rows)
    documents = [(document.doc_id, document.text) for document in CATALOGUE]
    write_table(data / "documents.csv", ("doc_id", "text"), documents)
    backbone = toy_backbone(root / "bert").config

    def config(*, path: Path = data, validation_fraction: float = 0.1, **parts: Any) -> Config:
        lean = {"baselines": False, **parts.pop("evaluation", {})}
        words = DataConfig(path=str(path), validation_fraction=validation_fraction)
        return replace(toy_settings(backbone, **{"evaluation": lean, "epochs": 2, **parts}), data=words)

    return Place(data, config)
