"""A LangChain retriever: `invoke`, `ainvoke`, `batch` and `abatch` on a trained retriever."""

from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr

from caravan.integrations.found import document_of, missing, opened
from caravan.model.retriever import Retriever

try:
    from langchain_core.callbacks import CallbackManagerForRetrieverRun
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever
except ModuleNotFoundError as error:
    raise missing(error, extra="langchain") from None


class CaravanRetriever(BaseRetriever):
    """Finds documents for a LangChain chain; each query of a batch is searched in a thread of its own.

    A found document's `page_content` is title and text; its `metadata` is the document's own with `doc_id`, `title`,
    `rank`, `score` and `probability`, and its `id` is the `doc_id`.

    Attributes:
        source: a folder that `caravan train` or `caravan.save` wrote, or a retriever.
        k: documents a query; above the number of documents it means all.
        device: where a folder's backbone is loaded.

    Raises:
        StorageError: the folder is missing or damaged.
        BackboneError: its frozen model cannot be found.
    """

    source: str | Path | Retriever
    k: int = Field(default=4, ge=1)  # LangChain's own vector stores give four
    device: str = "cpu"
    _retriever: Retriever = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Load the folder at once: a missing one is told where it is named, not at the first question."""
        super().model_post_init(context)
        self._retriever = opened(self.source, device=self.device)

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        found = []
        for hit in self._retriever.search(query, self.k):
            document, metadata = document_of(self._retriever, hit)
            found.append(Document(id=hit.doc_id, page_content=document.content, metadata=metadata))
        return found
