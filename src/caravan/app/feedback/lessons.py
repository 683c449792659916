"""What marks teach: examples to train on, and questions held back on which old and new weights are compared."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import groupby

from caravan.app.feedback.marks import Mark
from caravan.data.catalogue import Catalogue
from caravan.data.dataset import Dataset
from caravan.data.records import Example
from caravan.data.splits import select

HELD_BACK = 5  # of so many marked queries one is never trained on: else nothing would say what the marks brought


@dataclass(frozen=True)
class Question:
    """A marked query that is kept from training.

    Attributes:
        query: what was asked.
        right: ids of documents that answer; perhaps none.
        wrong: ids of documents that do not.
    """

    query: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]

    def answered(self, first: str) -> bool:
        """Whether a ranking with this document first does right: it is one marked right or, with none, not a wrong one.

        Args:
            first: the document's id.
        """
        return first in self.right if self.right else first not in self.wrong


@dataclass(frozen=True)
class Lessons:
    """All marks that are about documents of today, sorted.

    Attributes:
        examples: queries with the documents marked right, to train on.
        questions: queries to compare on, of all kinds of marks.
        contradicted: pairs of query and document marked wrong; they leave the training data.
        gone: marks of documents that are no more.
    """

    examples: tuple[Example, ...]
    questions: tuple[Question, ...]
    contradicted: frozenset[tuple[str, str]]
    gone: int


def lessons(marks: Sequence[Mark], catalogue: Catalogue) -> Lessons:
    """Sort marks into what is trained on and what is compared on.

    A query is held back by its own hash, one in five, so that it stays so from one improvement to the next: the old
    weights have not been trained on it either.

    A document marked wrong is no example: the loss is a softmax over all documents, which pushes down every one that is
    not gold, but needs one that is. So a wrong mark takes the pair out of the training data where it is there, and
    counts when old and new are compared.

    Args:
        marks: one a pair of query and document.
        catalogue: the documents of today.
    """
    known = set(catalogue.ids)
    usable = [mark for mark in marks if mark.doc_id in known]
    examples: list[Example] = []
    questions: list[Question] = []
    ordered = sorted(usable, key=lambda mark: mark.query)
    for number, (query, group) in enumerate(groupby(ordered, key=lambda mark: mark.query), start=1):
        own = list(group)
        right = tuple(mark.doc_id for mark in own if mark.right)
        if is_held_back(query):
            questions.append(Question(query, right, tuple(mark.doc_id for mark in own if not mark.right)))
        elif right:
            examples.append(Example(query, right, query_id=f"mark-{number}"))
    contradicted = frozenset((mark.query, mark.doc_id) for mark in usable if not mark.right)
    return Lessons(tuple(examples), tuple(questions), contradicted, len(marks) - len(usable))


def is_held_back(query: str) -> bool:
    """Whether a marked query is kept from training."""
    return int.from_bytes(sha256(query.encode("utf-8", "surrogatepass")).digest()[:8]) % HELD_BACK == 0


@dataclass(frozen=True)
class Classroom:
    """What a new version is trained on.

    Attributes:
        dataset: the documents of today, training queries with marks, validation queries; no test queries, which are
            not to choose between versions.
        left_out: training queries whose documents are all gone, were marked wrong, or that are held back.
    """

    dataset: Dataset
    left_out: int


def classroom(dataset: Dataset, catalogue: Catalogue, taught: Lessons) -> Classroom:
    """Join the data that the old version was trained on with marks.

    Args:
        dataset: as the old version's settings read it.
        catalogue: the documents of today: some may have come, gone or changed since.
        taught: see `lessons`.
    """
    known, held = set(catalogue.ids), {question.query for question in taught.questions}
    asked = {example.text for example in dataset.validation}
    train: list[Example] = []
    for example in dataset.train:
        gold = tuple(
            name for name in example.doc_ids if name in known and (example.text, name) not in taught.contradicted
        )
        if gold and example.text not in held:
            train.append(example if gold == example.doc_ids else replace(example, doc_ids=gold))
    left_out = len(dataset.train) - len(train)
    marked = [example for example in taught.examples if example.text not in asked]  # a validation query stays one
    validation = [number for number, example in enumerate(dataset.validation) if known.issuperset(example.doc_ids)]
    joined = replace(
        dataset,
        catalogue=catalogue,
        train=(*train, *marked),
        validation=select(dataset.validation, validation),
        test=(),
    )
    return Classroom(joined, left_out)
