"""The catalogue: which document stands in which row, stable and saved beside the head that scores it."""

import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from caravan.data.formats import read_documents
from caravan.data.records import Document, Example
from caravan.data.tables import BadRows, shown
from caravan.errors import DataError
from caravan.files import whole_file


class Catalogue:
    """The documents that can be found, each with its row: an immutable sequence in file order.

    Attributes:
        documents: C documents; row r of a head scores `documents[r]`.
        ids: their C ids.
    """

    documents: tuple[Document, ...]
    ids: tuple[str, ...]

    def __init__(self, documents: Iterable[Document]) -> None:
        """Number the documents.

        Raises:
            DataError: there is none, or an id is empty or occurs twice.
        """
        self.documents = tuple(documents)
        self.ids = tuple(document.doc_id for document in self.documents)
        self._rows = {doc_id: row for row, doc_id in enumerate(self.ids)}
        if not self.documents:
            raise DataError("a catalogue needs at least one document, got none; give a documents file with rows")
        if "" in self._rows:
            raise DataError(f"document {self.ids.index('') + 1} of the catalogue has an empty id; give it one")
        if len(self._rows) < len(self.ids):
            repeated = next(doc_id for row, doc_id in enumerate(self.ids) if self._rows[doc_id] != row)
            raise DataError(f"duplicate document id {shown(repeated)} in the catalogue; give each document its own id")

    def __len__(self) -> int:
        return len(self.documents)

    def __iter__(self) -> Iterator[Document]:
        return iter(self.documents)

    def row(self, doc_id: str) -> int:
        """The row of a document, 0 to C - 1.

        Raises:
            DataError: no document has this id.
        """
        try:
            return self._rows[doc_id]
        except KeyError:
            what = f"no document {shown(doc_id)} among the {len(self):,} of the catalogue"
            raise DataError(f"{what}; add it, or check the id") from None

    def document(self, row: int) -> Document:
        """The document of a row, 0 to C - 1.

        Raises:
            DataError: there is no such row.
        """
        if not 0 <= row < len(self):
            raise DataError(f"no row {row} in the catalogue; rows are 0 to {len(self) - 1}")
        return self.documents[row]

    def gold_rows(self, example: Example) -> list[int]:
        """The rows of an example's gold documents, in the example's order.

        Raises:
            DataError: one of them is not in the catalogue.
        """
        return [self.row(doc_id) for doc_id in example.doc_ids]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, over ids, titles and texts in order: equal for catalogues a head can be moved between."""
        digest = sha256()
        for document in self.documents:
            digest.update(json.dumps([document.doc_id, document.title, document.text]).encode("ascii") + b"\n")
        return digest.hexdigest()

    def write(self, path: str | Path) -> None:
        """Write `documents.jsonl`, one JSON object a line; the file appears whole or not at all.

        Raises:
            StorageError: the file cannot be written.
        """
        with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
            for document in self.documents:
                file.write(json.dumps(_document_as_json(document)) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> "Catalogue":
        """Read what `write` wrote (or any documents file).

        Raises:
            DataError: the file is unusable or has a malformed row.
        """
        return cls(read_documents(Path(path), BadRows()))


def _document_as_json(document: Document) -> dict[str, object]:
    return {
        "doc_id": document.doc_id,
        "title": document.title,
        "text": document.text,
        "metadata": dict(document.metadata),
    }
