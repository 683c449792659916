"""Who ranks better: retrievers and untrained or cheaper rivals on the same queries of the same data."""

import itertools
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from caravan.config import AdapterConfig, Config
from caravan.data.dataset import Dataset
from caravan.data.passages import document_passages
from caravan.data.records import Example
from caravan.errors import DataError
from caravan.files import make_folder
from caravan.model.adapter import IdentityAdapter
from caravan.model.backbone import Backbone, random_twin
from caravan.model.encoder import Encoder
from caravan.model.head import OutputAdapterHead
from caravan.model.retriever import Retriever
from caravan.training.baselines import bm25, centroids, mips, nearest_neighbour
from caravan.training.evaluation import Estimate, Ranking, latency, measure, rank
from caravan.training.features import FeatureStore
from caravan.training.inputs import encode_with_progress
from caravan.training.progress import Report, prefixed
from caravan.training.trainer import fit
from caravan.training.trec import write_qrels, write_run

_LATENCY_QUERIES = 30  # single queries timed: enough for a median, a second or two of work


@dataclass(frozen=True)
class Row:
    """One line of a comparison.

    Attributes:
        name: who ranked.
        metrics: measure to estimate, see `evaluation.measure`.
        seconds: wall-clock time to build or train it, beyond the encoding that all rows share.
        ranking: what was ranked.
    """

    name: str
    metrics: Mapping[str, Estimate]
    seconds: float
    ranking: Ranking = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Measures with their intervals and the seconds, as plain values."""
        measures = {name: asdict(estimate) for name, estimate in self.metrics.items()}
        return {"metrics": measures, "seconds": round(self.seconds, 3)}


_NO_ADAPTER = AdapterConfig(kind="none")


class Comparison:
    """Rows on one split of one data set.

    Attributes:
        dataset: where training queries and documents come from.
        split: "test", or "validation" where there is no test split.
        rows: the lines so far.
    """

    def __init__(self, dataset: Dataset, config: Config, *, store: FeatureStore, report: Report | None = None) -> None:
        self.dataset, self.config, self.store, self.report = dataset, config, store, report
        self.split, self.examples = evaluation_split(dataset)
        self.gold = [dataset.catalogue.gold_rows(example) for example in self.examples]
        self.texts = [example.text for example in self.examples]
        self.rows: list[Row] = []

    def add_ranking(self, name: str, make: Callable[[], Ranking], *, seconds: float = 0.0) -> Row:
        """Rank, measure and append one row; the time that `make` takes is added to `seconds`.

        A name that is taken gets a number, so that no row hides another where rows are found by name.
        """
        taken = {row.name for row in self.rows}
        numbered = (f"{name} ({number})" for number in itertools.count(2))
        name = next(free for free in itertools.chain([name], numbered) if free not in taken)
        started = time.perf_counter()
        ranking = make()
        seconds += time.perf_counter() - started
        metrics = measure(ranking, self.gold, bootstrap=self.config.evaluation.bootstrap, seed=self.config.seed)
        self.rows.append(Row(name, metrics, seconds, ranking))
        return self.rows[-1]

    def add_retriever(self, name: str, retriever: Retriever, *, seconds: float = 0.0) -> Row:
        """Append a retriever's row; `seconds` is what its training took."""
        self.check_catalogue(name, retriever)
        ranking = rank_queries(retriever, self.texts, self.store, self.report, task=f"evaluating {name}")
        return self.add_ranking(name, lambda: ranking, seconds=seconds)

    def check_catalogue(self, name: str, retriever: Retriever) -> None:
        """Refuse a retriever whose rows stand for other documents.

        Raises:
            DataError: it was trained on other documents.
        """
        if retriever.catalogue.fingerprint != self.dataset.catalogue.fingerprint:
            raise DataError(
                f"{name} was trained on other documents than those of {self.dataset.name}; "
                f"compare it on the data set it was trained for"
            )

    def add_baselines(self, backbone: Backbone) -> None:
        """Append BM25, MIPS, class centroids, 1-NN, the output-side adapter and the never-pretrained backbone.

        Where training is private only the first two: what the others find, they find in training queries, and it would
        be saved beside the retriever without any noise.
        """
        documents = [document.content for document in self.dataset.catalogue]
        self.add_ranking("BM25", lambda: bm25(self.texts, documents))
        encoder = Encoder(backbone, IdentityAdapter(backbone.embedding_width))
        rows = self._vectors(encoder, documents, "documents")
        queries = self._vectors(encoder, self.texts, f"{self.split} queries")
        self.add_ranking("MIPS", lambda: mips(queries, rows))
        if self.config.privacy.mode != "none":
            return
        train = self._vectors(encoder, [example.text for example in self.dataset.train], "training queries")
        gold = [self.dataset.catalogue.gold_rows(example) for example in self.dataset.train]
        count = len(documents)
        self.add_ranking("centroids", lambda: centroids(queries, train, gold, rows))
        self.add_ranking("1-NN", lambda: nearest_neighbour(queries, train, gold, document_count=count))
        self._add_output_adapter(backbone, rows)
        if self.config.evaluation.random_backbone:
            self._add_random_backbone(backbone, documents)

    def _add_output_adapter(self, backbone: Backbone, rows: Tensor) -> None:
        """A square matrix after the encoder, documents fixed: an adapter that needs no backward pass through it."""
        started = time.perf_counter()
        head = replace(self.config.head, hold_unseen=False, hidden=0)
        encoder = Encoder(backbone, IdentityAdapter(backbone.embedding_width))
        retriever = Retriever(
            encoder, OutputAdapterHead(rows, head), self.dataset.catalogue, adapter_config=_NO_ADAPTER, head_config=head
        )
        self._fit_head(retriever, "output adapter")
        self.add_retriever("output adapter", retriever, seconds=time.perf_counter() - started)

    def _add_random_backbone(self, backbone: Backbone, documents: Sequence[str]) -> None:
        started = time.perf_counter()
        twin = random_twin(backbone, seed=self.config.seed)
        encoder = Encoder(twin, IdentityAdapter(twin.embedding_width))
        rows = self._vectors(encoder, documents, "documents, random backbone")
        retriever = Retriever.start(twin, self.dataset.catalogue, rows, adapter=_NO_ADAPTER, head=self.config.head)
        self._fit_head(retriever, "random backbone")
        self.add_retriever("random backbone", retriever, seconds=time.perf_counter() - started)

    @cached_property
    def _passages(self) -> list[Example]:
        """What the rivals that are trained learn from beside the training queries, as ours do."""
        return document_passages(self.dataset.catalogue, self.config.training.passages)

    def _fit_head(self, retriever: Retriever, name: str) -> None:
        fit(
            retriever,
            self.dataset.train,
            "head",
            self.config.training,
            seed=self.config.seed,
            passages=self._passages,
            validation=self.dataset.validation if self.config.training.patience else (),
            store=self.store,
            report=prefixed(self.report, f"{name}: "),
        )

    def _vectors(self, encoder: Encoder, texts: Sequence[str], what: str) -> Tensor:
        return encode_with_progress(encoder, texts, self.store, self.report, task=f"encoding {what}")

    def to_dict(self) -> dict[str, Any]:
        """All rows as plain values."""
        return {row.name: row.to_dict() for row in self.rows}

    def summary(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        """Data set, split, further plain values and all rows: what `--json` prints and `results.json` holds."""
        return {"dataset": self.dataset.name, "split": self.split, **extra, "rows": self.to_dict()}

    def write_trec(self, folder: str | Path) -> None:
        """Write `qrels.txt` and one `NAME.run` a row, in TREC's formats.

        Raises:
            StorageError: the folder cannot be written.
        """
        folder = make_folder(folder)
        query_ids = [example.query_id for example in self.examples]
        write_qrels(folder / "qrels.txt", self.gold, query_ids, self.dataset.catalogue.ids)
        for row in self.rows:
            name = re.sub(r"[\s+/]+", "-", row.name).strip("-")
            write_run(folder / f"{name}.run", row.ranking, query_ids, self.dataset.catalogue.ids, tag=name)


def evaluate(
    retriever: Retriever,
    data: Dataset | Sequence[Example],
    *,
    bootstrap: int = 1000,
    seed: int = 13,
    store: FeatureStore | None = None,
    report: Report | None = None,
) -> dict[str, Estimate]:
    """Measure a retriever: recall@1/5/10, MRR@10, nDCG@10 and calibration error, with 95% bootstrap intervals.

    Args:
        retriever: trained or not.
        data: a data set, of which the test split (else the validation split) is used, or examples.
        bootstrap: resamples behind each interval; 0: none.
        seed: of the resampling.
        store: where vectors are kept; nowhere if None.
        report: called as the encoding goes on.

    Raises:
        DataError: there is no example, or a gold document is not in the catalogue.
    """
    examples = evaluation_split(data)[1] if isinstance(data, Dataset) else data
    if not examples:
        raise DataError("nothing to evaluate on; give at least one query with its document")
    gold = [retriever.catalogue.gold_rows(example) for example in examples]
    ranking = rank_queries(retriever, [example.text for example in examples], store or FeatureStore(), report)
    return measure(ranking, gold, bootstrap=bootstrap, seed=seed)


def evaluation_split(dataset: Dataset) -> tuple[str, Sequence[Example]]:
    """The test split, or the validation split where there is no test.

    Raises:
        DataError: there is neither.
    """
    if len(dataset.test):
        return "test", dataset.test
    if len(dataset.validation):
        return "validation", dataset.validation
    raise DataError(
        f"{dataset.name}: neither test nor validation queries; give data.test or raise data.validation_fraction"
    )


@torch.no_grad()
def rank_queries(
    retriever: Retriever,
    texts: Sequence[str],
    store: FeatureStore,
    report: Report | None = None,
    *,
    task: str = "evaluating",
) -> Ranking:
    """Rank all documents for many queries; vectors of an untouched encoder come from the store."""
    # An adapted encoder's vectors are of no use to anybody later: do not fill the disk with them.
    kept = store if retriever.encoder.is_identity() else FeatureStore()
    vectors = encode_with_progress(retriever.encoder, texts, kept, report, task=task)
    return rank((retriever.head(part) for part in vectors.split(256)), logits=True)


def measure_latency(retriever: Retriever, texts: Sequence[str]) -> dict[str, float]:
    """Median milliseconds for one query at a time: `encode_ms` (text to vector), `search_ms` (text to ten hits)."""
    sample = list(texts[:_LATENCY_QUERIES])
    encode = latency(lambda text: retriever.encoder.encode([text]), sample)
    search = latency(lambda text: retriever.search(text, k=10), sample)
    return {
        "encode_ms": round(encode.median_ms, 2),
        "search_ms": round(search.median_ms, 2),
        "search_p95_ms": round(search.percentile95_ms, 2),
    }
