"""How good a ranking is: recall@k, MRR, nDCG with bootstrap intervals, calibration error, and latency."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from time import perf_counter_ns

import numpy as np
import torch
from torch import Tensor

from caravan.errors import DataError, TrainingError

_CUTOFF = 10  # the deepest rank that any of the measures looks at
_RESAMPLED_AT_ONCE = 2**21  # query draws held at a time: 16 MiB of counts, whatever the number of queries


@dataclass(frozen=True, eq=False)
class Ranking:
    """The best documents of each query; Q queries, K = min(number of documents, depth) places.

    Attributes:
        rows: int64 (Q, K), catalogue rows, best first, each at most once in a query.
        scores: float32 (Q, K), never rising along a query.
        probability: float32 (Q,), softmax probability of the first document over the whole catalogue; None where
            the scores are no logits.
    """

    rows: np.ndarray
    scores: np.ndarray
    probability: np.ndarray | None = None


@dataclass(frozen=True)
class Estimate:
    """A measured value and its 95% interval; `low` and `high` are None where no interval was asked for or is honest."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call: the median and the 95th percentile (linear interpolation) of `calls` calls."""

    median_ms: float
    percentile95_ms: float
    calls: int


def rank(score_batches: Iterable[Tensor], *, depth: int = 100, logits: bool = False) -> Ranking:
    """Keep the best documents of each query; equal scores are ordered by smaller row.

    Only one batch of scores is held at a time, never all (Q, C).

    Args:
        score_batches: tensors (b, C), any float dtype and device, larger is better; C is the same in all of them.
        depth: places kept; the measures here need 10.
        logits: the softmax of a row of scores is a probability over documents; it fills `Ranking.probability`.

    Returns:
        The ranking of all batches' queries in order, on the CPU.

    Raises:
        DataError: there is nothing to rank, or a batch has another number of documents than the first.
        TrainingError: a score is not finite.
    """
    rows: list[Tensor] = []
    scores: list[Tensor] = []
    probabilities: list[Tensor] = []
    queries, documents = 0, None
    for batch in score_batches:
        if documents is None:
            documents = batch.shape[1]
        if batch.shape[1] != documents:
            raise DataError(
                f"query {queries} is scored against {batch.shape[1]} documents, earlier ones against {documents}; "
                "score all queries against one catalogue"
            )
        if not documents:
            break
        batch = batch.detach().float()
        _refuse_non_finite(batch, queries)
        best_rows, best_scores = _best(batch, min(depth, documents))
        rows.append(best_rows.cpu())
        scores.append(best_scores.cpu())
        if logits:
            probabilities.append(torch.exp(best_scores[:, 0] - torch.logsumexp(batch, dim=1)).cpu())
        queries += len(batch)
        del batch  # else it would live on while the next one is made
    if not queries:
        raise DataError("nothing to rank: no query or no document; give at least one of each")
    return Ranking(
        rows=torch.cat(rows).numpy(),
        scores=torch.cat(scores).numpy(),
        probability=torch.cat(probabilities).numpy() if logits else None,
    )


def _best(scores: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """Rows and scores (b, places) of the best documents of scores (b, C); ties by smaller row."""
    # topk is many times faster than a full sort, but which of several equal scores it keeps is not defined: so
    # it looks one place further, and only queries with a tie across the last place are sorted in full.
    looked = min(places + 1, scores.shape[1])
    found, rows = torch.topk(scores, looked, dim=1)
    rows, order = rows[:, :places].sort(dim=1)
    kept, order_of_kept = found[:, :places].gather(1, order).sort(dim=1, descending=True, stable=True)
    rows = rows.gather(1, order_of_kept)
    if looked > places and places:
        tied = (found[:, places - 1] == found[:, places]).nonzero().squeeze(1)
        if len(tied):
            rows[tied] = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, :places]
    return rows, kept


