"""What the integrations share: a retriever by its folder or as it is, and what a hit says besides its text."""

from pathlib import Path
from typing import Any

from caravan.data.records import Document, Hit
from caravan.errors import IntegrationError
from caravan.model.retriever import Retriever
from caravan.storage import load


def missing(error: ModuleNotFoundError, *, extra: str) -> IntegrationError:
    """Say which extra installs what an integration is for.

    Args:
        error: what the import of the framework raised.
        extra: the extra's name in pyproject.toml.
    """
    package = (error.name or extra).partition(".")[0]
    return IntegrationError(f"this needs {package}; install it: pip install 'caravan[{extra}]'", name=package)


def opened(source: str | Path | Retriever, *, device: str = "cpu") -> Retriever:
    """Give the retriever itself, or the one in a folder that `caravan train` or `caravan.save` wrote.

    Args:
        source: a folder, or a retriever in memory.
        device: where a folder's backbone is loaded; a retriever in memory stays where it is.

    Raises:
        StorageError: the folder is missing or damaged.
        BackboneError: its frozen model cannot be found.
    """
    retriever = source if isinstance(source, Retriever) else load(source, device=device)
    # Frameworks ask from several threads. Its first use sets a tokenizer to its limit, which two must not do at once.
    retriever.encoder.tokenize(["a"])
    return retriever


def document_of(retriever: Retriever, hit: Hit) -> tuple[Document, dict[str, Any]]:
    """Give the document of a hit, and all that is known of it as metadata.

    Returns:
        The document, and its own metadata with `doc_id`, `title`, `rank` (from 1), `score` (the head's, comparable
        within one query only) and `probability` (over the whole catalogue, in [0, 1]), which win over entries of the
        document's own that have these names.
    """
    document = retriever.catalogue.document(retriever.catalogue.row(hit.doc_id))
    ours = {"doc_id": hit.doc_id, "title": hit.title, "rank": hit.rank}
    return document, {**document.metadata, **ours, "score": hit.score, "probability": hit.probability}
