"""What speaks for which document: the head's score and the sentence most like the question, as probabilities."""

import hashlib
import json
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.nn import functional

from caravan.app.experiment import recorded_settings
from caravan.data.dataset import Dataset
from caravan.data.passages import sentences
from caravan.data.records import Document, Example
from caravan.errors import CaravanError, DataError, StorageError
from caravan.files import whole_file
from caravan.model.retriever import Retriever
from caravan.training.calibration import CANDIDATES, Calibration, calibrate, cited, probabilities

STORED = "answering.json"
_MOST_QUERIES = 500  # validation queries that are weighed: enough for three numbers, and a minute at most
_MOST_SENTENCES = 32  # of one document that are compared with a question: a long text must not cost seconds
_KEPT_DOCUMENTS = 2000  # whose sentences stay encoded: some 25 MiB at eight sentences of 384 floats
_CALIBRATION = TypeAdapter(Calibration)


@dataclass(frozen=True)
class Source:
    """A document that may answer, and how its sentences fit the question.

    Attributes:
        document: the document.
        probability: that it is one that answers, in [0, 1], calibrated where there is a calibration.
        sentences: of its text, in order.
        cosines: of each with the question, in [-1, 1].
    """

    document: Document
    probability: float
    sentences: tuple[str, ...]
    cosines: tuple[float, ...]


@dataclass(frozen=True)
class Evidence:
    """What was found for a question.

    Attributes:
        sources: those to be cited, most probable first.
        confidence: the probability that one of them answers.
    """

    sources: tuple[Source, ...]
    confidence: float


class Weigher:
    """Weighs documents for questions; safe to use from several threads.

    Attributes:
        retriever: finds the candidates.
        calibration: turns scores and similarities into probabilities.
    """

    def __init__(self, retriever: Retriever, calibration: Calibration | None = None) -> None:
        self.retriever = retriever
        self.calibration = calibration or Calibration()
        self._kept: OrderedDict[tuple[str, str], Tensor | None] = OrderedDict()
        self._lock = Lock()

    def weigh(self, question: str) -> Evidence:
        """Find the documents to cite.

        Raises:
            DataError: the question is empty or no text.
        """
        vector = self.retriever.encoder.encode([question])
        hits = self._candidates(vector)[0]
        documents = [self.retriever.catalogue.document(row) for row, _ in hits]
        cosines = [self._cosines(vector[0], document) for document in documents]
        scores = torch.tensor([[score for _, score in hits]])
        best = torch.stack([part.max() for part in cosines]).unsqueeze(0)
        ordered, order = probabilities(self.calibration, scores, best).sort(dim=1, descending=True, stable=True)
        counts, confidence = cited(ordered, self.calibration.reach)
        sources = [
            self._source(documents[place], probability, cosines[place])
            for place, probability in zip(order[0].tolist(), ordered[0].tolist(), strict=True)
        ]
        return Evidence(tuple(sources[: int(counts[0])]), min(1.0, float(confidence[0])))

    def calibrate(
        self, examples: Sequence[Example], *, seed: int = 0, going: Callable[[], None] = lambda: None
    ) -> Calibration:
        """Choose the calibration on validation queries, at most 500 of them, and use it from now on.

        Args:
            examples: validation queries.
            seed: which of them, where there are more.
            going: called again and again; what it raises ends the work.

        Raises:
            DataError: too few of the queries are answered by documents of the catalogue.
        """
        known = set(self.retriever.catalogue.ids)
        usable = [example for example in examples if known.intersection(example.doc_ids)]
        if not usable:
            raise DataError("no validation query has its document in this catalogue; give others to calibrate on")
        chosen = usable if len(usable) <= _MOST_QUERIES else random.Random(seed).sample(usable, _MOST_QUERIES)
        vectors = self.retriever.encoder.encode([example.text for example in chosen], progress=lambda _: going())
        candidates = self._candidates(vectors)
        scores = torch.tensor([[score for _, score in hits] for hits in candidates])
        self._encode_all({row for hits in candidates for row, _ in hits}, going)
        rows = [[row for row, _ in hits] for hits in candidates]
        documents = [[self.retriever.catalogue.document(row) for row in part] for part in rows]
        cosines = torch.tensor(
            [
                [float(self._cosines(vector, document).max()) for document in part]
                for vector, part in zip(vectors, documents, strict=True)
            ]
        )
        gold = torch.tensor(
            [
                [document.doc_id in example.doc_ids for document in part]
                for example, part in zip(chosen, documents, strict=True)
            ]
        )
        self.calibration = calibrate(scores, cosines, gold)
        return self.calibration

    @torch.no_grad()
    def _candidates(self, vectors: Tensor) -> list[list[tuple[int, float]]]:
        found = []
        for part in vectors.split(256):
            scores, rows = self.retriever.head(part).topk(min(CANDIDATES, len(self.retriever.catalogue)), dim=1)
            pairs = zip(rows.tolist(), scores.tolist(), strict=True)
            found += [list(zip(own_rows, own_scores, strict=True)) for own_rows, own_scores in pairs]
        return found

    def _source(self, document: Document, probability: float, cosines: Tensor) -> Source:
        own = _sentences(document.text)
        return Source(document, probability, tuple(own), tuple(cosines[: len(own)].tolist()))

    def _cosines(self, vector: Tensor, document: Document) -> Tensor:
        """Cosines of a question's vector with a document's sentences and, last, its title."""
        parts = self._vectors([document])[0]
        return functional.cosine_similarity(parts, vector.unsqueeze(0), dim=1).cpu()

    def _encode_all(self, rows: set[int], going: Callable[[], None]) -> None:
        documents = [self.retriever.catalogue.document(row) for row in sorted(rows)]
        for start in range(0, len(documents), 32):  # sentences of several documents fill a batch better than of one
            self._vectors(documents[start : start + 32])
            going()

    def _vectors(self, documents: Sequence[Document]) -> list[Tensor]:
        """Vectors of the documents' sentences and titles, encoded once as long as they are asked about."""
        with self._lock:
            found = {key: self._kept.get(key) for key in map(_key, documents)}
        new = [key for key, vectors in found.items() if vectors is None]
        if new:
            texts = [_compared(*key) for key in new]
            encoded = self.retriever.encoder.encode([text for part in texts for text in part])
            found |= zip(new, encoded.split([len(part) for part in texts]), strict=True)
        with self._lock:
            self._kept |= found
            for key in found:
                self._kept.move_to_end(key)
            while len(self._kept) > _KEPT_DOCUMENTS:
                self._kept.popitem(last=False)
        return [vectors for key in map(_key, documents) if (vectors := found[key]) is not None]


