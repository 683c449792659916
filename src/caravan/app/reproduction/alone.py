"""Clients by themselves: heads that each trains on its own queries, alone or from a shared one."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from caravan.app.learning import Experiment
from caravan.data.dataset import Dataset
from caravan.data.partition import Shard
from caravan.data.records import Example
from caravan.federation.personal import personalise
from caravan.model.retriever import Retriever
from caravan.training.features import FeatureStore
from caravan.training.trainer import fit


class Queries:
    """Queries whose vectors are kept here, for many heads on one untouched encoder."""

    def __init__(
        self, dataset: Dataset, examples: Sequence[Example], retriever: Retriever, store: FeatureStore
    ) -> None:
        self.gold = [set(dataset.catalogue.gold_rows(example)) for example in examples]
        self.vectors = store.encode(retriever.encoder, [example.text for example in examples])

    @torch.no_grad()
    def hits(self, retriever: Retriever) -> list[bool]:
        """Whether each query's first document is a right one."""
        first = [row for part in self.vectors.split(512) for row in retriever.head(part).argmax(dim=1).tolist()]
        return [row in gold for row, gold in zip(first, self.gold, strict=True)]


def own_places(dataset: Dataset, column: str | None, least: int) -> dict[str, list[int]]:
    """The places in test of each client's own queries, by client.

    Args:
        dataset: train and test.
        column: that names a query's client in both; None: no query of test is anybody's.
        least: queries in train that a client needs to count.
    """
    if column is None:
        return {}
    counts: dict[str, int] = {}
    for example in dataset.train:
        counts[example.columns[column]] = counts.get(example.columns[column], 0) + 1
    places: dict[str, list[int]] = {}
    for place, example in enumerate(dataset.test):
        if counts.get(example.columns.get(column, ""), 0) >= least:
            places.setdefault(example.columns[column], []).append(place)
    return places


def local(experiment: Experiment, own: Mapping[str, Sequence[int]], drawn: Sequence[Example]) -> dict[str, Any]:
    """Train every client alone, with the work that it does in the federation.

    Args:
        experiment: not run; of the head alone, with clients.
        own: see `own_places`.
        drawn: test queries that each client's head ranks.

    Returns:
        "test": recall@1 of `drawn`, mean over clients weighted by their queries; "own": over clients' own queries.
    """
    dataset, retriever, store = experiment.dataset, experiment.retriever, experiment.store
    start = retriever.trainable_state()
    asked = Queries(dataset, drawn, retriever, store)
    weighted, hits = 0.0, []
    for place, shard in enumerate(experiment.shards):
        retriever.load_trainable_state(start)
        fit(
            retriever,
            shard.examples,
            "head",
            experiment.config.training,
            seed=experiment.config.seed + place,
            passages=experiment.passages[place :: len(experiment.shards)],
            store=store,
        )
        weighted += statistics.mean(asked.hits(retriever)) * len(shard.examples)
        hits += _own_hits(experiment, shard, own)
    return {"test": weighted / len(dataset.train), "own": _share(hits)}


def personal(experiment: Experiment, own: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Give every client that counts a head of its own, made from the shared one (`federation.personal`).

    Args:
        experiment: run; its retriever is as before afterwards.
        own: see `own_places`.

    Returns:
        "own": recall@1 over clients' own queries.
    """
    retriever, start = experiment.retriever, experiment.retriever.trainable_state()
    training, hits = experiment.config.training, []
    for place, shard in enumerate(experiment.shards):
        if shard.name in own:
            retriever.load_trainable_state(start)
            seed = experiment.config.seed + place
            personalise(retriever, shard.examples, training, seed=seed, store=experiment.store)
            hits += _own_hits(experiment, shard, own)
    retriever.load_trainable_state(start)
    return {"own": _share(hits)}


def _own_hits(experiment: Experiment, shard: Shard, own: Mapping[str, Sequence[int]]) -> list[bool]:
    examples = [experiment.dataset.test[place] for place in own.get(shard.name, ())]
    if not examples:
        return []
    return Queries(experiment.dataset, examples, experiment.retriever, experiment.store).hits(experiment.retriever)


def _share(hits: Sequence[bool]) -> float | None:
    return statistics.mean(hits) if hits else None
