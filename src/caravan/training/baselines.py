"""What the trained retriever is measured against: MIPS, class centroids, 1-nearest-neighbour and BM25."""

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from caravan.errors import DataError
from caravan.training.evaluation import Ranking, rank

_SCORED_AT_ONCE = 2**23  # scores held at a time: 32 MiB, whatever the number of queries and documents
_NEVER_SEEN = -1e30  # below any inner product, yet finite


def mips(queries: Tensor, documents: Tensor) -> Ranking:
    """Maximum-inner-product search on the document vectors: the untrained retriever.

    Args:
        queries: float (Q, H).
        documents: float (C, H), one row a document.

    Raises:
        DataError: there is no query or no document.
        TrainingError: a vector is not finite.
    """
    columns = documents.detach().float().T
    return rank(chunk @ columns for chunk in _chunks(queries, len(documents)))


def centroids(queries: Tensor, train: Tensor, gold: Sequence[Sequence[int]], documents: Tensor) -> Ranking:
    """Maximum-inner-product search on `class_centroids`: Rocchio classification.

    Source: Manning, Raghavan and Schütze, Introduction to Information Retrieval, 2008, section 14.2.

    Args:
        queries: float (Q, H), L2-normalised.
        train: float (N, H), the training queries, L2-normalised.
        gold: for each training query its gold catalogue rows.
        documents: float (C, H), L2-normalised; they stand in where a document has no training query.

    Raises:
        DataError: the gold rows do not fit, or there is no query or no document.
        TrainingError: a vector is not finite.
    """
    return mips(queries, class_centroids(train, gold, documents))


def class_centroids(train: Tensor, gold: Sequence[Sequence[int]], documents: Tensor) -> Tensor:
    """The L2-normalised mean of each document's training queries.

    Args:
        train: float (N, H), the training queries.
        gold: for each training query its gold catalogue rows; it counts fully for each of them.
        documents: float (C, H).

    Returns:
        float32 (C, H) on the documents' device. A document keeps its own vector where it has no training query or
        where they cancel out.

    Raises:
        DataError: the gold rows do not fit.
    """
    examples, rows = _pairs(gold, len(train), len(documents))
    own = documents.detach().float()
    # The mean points where the sum points: no need to count.
    sums = torch.zeros_like(own).index_add_(0, rows.to(own.device), train.detach().float()[examples].to(own.device))
    usable = (sums != 0).any(dim=1, keepdim=True)
    return torch.where(usable, normalize(sums, dim=1), own)


def nearest_neighbour(queries: Tensor, train: Tensor, gold: Sequence[Sequence[int]], *, document_count: int) -> Ranking:
    """1-nearest-neighbour over training queries: a document scores as its best training query.

    Source: Cover and Hart, Nearest Neighbor Pattern Classification, 1967. Documents without a training query come
    last, in catalogue order, with the score -1e30.

    Args:
        queries: float (Q, H).
        train: float (N, H), the training queries.
        gold: for each training query its gold catalogue rows.
        document_count: C, the size of the catalogue.

    Raises:
        DataError: the gold rows do not fit, or there is no query or no document.
        TrainingError: a vector is not finite.
    """
    examples, rows = _pairs(gold, len(train), document_count)
    # Sorted by document, each document's training queries are neighbours, and its best is the maximum of a run.
    rows, order = rows.sort(stable=True)
    columns = train.detach().float().cpu()[examples[order]].T
    seen, counts = rows.unique_consecutive(return_counts=True)
    starts = (counts.cumsum(0) - counts).numpy()

    def scores() -> Iterator[Tensor]:
        for chunk in _chunks(queries.cpu(), max(columns.shape[1], document_count)):
            batch = torch.full((len(chunk), document_count), _NEVER_SEEN)
            if len(seen):
                batch[:, seen] = torch.from_numpy(np.maximum.reduceat((chunk @ columns).numpy(), starts, axis=1))
            yield batch

    return rank(scores())


def bm25(query_texts: Sequence[str], document_texts: Sequence[str]) -> Ranking:
    """BM25, see `Bm25`; a query without any known word scores 0 everywhere and so ranks in catalogue order.

    Args:
        query_texts: Q queries.
        document_texts: C documents, one a catalogue row.

    Raises:
        DataError: there is no query or no document.
    """
    return rank(Bm25(document_texts).scores(query_texts))


class Bm25:
    """Documents by their words, scored with BM25 as in Lucene (k1 = 1.5, b = 0.75; bm25s, arXiv:2407.03618).

    Words are the library's: lower-cased runs of two or more letters, digits or underscores, without its English stop
    words, not stemmed.
    """

    def __init__(self, document_texts: Sequence[str]) -> None:
        """Index documents.

        Args:
            document_texts: C documents, one a catalogue row.
        """
        # Half a second of import, and nothing else here needs it.
        import bm25s

        self._count, self._index = len(document_texts), bm25s.BM25()
        documents = _words(document_texts)
        self._empty = not any(documents)  # the library cannot index a vocabulary of no words
        if not self._empty:
            self._index.index(documents, show_progress=False)

    def scores(self, query_texts: Sequence[str]) -> Iterator[Tensor]:
        """Score every document for every query: float32 (b, C) pieces of (Q, C), small enough to hold."""
        queries = _words(query_texts)
        if self._empty:
            yield from (torch.zeros(1, self._count) for _ in queries)
            return
        at_once = max(1, _SCORED_AT_ONCE // self._count)
        for start in range(0, len(queries), at_once):
            # Not the library's own top-k: it leaves the order of equal scores to chance.
            known = [self._index.get_tokens_ids(query) for query in queries[start : start + at_once]]
            yield torch.from_numpy(np.stack([self._index.get_scores_from_ids(ids) for ids in known]))


def _words(texts: Sequence[str]) -> list[list[str]]:
    import bm25s

    tokens = bm25s.tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False)
    return cast("list[list[str]]", tokens)


def _chunks(queries: Tensor, width: int) -> Iterator[Tensor]:
    """Float32 (b, H) pieces of queries (Q, H), small enough for b x width scores."""
    yield from queries.detach().float().split(max(1, _SCORED_AT_ONCE // max(1, width)))


def _pairs(gold: Sequence[Sequence[int]], examples: int, documents: int) -> tuple[Tensor, Tensor]:
    """All (training query, gold row) pairs as two int64 tensors of one length."""
    if len(gold) != examples:
        raise DataError(f"{examples} training queries but gold rows for {len(gold)}; give both in one order")
    for example, rows in enumerate(gold):
        for row in rows:
            if not 0 <= row < documents:
                raise DataError(
                    f"training query {example} has the gold row {row}, the catalogue has rows 0 to {documents - 1}; "
                    "read data and catalogue together"
                )
    sizes = torch.tensor([len(rows) for rows in gold], dtype=torch.int64)
    gold_rows = torch.tensor([row for rows in gold for row in rows], dtype=torch.int64)
    return torch.repeat_interleave(torch.arange(examples), sizes), gold_rows