def calibrated(folder: str | Path, retriever: Retriever, *, going: Callable[[], None] = lambda: None) -> Calibration:
    """Give the calibration of a saved retriever: as kept in its folder, else chosen now on its validation queries.

    What is chosen is kept in `answering.json`, where the folder can be written, and holds for these tensors and
    documents alone. Without validation queries that can be read (or where they are private: `privacy.mode` is set
    without `privacy.public_validation`) it is the default, whose `queries` is 0.

    Args:
        folder: where the retriever was loaded from.
        retriever: as loaded.
        going: called again and again while it is chosen; a `CaravanError` of it means the default, and nothing is kept.
    """
    fingerprint = fingerprint_of(retriever)
    with suppress(OSError, ValueError, TypeError, KeyError, ValidationError):
        kept = json.loads((Path(folder) / STORED).read_text(encoding="utf-8"))
        if kept["fingerprint"] == fingerprint:
            return _CALIBRATION.validate_python(kept["calibration"])
    try:
        config = recorded_settings(retriever, str(folder), {})
        if config.privacy.mode != "none" and not config.privacy.public_validation:
            return Calibration()
        validation = Dataset.from_config(config.data, seed=config.seed).validation
        calibration = Weigher(retriever).calibrate(validation, seed=config.seed, going=going)
    except CaravanError:  # no data, other data, or too little of it: asking must still be possible
        return Calibration()
    values = {"fingerprint": fingerprint, "calibration": asdict(calibration)}
    with suppress(StorageError), whole_file(Path(folder) / STORED) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return calibration


def fingerprint_of(retriever: Retriever) -> str:
    """SHA-256, in hex, over all that decides what a retriever finds: frozen model, adapter, head and documents."""
    digest = hashlib.sha256(f"{retriever.encoder.key()} {retriever.catalogue.fingerprint}".encode())
    for name, tensor in retriever.head.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _key(document: Document) -> tuple[str, str]:
    return document.title, document.text


def _sentences(text: str) -> list[str]:
    return sentences(text)[:_MOST_SENTENCES] or [text]


def _compared(title: str, text: str) -> list[str]:
    return [*_sentences(text), title if title.strip() else text]
