"""A LlamaIndex retriever: `retrieve` and `aretrieve` on a trained retriever, for query engines and fusion."""

import asyncio
from pathlib import Path

from caravan.data.records import Hit
from caravan.integrations.found import document_of, missing, opened
from caravan.model.retriever import Retriever

try:
    from llama_index.core.base.base_retriever import BaseRetriever
    from llama_index.core.callbacks import CallbackManager
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
except ModuleNotFoundError as error:
    raise missing(error, extra="llama-index") from None

_NUMBERS = ["rank", "score", "probability"]  # in the metadata, but no words for a language model to read


class CaravanRetriever(BaseRetriever):
    """Finds nodes for a LlamaIndex query engine.

    A node's text is title and text of the document and its id the `doc_id`; its metadata is the document's own with
    `doc_id`, `title`, `rank`, `score` and `probability`. The node's score is the probability: unlike the head's score
    it means the same for every query, as a `SimilarityPostprocessor` needs.
    """

    def __init__(
        self,
        source: str | Path | Retriever,
        *,
        similarity_top_k: int = 2,  # as LlamaIndex' own retrievers
        device: str = "cpu",
        callback_manager: CallbackManager | None = None,
        verbose: bool = False,
    ) -> None:
        """Load the retriever.

        Args:
            source: a folder that `caravan train` or `caravan.save` wrote, or a retriever.
            similarity_top_k: nodes a query; above the number of documents it means all.
            device: where a folder's backbone is loaded.
            callback_manager: see LlamaIndex.
            verbose: see LlamaIndex.

        Raises:
            StorageError: the folder is missing or damaged.
            BackboneError: its frozen model cannot be found.
        """
        super().__init__(callback_manager=callback_manager, verbose=verbose)
        self.similarity_top_k = similarity_top_k
        self._retriever = opened(source, device=device)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [self._node(hit) for hit in self._retriever.search(query_bundle.query_str, self.similarity_top_k)]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        # In a thread: the event loop has other questions to answer while the model computes.
        return await asyncio.to_thread(self._retrieve, query_bundle)

    def _node(self, hit: Hit) -> NodeWithScore:
        document, metadata = document_of(self._retriever, hit)
        node = TextNode(
            id_=hit.doc_id,
            text=document.content,
            metadata=metadata,
            excluded_llm_metadata_keys=_NUMBERS,
            excluded_embed_metadata_keys=_NUMBERS,
        )
        return NodeWithScore(node=node, score=hit.probability)
