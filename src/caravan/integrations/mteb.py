"""MTEB models: a trained retriever, or the frozen model alone, as a `SearchProtocol` for `mteb.evaluate`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from caravan.app.answers.evidence import fingerprint_of
from caravan.config import AdapterConfig, BackboneConfig, HeadConfig
from caravan.data.catalogue import Catalogue
from caravan.data.records import Document
from caravan.errors import DataError
from caravan.integrations.found import missing, opened
from caravan.model.adapter import IdentityAdapter
from caravan.model.backbone import load_backbone
from caravan.model.encoder import Encoder
from caravan.model.retriever import Retriever, best_rows

try:
    from mteb.models import ModelMeta
except ModuleNotFoundError as error:
    raise missing(error, extra="mteb") from None

Rows = Sequence[Mapping[str, Any]]  # of a `datasets.Dataset`
_QUERIES_AT_ONCE = 256


class _Search(ABC):
    """What both have in common: `index` finds the retriever and its rows, `search` ranks them."""

    name: str
    retriever: Retriever
    rows: torch.Tensor | None  # int64 (c,), ascending: what may be found; all if None

    @abstractmethod
    def index(self, corpus: Rows, **options: Any) -> None:
        """Take the documents that may be found, with `id`, `text` and perhaps `title`."""

    def search(
        self,
        queries: Rows,
        *,
        top_k: int,
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        **options: Any,
    ) -> dict[str, dict[str, float]]:
        """Rank the indexed documents.

        Args:
            queries: with `id` and `text`.
            top_k: documents a query.
            top_ranked: of a reranking task, by query the documents to rank.
            options: what else MTEB hands over; it changes nothing here.

        Returns:
            By query the scores of its best documents.

        Raises:
            DataError: a query is empty, or a document to be reranked was not indexed.
        """
        found: dict[str, dict[str, float]] = {}
        ids, texts = list(_column(queries, "id")), list(_column(queries, "text"))
        batches = self.retriever.score_batches(texts, batch_size=_QUERIES_AT_ONCE)
        scores = (row for batch in batches for row in batch.cpu())
        catalogue = self.retriever.catalogue
        for query, row in zip(ids, scores, strict=True):
            among = self.rows
            if top_ranked is not None:
                among = torch.tensor(sorted(catalogue.row(doc_id) for doc_id in top_ranked.get(query, ())))
            (best,) = best_rows(row.unsqueeze(0), top_k, among=among)
            found[query] = {catalogue.ids[index]: float(row[index]) for index in best.tolist()}
        return found

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """Name and revision, under which MTEB keeps results; another training is another revision."""
        facts = {"name": self.name, "revision": self._revision(), "framework": ["PyTorch"], "open_weights": True}
        return ModelMeta.create_empty(facts)

    @abstractmethod
    def _revision(self) -> str: ...


class TrainedSearch(_Search):
    """A trained retriever: it ranks the documents that it was trained on, all of a task's corpus or a part of it."""

    def __init__(self, source: str | Path | Retriever, *, name: str = "caravan/retriever", device: str = "cpu") -> None:
        """Load the retriever.

        Args:
            source: a folder that `caravan train` or `caravan.save` wrote, or a retriever.
            name: what MTEB calls it, as OWNER/NAME.
            device: where a folder's backbone is loaded.
        """
        self.name, self.retriever, self.rows = name, opened(source, device=device), None

    def index(self, corpus: Rows, **options: Any) -> None:
        """Take the corpus, which must be documents of the retriever's, word for word.

        Raises:
            DataError: a document is another than the one of its id that the retriever knows, or unknown to it.
        """
        known = {document.doc_id: document.content for document in self.retriever.catalogue}
        documents = _documents(corpus)
        for document in documents:
            if known.get(document.doc_id) != document.content:
                raise DataError(
                    f"document {document.doc_id!r} of the corpus is not one that {self.name} was trained on; train it "
                    "on this corpus, or use FrozenSearch, which takes any"
                )
        self.rows = torch.tensor(sorted(self.retriever.catalogue.row(document.doc_id) for document in documents))

    def _revision(self) -> str:
        return fingerprint_of(self.retriever)[:16]


class FrozenSearch(_Search):
    """The frozen model alone, by maximum-inner-product search (MIPS): what training is measured against."""

    def __init__(self, backbone: BackboneConfig | None = None, *, name: str = "caravan/frozen") -> None:
        """Load the frozen model; the default one if None."""
        self.name, self.rows, self._backbone = name, None, load_backbone(backbone or BackboneConfig())

    def index(self, corpus: Rows, **options: Any) -> None:
        """Encode the corpus."""
        catalogue, plain = Catalogue(_documents(corpus)), AdapterConfig(kind="none")
        encoder = Encoder(self._backbone, IdentityAdapter(self._backbone.embedding_width))
        vectors = encoder.encode([document.content for document in catalogue])
        self.retriever = Retriever.start(
            self._backbone, catalogue, vectors, adapter=plain, head=HeadConfig(hidden=0, scale=1.0)
        )

    def _revision(self) -> str:
        return self._backbone.hash[:16]


def _documents(corpus: Rows) -> list[Document]:
    titles = _column(corpus, "title") if "title" in corpus[0] else [""] * len(corpus)
    return [
        Document(doc_id, text, title or "")
        for doc_id, text, title in zip(_column(corpus, "id"), _column(corpus, "text"), titles, strict=True)
    ]


def _column(rows: Rows, name: str) -> list[str]:
    return [row[name] for row in rows]
