"""A Haystack component: a trained retriever in a pipeline, written to and read from the pipeline's YAML."""

from pathlib import Path
from typing import Any

from caravan.errors import StorageError
from caravan.integrations.found import document_of, missing, opened
from caravan.model.retriever import Retriever

try:
    from haystack import Document, component, default_from_dict, default_to_dict
except ModuleNotFoundError as error:
    raise missing(error, extra="haystack") from None


@component
class CaravanRetriever:
    """Finds documents for a Haystack pipeline.

    A found document's `content` is title and text and its `id` the `doc_id`; its `meta` is the document's own with
    `doc_id`, `title`, `rank`, `score` and `probability`. The document's score is the probability: unlike the head's
    score it means the same for every query.
    """

    def __init__(self, source: str | Path | Retriever, *, top_k: int = 10, device: str = "cpu") -> None:
        """Remember what to load; `warm_up`, or the first run, loads it.

        Args:
            source: a folder that `caravan train` or `caravan.save` wrote, or a retriever.
            top_k: documents a query; above the number of documents it means all.
            device: where a folder's backbone is loaded.
        """
        self.source = source
        self.top_k = top_k
        self.device = device
        self._retriever: Retriever | None = None

    def warm_up(self) -> None:
        """Load the folder, once.

        Raises:
            StorageError: the folder is missing or damaged.
            BackboneError: its frozen model cannot be found.
        """
        if self._retriever is None:
            self._retriever = opened(self.source, device=self.device)

    def to_dict(self) -> dict[str, Any]:
        """Write the component down as plain values, for the pipeline's YAML: the folder's path, never its content.

        Raises:
            StorageError: the component holds a retriever in memory, which no path leads to.
        """
        if isinstance(self.source, Retriever):
            raise StorageError(
                "a pipeline with a retriever in memory cannot be written down; caravan.save it and give the folder"
            )
        return default_to_dict(self, source=str(self.source), top_k=self.top_k, device=self.device)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "CaravanRetriever":
        """Make the component that `to_dict` wrote down."""
        return default_from_dict(cls, data)

    @component.output_types(documents=list[Document])
    def run(self, query: str, top_k: int | None = None) -> dict[str, list[Document]]:
        """Find documents.

        Args:
            query: what is asked.
            top_k: documents; as the component was made if None.

        Returns:
            `{"documents": [...]}`, best first.

        Raises:
            DataError: the query is empty, or top_k below 1.
        """
        self.warm_up()
        assert self._retriever is not None
        documents = []
        for hit in self._retriever.search(query, self.top_k if top_k is None else top_k):
            document, meta = document_of(self._retriever, hit)
            documents.append(Document(id=hit.doc_id, content=document.content, meta=meta, score=hit.probability))
        return {"documents": documents}
