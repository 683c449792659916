"""Plain records: a document, an example (a query with its gold documents), a hit."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Document:
    """A text that can answer a query.

    Attributes:
        doc_id: the document's name, a non-empty string, unique in its catalogue.
        text: what it says.
        title: its heading, or "".
        metadata: further named strings (a URL, a topic, ...).
    """

    doc_id: str
    text: str
    title: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def content(self) -> str:
        """Title and text as one string, the title only where the text does not begin with it."""
        if not self.title or self.text.startswith(self.title):
            return self.text
        return f"{self.title}. {self.text}"


@dataclass(frozen=True, slots=True)
class Example:
    """A query and the documents that answer it.

    Attributes:
        text: the query.
        doc_ids: one or more gold document ids, without repeats.
        query_id: its name, unique in its split.
        columns: the source's other columns by name (for example `site`), used to split by client.
    """

    text: str
    doc_ids: tuple[str, ...]
    query_id: str = ""
    columns: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Hit:
    """One search result.

    Attributes:
        rank: 1 for the best.
        doc_id: the document's id.
        score: the head's score (a logit), comparable within one query only.
        probability: softmax of the scores over the whole catalogue, in [0, 1].
        title: the document's title.
        text: the document's text.
    """

    rank: int
    doc_id: str
    score: float
    probability: float
    title: str
    text: str