def _refuse_non_finite(scores: Tensor, first_query: int) -> None:
    finite = torch.isfinite(scores)
    if finite.all():
        return
    query, row = (~finite).nonzero()[0].tolist()
    raise TrainingError(
        f"the score of query {first_query + query} for catalogue row {row} is {scores[query, row].item()}; "
        "the weights or vectors behind it are no longer finite: train again with a smaller learning rate"
    )


def measure(
    ranking: Ranking, gold: Sequence[Sequence[int]], *, bootstrap: int = 1000, seed: int = 13
) -> dict[str, Estimate]:
    """Average the measures over queries, each with a 95% interval.

    The interval is the percentile bootstrap over queries (Efron and Tibshirani, An Introduction to the Bootstrap,
    1993, chapter 13); all measures see the same resamples. The calibration error has no interval: its plug-in
    estimate is biased upwards and resampling adds the bias a second time (arXiv:1909.10155, section 4).

    Args:
        ranking: of Q queries, at least min(C, 10) places deep.
        gold: for each query its one or more gold catalogue rows, without repeats.
        bootstrap: resamples; 0 for no intervals.
        seed: of the resamples; the same seed gives the same intervals.

    Returns:
        The estimates "recall@1", "recall@5", "recall@10", "mrr@10", "ndcg@10" (see `measure_each`), and
        "calibration_error" (see `calibration_error`) where the ranking has probabilities.

    Raises:
        DataError: the gold rows do not fit the ranking.
    """
    each = measure_each(ranking, gold)
    values = np.stack(list(each.values()), axis=1)
    means = values.mean(axis=0)
    if bootstrap < 1:
        estimates = {name: Estimate(mean) for name, mean in zip(each, means.tolist(), strict=True)}
    else:
        resampled = np.concatenate([counts @ values for counts in _resamples(len(values), bootstrap, seed)])
        low, high = np.percentile(resampled / len(values), (2.5, 97.5), axis=0)
        # Summed in another order, a mean of equal values can miss itself by a rounding error.
        bounds = zip(means, np.minimum(low, means), np.maximum(high, means), strict=True)
        estimates = {name: Estimate(*map(float, bound)) for name, bound in zip(each, bounds, strict=True)}
    if ranking.probability is not None:
        correct = _found(ranking, gold)[:, 0]
        estimates["calibration_error"] = Estimate(calibration_error(ranking.probability, correct))
    return estimates


