"""Documents added to, edited in and removed from a retriever; its encoder is shared, its head gets other rows."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from caravan.data.catalogue import Catalogue
from caravan.data.records import Document
from caravan.errors import DataError
from caravan.model.head import FlatHead
from caravan.model.retriever import Retriever


def with_documents(retriever: Retriever, documents: Sequence[Document], vectors: Tensor) -> Retriever:
    """Give a retriever that knows more documents, or other texts of those it knows.

    A new document's row is what `FlatHead.new_rows` makes of its vector. A document that is known keeps its row, which
    is what queries taught.

    Args:
        retriever: stays as it is; the new one shares its encoder.
        documents: N, of which ids that are known take the place of what they name.
        vectors: float32 (N, H), `encoder.encode` of their `content`; those of known documents are not looked at.

    Raises:
        DataError: an id is empty or occurs twice, or there is not one vector a document.
        TypeError: the head has no rows of its own (`OutputAdapterHead`).
    """
    if vectors.shape != (len(documents), retriever.encoder.width):
        raise DataError(f"vectors of shape {tuple(vectors.shape)} for {len(documents)} documents; give one a document")
    catalogue, head = retriever.catalogue, _flat(retriever)
    known = set(catalogue.ids)
    edited = {document.doc_id: document for document in documents if document.doc_id in known}
    fresh = [number for number, document in enumerate(documents) if document.doc_id not in known]
    kept = [edited.get(document.doc_id, document) for document in catalogue]
    grown = Catalogue([*kept, *(documents[number] for number in fresh)])
    with torch.no_grad():
        rows, biases = head.new_rows(vectors[fresh].to(head.rows), normalize=retriever.encoder.normalize)
        return _rebuilt(retriever, grown, torch.cat([head.rows, rows]), torch.cat([head.bias, biases]))


def without_documents(retriever: Retriever, doc_ids: Collection[str]) -> Retriever:
    """Give a retriever that knows some documents less.

    Args:
        retriever: stays as it is; the new one shares its encoder.
        doc_ids: of the documents to leave out.

    Raises:
        DataError: an id is not known, or no document would be left.
        TypeError: the head has no rows of its own (`OutputAdapterHead`).
    """
    catalogue, head = retriever.catalogue, _flat(retriever)
    gone = {catalogue.row(doc_id) for doc_id in doc_ids}
    left = [row for row in range(len(catalogue)) if row not in gone]
    if not left:
        raise DataError("a retriever needs at least one document, and all would be removed; add another one first")
    remaining = Catalogue([catalogue.document(row) for row in left])
    with torch.no_grad():
        return _rebuilt(retriever, remaining, head.rows[left], head.bias[left])


def _flat(retriever: Retriever) -> FlatHead:
    if not isinstance(retriever.head, FlatHead):
        raise TypeError(f"a {type(retriever.head).__name__} is for comparison; its documents cannot be changed")
    return retriever.head


def _rebuilt(retriever: Retriever, catalogue: Catalogue, rows: Tensor, bias: Tensor) -> Retriever:
    old = _flat(retriever)
    head = FlatHead(rows, retriever.head_config)
    state: Mapping[str, Tensor] = {**old.state_dict(), "rows": head.rows.detach(), "bias": bias}
    head.load_state_dict(state)
    changed = Retriever(
        retriever.encoder,
        head,
        catalogue,
        adapter_config=retriever.adapter_config,
        head_config=retriever.head_config,
    )
    changed.record = dict(retriever.record)
    return changed
