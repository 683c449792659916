"""Parts of data sets, small enough for the time there is."""

import random
from collections.abc import Sequence
from dataclasses import replace

from caravan.data.catalogue import Catalogue
from caravan.data.dataset import Dataset
from caravan.data.records import Example


def part_of(
    dataset: Dataset, *, classes: int | None = None, train: int | None = None, test: int | None = None, seed: int = 0
) -> Dataset:
    """Keep some documents, and draw some of their queries.

    Args:
        dataset: the whole.
        classes: how many documents, of those with training queries the first; None: all there are.
        train: how many training queries; None: all.
        test: how many test queries; None: all.
        seed: of the draw.
    """
    if classes is not None:
        dataset = first_classes(dataset, classes)
    return replace(dataset, train=some(dataset.train, train, seed), test=some(dataset.test, test, seed))


def first_classes(dataset: Dataset, classes: int) -> Dataset:
    """Keep the first documents that have training queries, and the queries that these alone answer."""
    asked = {doc_id for example in dataset.train for doc_id in example.doc_ids}
    kept = [document for document in dataset.catalogue if document.doc_id in asked][:classes]
    ids = {document.doc_id for document in kept}

    def answered(examples: Sequence[Example]) -> list[Example]:
        return [example for example in examples if ids.issuperset(example.doc_ids)]

    return replace(
        dataset,
        catalogue=Catalogue(kept),
        train=answered(dataset.train),
        validation=answered(dataset.validation),
        test=answered(dataset.test),
    )


def some(examples: Sequence[Example], count: int | None, seed: int) -> Sequence[Example]:
    """Draw `count` examples at random, in their order; all of them if there are no more, or `count` is None."""
    if count is None or count >= len(examples):
        return examples
    chosen = sorted(random.Random(seed).sample(range(len(examples)), count))
    return [examples[place] for place in chosen]
