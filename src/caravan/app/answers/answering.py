"""Answers to questions: documents found, a generator that writes from them, citations, or "I don't know"."""

from collections.abc import Generator
from dataclasses import dataclass

from caravan.app.answers.evidence import Source, Weigher
from caravan.app.answers.generators import Extractive, Piece
from caravan.app.answers.generators import Generator as Writer
from caravan.app.answers.prompt import UNKNOWN, citations_of
from caravan.model.retriever import Retriever
from caravan.training.calibration import Calibration


@dataclass(frozen=True)
class Citation:
    """A document that an answer names as [number]."""

    number: int
    doc_id: str
    title: str
    probability: float


@dataclass(frozen=True)
class Answer:
    """What came of a question.

    Attributes:
        text: the answer, with citations such as [1], or "I don't know."
        citations: the documents named in the text, by number; none where nothing is known or the generator named none.
        confidence: probability that one of the documents found answers, in [0, 1].
        known: whether there is an answer.
        found: the documents that were given to the generator, or were too doubtful to answer from.
    """

    text: str
    citations: tuple[Citation, ...]
    confidence: float
    known: bool
    found: tuple[Citation, ...]


class Answering:
    """Answers questions from a retriever's documents; safe to use from several threads.

    Attributes:
        generator: who writes.
        weigher: who finds and weighs documents; its `calibration` says when to be silent.
    """

    def __init__(
        self, retriever: Retriever, generator: Writer | None = None, *, calibration: Calibration | None = None
    ) -> None:
        """Put the parts together.

        Args:
            retriever: finds the documents.
            generator: writes; the extractive one if None.
            calibration: see `evidence.calibrated`; the cautious default if None.
        """
        self.weigher = Weigher(retriever, calibration)
        self.generator = generator or Extractive()

    def answer(self, question: str) -> Answer:
        """Answer a question.

        Raises:
            DataError: the question is empty or no text.
            AnswerError: the generator fails.
        """
        *_, last = self.stream(question)
        assert isinstance(last, Answer)
        return last

    def stream(self, question: str) -> Generator[Piece | Answer, None, None]:
        """Give the answer's pieces as they are written and, last, the answer itself, which alone is final.

        Raises:
            DataError: the question is empty or no text.
            AnswerError: the generator fails.
        """
        evidence = self.weigher.weigh(question)
        found = tuple(_citation(number, source) for number, source in enumerate(evidence.sources, start=1))
        if evidence.confidence < self.weigher.calibration.threshold:
            yield Answer(UNKNOWN, (), evidence.confidence, False, found)
            return
        written = ""
        for piece in self.generator.write(question, evidence.sources):
            written = piece.text if piece.afresh else written + piece.text
            yield piece
        text, numbers = citations_of(written, len(found))
        plain = text.casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
        known = bool(text) and not plain.startswith("i don't know")
        citations = tuple(found[number - 1] for number in numbers) if known else ()
        yield Answer(text or UNKNOWN, citations, evidence.confidence, known, found)


def _citation(number: int, source: Source) -> Citation:
    return Citation(number, source.document.doc_id, source.document.title, round(source.probability, 6))
