"""What documents say, cut into short texts to train on as if they were queries."""

import re
from collections.abc import Iterator

from caravan.data.catalogue import Catalogue
from caravan.data.records import Document, Example

_BREAK = re.compile(r"(?<=[.!?])\s+|\n+")  # after a sentence, or at the end of a line
_WORDS = 32  # the most in a passage: about two sentences; a table or a list without full stops is cut here
_CHARACTERS = 12  # the fewest in a passage: "Yes." tells nothing about its document


def document_passages(catalogue: Catalogue, most: int) -> list[Example]:
    """Cut each document into its title and its sentences, each an example whose gold document is the one it is from.

    Documents are known to everybody, so these cost no privacy; they say what a document is about where nobody has asked
    for it yet. In training for dense retrieval a document's own sentences are known as pseudo-queries (the inverse
    cloze task; Lee et al. 2019, arXiv:1906.00300, section 4).

    Args:
        catalogue: C documents.
        most: of one document, at least 0; where it has more, these are spread evenly over it, the first among them.

    Returns:
        At most C * most examples in the order of the catalogue. A text that stands in several documents is left out:
        it does not tell them apart.
    """
    if not most:
        return []
    owners: dict[str, set[str]] = {}
    pieces = [(document.doc_id, list(dict.fromkeys(_cut(document)))) for document in catalogue]
    for doc_id, texts in pieces:
        for text in texts:
            owners.setdefault(text, set()).add(doc_id)
    examples: list[Example] = []
    for doc_id, texts in pieces:
        own = [text for text in texts if len(owners[text]) == 1]
        kept = own if len(own) <= most else [own[place * len(own) // most] for place in range(most)]
        examples.extend(Example(text, (doc_id,), query_id=f"{doc_id}#{place}") for place, text in enumerate(kept))
    return examples


def sentences(text: str) -> list[str]:
    """Cut a text after its sentences and at the ends of its lines; nothing is empty, whitespace is single spaces."""
    return [" ".join(part.split()) for part in _BREAK.split(text) if part.strip()]


def _cut(document: Document) -> Iterator[str]:
    if document.title.strip():
        yield document.title.strip()
    for sentence in sentences(document.text):
        words = sentence.split()
        for start in range(0, len(words), _WORDS):
            text = " ".join(words[start : start + _WORDS])
            if len(text) >= _CHARACTERS:
                yield text