def measure_each(ranking: Ranking, gold: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Measure every query on its own.

    - recall@k: the share of the query's gold documents among the first k; with one gold document, recall@1 is the
      top-1 accuracy (Manning, Raghavan and Schütze, Introduction to Information Retrieval, 2008, section 8.4).
    - mrr@10: 1 / rank of the first gold document, 0 beyond rank 10 (Voorhees, The TREC-8 Question Answering Track
      Report, 1999).
    - ndcg@10: the sum of 1 / log2(rank + 1) over the gold documents among the first 10, divided by the most that
      min(10, number of gold) documents can reach (Järvelin and Kekäläinen, Cumulated Gain-Based Evaluation of IR
      Techniques, 2002, with the discount of trec_eval's `ndcg_cut`).

    Args:
        ranking: of Q queries, at least min(C, 10) places deep.
        gold: for each query its one or more gold catalogue rows, without repeats.

    Returns:
        float64 (Q,) in [0, 1] by name.

    Raises:
        DataError: the gold rows do not fit the ranking.
    """
    found = _found(ranking, gold)
    sizes = np.array([len(rows) for rows in gold])
    discount = 1.0 / np.log2(np.arange(2, _CUTOFF + 2))
    first = np.where(found.any(axis=1), 1.0 / (found.argmax(axis=1) + 1), 0.0)
    ideal = np.cumsum(discount)[np.minimum(sizes, _CUTOFF) - 1]
    each = {f"recall@{k}": found[:, :k].sum(axis=1) / sizes for k in (1, 5, 10)}
    each["mrr@10"] = first
    each["ndcg@10"] = found @ discount[: found.shape[1]] / ideal
    return each


def _found(ranking: Ranking, gold: Sequence[Sequence[int]]) -> np.ndarray:
    """Which of the first 10 places hold a gold document: bool (Q, min(K, 10))."""
    if len(gold) != len(ranking.rows):
        raise DataError(f"{len(ranking.rows)} ranked queries but gold rows for {len(gold)}; give both in one order")
    for query, rows in enumerate(gold):
        if not len(rows) or len(set(rows)) != len(rows) or min(rows) < 0:
            raise DataError(
                f"query {query} has the gold rows {list(rows)}; every query needs one or more catalogue rows, "
                "none negative, none twice"
            )
    sizes = [len(rows) for rows in gold]
    gold_rows = np.fromiter(chain.from_iterable(gold), dtype=np.int64, count=sum(sizes))
    ranked = ranking.rows[:, :_CUTOFF]
    # One number for a pair of query and row, so that all queries are looked up at once.
    stride = int(max(ranked.max(), gold_rows.max())) + 1
    queries = np.arange(len(gold))
    return np.isin(ranked + stride * queries[:, None], gold_rows + stride * np.repeat(queries, sizes))


def _resamples(queries: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each query is drawn: float64 (r, Q) at a time, `resamples` rows in all, every row adding up to Q."""
    generator = np.random.default_rng(seed)
    at_once = max(1, _RESAMPLED_AT_ONCE // queries)
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        drawn = generator.integers(queries, size=(size, queries)) + queries * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * queries).reshape(size, queries).astype(np.float64)


def calibration_error(probability: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """How far stated probabilities lie from observed frequencies (ECE; arXiv:1706.04599, equation 3).

    The mean over `bins` equal-width bins ((m - 1) / bins, m / bins] of |share correct - mean probability| in the
    bin, weighted by the share of queries in it; probability 0 belongs to the first bin.

    Args:
        probability: (Q,) in [0, 1], the probability given to the first document.
        correct: (Q,), whether it was right.
        bins: how many.

    Returns:
        In [0, 1]; 0 is calibrated.

    Raises:
        DataError: there is no query, the lengths differ, or a probability is outside [0, 1].
    """
    stated = np.asarray(probability, dtype=np.float64)
    right = np.asarray(correct, dtype=np.float64)
    if stated.ndim != 1 or stated.shape != right.shape or not stated.size:
        raise DataError(
            f"probabilities {stated.shape} and correct {right.shape}: give one of each for every query, at least one"
        )
    if not ((stated >= 0) & (stated <= 1)).all():
        raise DataError("a probability is outside [0, 1] or not a number; give the softmax of logits")
    members = np.maximum(np.ceil(stated * bins).astype(np.int64) - 1, 0)
    gaps = np.bincount(members, weights=right - stated, minlength=bins)
    return float(np.abs(gaps).sum() / stated.size)


def latency(function: Callable[[str], object], texts: Sequence[str], *, warm_up: int = 3, repeats: int = 3) -> Latency:
    """Time single calls, one text each, as a user waiting for an answer meets them.

    Args:
        function: what is timed, such as an encoder or a search of one text.
        texts: what it is called with, in order.
        warm_up: calls made first and not counted: they pay for caches and lazy loading.
        repeats: passes over the texts.

    Raises:
        DataError: there is no text or no pass.
    """
    if not texts or repeats < 1:
        raise DataError(f"nothing to time: {len(texts)} texts, {repeats} repeats; give at least one of each")
    for text in islice(cycle(texts), warm_up):
        function(text)
    durations_ms = []
    for text in chain.from_iterable([texts] * repeats):
        start = perf_counter_ns()
        function(text)
        durations_ms.append((perf_counter_ns() - start) / 1e6)
    median_ms, percentile95_ms = np.percentile(durations_ms, (50, 95)).tolist()
    return Latency(median_ms=median_ms, percentile95_ms=percentile95_ms, calls=len(durations_ms))
