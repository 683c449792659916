"""The retriever: an encoder, a head and the catalogue whose rows the head scores."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from caravan.config import AdapterConfig, HeadConfig
from caravan.data.dataset import Catalogue
from caravan.data.records import Hit
from caravan.errors import DataError, StorageError
from caravan.model.adapter import make_adapter
from caravan.model.backbone import Backbone
from caravan.model.encoder import Encoder
from caravan.model.head import FlatHead, OutputAdapterHead


class Retriever(nn.Module):
    """A classifier-as-retriever: text to query vector to a score per document (arXiv:2509.16508, section 4).

    Attributes:
        encoder: frozen backbone and adapter; texts to float32 (B, H).
        head: float32 (B, H) to logits float32 (B, C).
        catalogue: document ids, titles and texts by row.
        record: what is saved beside the tensors: settings, history, versions, metrics.

    Raises:
        DataError: the head has not one row a document, or rows of another width than the vectors.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: FlatHead | OutputAdapterHead,
        catalogue: Catalogue,
        *,
        adapter_config: AdapterConfig,
        head_config: HeadConfig,
    ) -> None:
        super().__init__()
        if head.rows.shape != (len(catalogue), encoder.width):
            raise DataError(
                f"a head with rows {tuple(head.rows.shape)} does not fit {len(catalogue)} documents and vectors of "
                f"width {encoder.width}; give one row a document"
            )
        self.encoder = encoder
        self.head = head
        self.catalogue = catalogue
        self.adapter_config = adapter_config
        self.head_config = head_config
        self.record: dict[str, Any] = {}

    @classmethod
    def start(
        cls,
        backbone: Backbone,
        catalogue: Catalogue,
        rows: Tensor,
        *,
        adapter: AdapterConfig | None = None,
        head: HeadConfig | None = None,
    ) -> "Retriever":
        """Make an untrained retriever: an identity adapter, and a head whose rows are given.

        Args:
            backbone: the frozen model.
            catalogue: C documents.
            rows: float32 (C, H): document vectors make it MIPS, class centroids the nearest-centroid rule.
            adapter: which adapter; the default settings if None.
            head: which head; the default settings if None.
        """
        adapter, head = adapter or AdapterConfig(), head or HeadConfig()
        encoder = Encoder(backbone, make_adapter(adapter, backbone.embedding_width))
        return cls(encoder, FlatHead(rows, head), catalogue, adapter_config=adapter, head_config=head)

    def trainable_state(self) -> dict[str, Tensor]:
        """Copy all that is trained, stored and sent: `adapter.*` and `head.*` tensors, float32, on the CPU."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.named_trainables()}

    def named_trainables(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Walk over the trainable parameters by the names under which they are stored and sent."""
        for name, parameter in self.encoder.adapter.named_parameters():
            yield f"adapter.{name}", parameter
        for name, parameter in self.head.named_parameters():
            yield f"head.{name}", parameter

    @torch.no_grad()
    def load_trainable_state(self, state: Mapping[str, Tensor], *, partial: bool = False) -> None:
        """Take over tensors that `trainable_state` gave.

        Args:
            state: the tensors by name.
            partial: some names may be missing; their parameters stay as they are.

        Raises:
            StorageError: a name is missing or unknown, a shape is another, or a value is not finite.
        """
        parameters = dict(self.named_trainables())
        if partial:
            state = {**self.trainable_state(), **state}
        if parameters.keys() != state.keys():
            missing, unknown = sorted(parameters.keys() - state.keys()), sorted(state.keys() - parameters.keys())
            raise StorageError(f"the tensors do not fit this retriever: missing {missing}, unknown {unknown}")
        for name, parameter in parameters.items():
            if state[name].shape != parameter.shape:
                raise StorageError(
                    f"{name} has shape {tuple(state[name].shape)}, this retriever needs {tuple(parameter.shape)}"
                )
            if not torch.isfinite(state[name]).all():
                raise StorageError(
                    f"{name} holds values that are not finite; the file is damaged or the training diverged"
                )
        for name, parameter in parameters.items():
            parameter.copy_(state[name])

    @torch.no_grad()
    def score_batches(
        self, texts: Sequence[str], *, batch_size: int = 256, progress: Callable[[int], None] | None = None
    ) -> Iterator[Tensor]:
        """Score all documents for many queries: float32 (b, C) at a time, in the order of the texts."""
        vectors = self.encoder.encode(texts, progress=progress)
        for start in range(0, len(vectors), batch_size):
            yield self.head(vectors[start : start + batch_size])

    @overload
    def search(self, text: str, k: int = 10) -> list[Hit]: ...  # pyright: ignore[reportOverlappingOverload]

    @overload
    def search(self, text: Sequence[str], k: int = 10) -> list[list[Hit]]: ...

    def search(self, text: str | Sequence[str], k: int = 10) -> list[Hit] | list[list[Hit]]:
        """Find the k documents most likely to answer.

        Args:
            text: one query, or several.
            k: hits a query; above the number of documents it means all.

        Returns:
            Hits, best first, of equal scores the document that comes first in the catalogue; a list of such lists for
            several queries.

        Raises:
            DataError: a query is empty or no text, or k is below 1.
        """
        if k < 1:
            raise DataError(f"k = {k}: ask for at least one hit")
        if isinstance(text, str):
            return self.search([text], k)[0]
        return [hits for scores in self.score_batches(text) for hits in self.hits(scores, k)]

    def hits(self, scores: Tensor, k: int, *, among: Tensor | None = None) -> Iterator[list[Hit]]:
        """Turn scores into the k best hits a query, in the order that `search` promises.

        Args:
            scores: float32 (B, C), as the head gives them.
            k: hits a query, at least 1; above the number of documents it means all.
            among: int64 (c,), ascending: the rows that may be found; all if None. Probabilities are over the whole
                catalogue either way.
        """
        probabilities = scores.softmax(dim=1)
        for query, rows in enumerate(best_rows(scores, k, among=among)):
            values, shares = scores[query, rows].tolist(), probabilities[query, rows].tolist()
            hits = []
            for rank, (row, score, probability) in enumerate(zip(rows.tolist(), values, shares, strict=True), start=1):
                document = self.catalogue.document(row)
                hits.append(
                    Hit(
                        rank=rank,
                        doc_id=document.doc_id,
                        score=score,
                        probability=probability,
                        title=document.title,
                        text=document.text,
                    )
                )
            yield hits


def best_rows(scores: Tensor, k: int, *, among: Tensor | None = None) -> Iterator[Tensor]:
    """Give the rows of the k highest scores a query, best first, of equals the first.

    Args:
        scores: float (B, C).
        k: at least 1; above the number of rows it means all.
        among: int64 (c,), ascending: the rows that may be given; all if None.

    Returns:
        B times int64 (min(k, C),), or (min(k, c),).
    """
    if among is not None:
        if not len(among):
            yield from (among for _ in scores)
            return
        yield from (among[rows] for rows in best_rows(scores[:, among], k))
        return
    # topk alone promises no order among equals; sorting all rows would, but is slow for a large catalogue.
    bars = scores.topk(min(k, scores.shape[1]), dim=1).values[:, -1]
    for query, bar in zip(scores, bars, strict=True):
        rows = (query >= bar).nonzero().squeeze(1)
        order = query[rows].sort(descending=True, stable=True).indices
        yield rows[order[:k]]
