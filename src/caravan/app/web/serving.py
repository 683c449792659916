"""What is served: a retriever, what its batches answer, and how it is exchanged for another one; no HTTP here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Literal

import torch
from torch import Tensor

from caravan.data.records import Hit
from caravan.errors import DataError
from caravan.model.adapter import IdentityAdapter
from caravan.model.encoder import Encoder
from caravan.model.head import FlatHead
from caravan.model.retriever import Retriever, best_rows
from caravan.training.baselines import Bm25

Filter = Mapping[str, str | Sequence[str]]

_SCORES_AT_ONCE = 2**23  # scores held at a time: 32 MiB, whatever the number of queries and documents


@dataclass(frozen=True)
class Asked:
    """One request's piece of a batch.

    Attributes:
        texts: to be encoded.
        wants: "hits" for queries, "vectors", or "ranks": the first text is a query, the others are ranked for it.
        k: hits a query.
        filter: metadata that a hit must have; of several values one.
        mips: whether plain vector search is to be given beside the hits.
        whole: whether texts that the model would cut are refused.
        raw: whether ranks are logits, not probabilities over the texts.
    """

    texts: Sequence[str]
    wants: Literal["hits", "vectors", "ranks"]
    k: int = 10
    filter: Filter = field(default_factory=dict[str, "str | Sequence[str]"])
    mips: bool = False
    whole: bool = False
    raw: bool = False


@dataclass(frozen=True)
class Found:
    """The answer to an `Asked`.

    Attributes:
        served: what it was computed with.
        hits: for "hits", a list for each query.
        mips: for "hits" with `mips`, (row, inner product) for each query, best first.
        vectors: for "vectors", float32 (B, H) on the CPU.
        scores: for "ranks", one for each text behind the query.
    """

    served: "Served"
    hits: Sequence[Sequence[Hit]] = ()
    mips: Sequence[Sequence[tuple[int, float]]] = ()
    vectors: Tensor | None = None
    scores: Sequence[float] = ()


@dataclass(frozen=True)
class Served:
    """A retriever as it is served; it never changes, another one takes its place.

    Attributes:
        retriever: a loaded one.
        stamp: which version of the folder it is, see `folder.stamp`.
        bare_rows: float32 (C, H), the documents' vectors without adapter and head, or None where nobody may ask.
    """

    retriever: Retriever
    stamp: object = None
    bare_rows: Tensor | None = None
    _indexing: Lock = field(default_factory=Lock, init=False, repr=False, compare=False)

    @cached_property
    def bare_encoder(self) -> Encoder:
        """The frozen model without an adapter."""
        backbone = self.retriever.encoder.backbone
        return Encoder(backbone, IdentityAdapter(backbone.embedding_width))

    @cached_property
    def rows_of_content(self) -> dict[str, int]:
        """The row of each document by what it says, of equal ones the first."""
        catalogue = self.retriever.catalogue
        return {catalogue.document(row).content: row for row in reversed(range(len(catalogue)))}

    @cached_property
    def rows_of_metadata(self) -> dict[tuple[str, str], list[int]]:
        """The rows, ascending, that have a value in their metadata."""
        found: dict[tuple[str, str], list[int]] = {}
        for row, document in enumerate(self.retriever.catalogue):
            for pair in document.metadata.items():
                found.setdefault(pair, []).append(row)
        return found

    @cached_property
    def words(self) -> Bm25:
        """The documents by their words."""
        return Bm25([document.content for document in self.retriever.catalogue])

    def by_words(self, queries: Sequence[str], k: int, filter: Filter) -> list[list[tuple[int, float]]]:
        """(row, score) of the documents that share words with each query, best first, by BM25; for any thread.

        Args:
            queries: Q texts.
            k: documents a query at most.
            filter: metadata that a document must have.

        Raises:
            DataError: no document has metadata of a name that is asked for.
        """
        among = self.among(filter)
        among = among if among is None else among.cpu()
        with self._indexing:  # else a crowd that comes first would make the index many times
            index = self.words
        found: list[list[tuple[int, float]]] = []
        for scores in index.scores(queries):
            for own, rows in zip(scores, best_rows(scores, k, among=among), strict=True):
                pairs = zip(rows.tolist(), own[rows].tolist(), strict=True)
                found.append([(row, score) for row, score in pairs if score > 0])
        return found

    def among(self, filter: Filter) -> Tensor | None:
        """The rows that a filter leaves, int64 ascending; None: all.

        Raises:
            DataError: no document has metadata of a name that is asked for.
        """
        if not filter:
            return None
        left: set[int] | None = None
        for name, values in filter.items():
            wanted = [values] if isinstance(values, str) else values
            if not any(known == name for known, _ in self.rows_of_metadata):
                raise DataError(f"no document has metadata {name[:60]!r}; check the filter")
            rows = {row for value in wanted for row in self.rows_of_metadata.get((name, value), ())}
            left = rows if left is None else left & rows
        return torch.tensor(sorted(left or ()), dtype=torch.int64, device=self.retriever.encoder.device)

    @torch.inference_mode()
    def answer(self, batch: Sequence[Asked]) -> list[Found]:
        """Answer pieces of a batch, encoding all their texts together.

        Raises:
            DataError: a text is empty or no text, a filter names what no document has, or a text is too long.
            BackboneError: a vector is not finite.
        """
        texts = [text for asked in batch for text in asked.texts]
        encoder = self.retriever.encoder
        vectors = encoder.encode(texts)
        parts = vectors.split([len(asked.texts) for asked in batch])
        for asked in batch:
            if asked.whole:
                self._check_length(asked.texts)
        scored = self._scores([part for asked, part in zip(batch, parts, strict=True) if asked.wants == "hits"])
        return [self._found(asked, part, scored) for asked, part in zip(batch, parts, strict=True)]

    def _found(self, asked: Asked, vectors: Tensor, scored: "list[Tensor] | None") -> Found:
        if asked.wants == "vectors":
            return Found(self, vectors=vectors.cpu())
        if asked.wants == "ranks":
            return Found(self, scores=self._ranks(asked, vectors))
        among = self.among(asked.filter)
        scores = scored.pop(0) if scored is not None else None
        hits: list[list[Hit]] = []
        for part in vectors.split(self._queries_at_once) if scores is None else [scores]:
            hits += self.retriever.hits(self.retriever.head(part) if scores is None else part, asked.k, among=among)
        return Found(self, hits=hits, mips=self._mips(asked, vectors, among) if asked.mips else ())

    @property
    def _queries_at_once(self) -> int:
        return max(1, _SCORES_AT_ONCE // len(self.retriever.catalogue))

    def _scores(self, parts: Sequence[Tensor]) -> list[Tensor] | None:
        """The scores of all queries in one product; None where they would take too much memory together."""
        sizes = [len(part) for part in parts]
        if not parts or sum(sizes) > self._queries_at_once:
            return None
        return list(self.retriever.head(torch.cat(list(parts))).split(sizes))

    def _mips(self, asked: Asked, vectors: Tensor, among: Tensor | None) -> list[list[tuple[int, float]]]:
        if self.bare_rows is None:
            raise DataError("plain vector search is not kept ready here; start the service with --mips")
        bare = vectors if self.retriever.encoder.is_identity() else self.bare_encoder.encode(asked.texts)
        found: list[list[tuple[int, float]]] = []
        for part in bare.split(self._queries_at_once):
            scores = part @ self.bare_rows.T
            for own, rows in zip(scores, best_rows(scores, asked.k, among=among), strict=True):
                found.append(list(zip(rows.tolist(), own[rows].tolist(), strict=True)))
        return found

    def _ranks(self, asked: Asked, vectors: Tensor) -> list[float]:
        """Scores of any texts for a query: by its trained row where a text is a document, else as a new document."""
        head = self.retriever.head
        if not isinstance(head, FlatHead):  # cannot be saved, so cannot be served
            raise TypeError(type(head).__name__)
        known = [self.rows_of_content.get(text) for text in asked.texts[1:]]
        rows, biases = head.new_rows(vectors[1:], normalize=self.retriever.encoder.normalize)
        for number, row in enumerate(known):
            if row is not None:
                rows[number], biases[number] = head.rows[row], head.bias[row]
        query = vectors[:1] if head.pre is None else head.pre(vectors[:1])
        logits = head.log_scale.exp() * (query @ rows.T).squeeze(0) + biases
        return (logits if asked.raw else logits.softmax(dim=0)).tolist()

    def _check_length(self, texts: Sequence[str]) -> None:
        limit = self.retriever.encoder.backbone.max_tokens
        for number, tokens in enumerate(self.retriever.encoder.tokenize(texts), start=1):
            if len(tokens) >= limit:
                raise DataError(f"text {number} has {limit} tokens or more, which would be cut; set truncate to true")


def bare_rows(served: Served, before: Served | None, encode: Callable[[Sequence[str]], Tensor]) -> Tensor:
    """Vectors of all documents by the frozen model alone, float32 (C, H).

    Args:
        served: what will be served.
        before: what is served now; of documents that say the same the vectors are taken over.
        encode: turns texts into vectors of the frozen model.
    """
    contents = [document.content for document in served.retriever.catalogue]
    backbone = served.retriever.encoder.backbone
    known: dict[str, int] = {}
    rows = torch.empty(len(contents), backbone.hidden_width, device=served.retriever.encoder.device)
    if before is not None and before.bare_rows is not None and before.bare_encoder.key() == served.bare_encoder.key():
        known = before.rows_of_content
        taken = [(number, known[text]) for number, text in enumerate(contents) if text in known]
        if taken:
            into, of = (torch.tensor(part) for part in zip(*taken, strict=True))
            rows[into] = before.bare_rows[of]
    missing = [number for number, text in enumerate(contents) if text not in known]
    if missing:
        rows[torch.tensor(missing)] = encode([contents[number] for number in missing])
    return rows
