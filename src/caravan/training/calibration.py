"""How sure an answer may be: two weights turn evidence into probabilities, and a threshold says when to be silent."""

from dataclasses import dataclass

import torch
from torch import Tensor

from caravan.errors import DataError

CANDIDATES = 10  # documents weighed for a question: below rank 10 hardly a gold document is left (docs/results.md)
MOST_CITED = 5  # what a reader can check in a minute
COVER = 0.9  # of the probability that citations are to hold: one in ten answers may miss
RIGHT = 0.9  # of the answers given, those that should cite a gold document
_LEAST_ANSWERED = 10  # a share of fewer answers says nothing


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What turns a head's scores into probabilities, and says when to be silent.

    The probability of candidate c is `reach` · softmax over candidates of `sharpness` · score + `similarity` · cosine.

    Attributes:
        sharpness: 1 / temperature, on the head's score (temperature scaling; arXiv:1706.04599, section 4.2).
        similarity: on the cosine between the question and the document's best sentence.
        reach: share of questions of which a gold document is among the candidates.
        threshold: confidence below which the answer is "I don't know".
        queries: validation queries it was chosen on; 0: the defaults.
        answered: share of these at or above the threshold.
        right: share of the answered whose citations hold a gold document.
    """

    # Without validation queries: the head's own softmax, which label smoothing leaves too low rather than too high, and
    # silence where the citations are more likely wrong than right.
    sharpness: float = 1.0
    similarity: float = 0.0
    reach: float = 1.0
    threshold: float = 0.5
    queries: int = 0
    answered: float | None = None
    right: float | None = None


def probabilities(calibration: Calibration, scores: Tensor, cosines: Tensor) -> Tensor:
    """Probability of each candidate, float32 (Q, K), from the head's scores (Q, K) and best cosines (Q, K)."""
    logits = calibration.sharpness * scores + calibration.similarity * cosines
    return calibration.reach * logits.softmax(dim=1)


def cited(sorted_probabilities: Tensor, reach: float = 1.0) -> tuple[Tensor, Tensor]:
    """Say how many documents to cite: the fewest that hold `COVER` of the probability, at most `MOST_CITED`.

    Args:
        sorted_probabilities: float (Q, K), never rising along a question.
        reach: what each row adds up to.

    Returns:
        int64 (Q,) of 1 to `MOST_CITED` documents, and float (Q,), the probability that one of them is a gold document.
    """
    sums = sorted_probabilities.cumsum(dim=1)
    counts = ((sums < COVER * reach).sum(dim=1) + 1).clamp_max(min(MOST_CITED, sums.shape[1]))
    return counts, sums.gather(1, (counts - 1).unsqueeze(1)).squeeze(1)


def calibrate(scores: Tensor, cosines: Tensor, gold: Tensor) -> Calibration:
    """Choose all numbers on validation queries.

    The two weights are those under which the gold documents are most likely (a conditional logit, convex), over the
    queries that have one among their candidates. The threshold is the lowest at which `RIGHT` of the answered queries
    cite a gold document; where there is none, the highest confidence seen.

    Args:
        scores: float32 (Q, K), the head's scores of each query's candidates.
        cosines: float32 (Q, K), of each candidate's best sentence.
        gold: bool (Q, K), which candidates are gold.

    Raises:
        DataError: there are too few queries to choose from.
    """
    found = gold.any(dim=1)
    if int(found.sum()) < _LEAST_ANSWERED:
        what = f"{int(found.sum())} of {len(gold)} validation queries have a gold document among {gold.shape[1]}"
        raise DataError(f"{what}; calibrating needs at least {_LEAST_ANSWERED}")
    sharpness, similarity = _weights(scores[found], cosines[found], gold[found])
    reach = float(found.float().mean())
    weights = Calibration(sharpness=sharpness, similarity=similarity, reach=reach)
    ordered, order = probabilities(weights, scores, cosines).sort(dim=1, descending=True, stable=True)
    counts, confidence = cited(ordered, reach)
    hits = gold.gather(1, order).cumsum(dim=1).gather(1, (counts - 1).unsqueeze(1)).squeeze(1) > 0
    threshold = _threshold(confidence, hits)
    answered = confidence >= threshold
    return Calibration(
        sharpness=sharpness,
        similarity=similarity,
        reach=reach,
        threshold=threshold,
        queries=len(gold),
        answered=float(answered.float().mean()),
        right=float(hits[answered].float().mean()),
    )


def _weights(scores: Tensor, cosines: Tensor, gold: Tensor) -> tuple[float, float]:
    scores, cosines = scores.double(), cosines.double()
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            logs = (weights[0] * scores + weights[1] * cosines).log_softmax(dim=1)
            # The faint pull towards the defaults keeps weights finite where a few queries are all told apart.
            pull = 1e-3 * ((weights[0] - 1) ** 2 + (weights[1] / 10) ** 2)
            value = pull - logs.masked_fill(~gold, -torch.inf).logsumexp(dim=1).mean()
            value.backward()
        return value

    optimizer.step(loss)
    sharpness, similarity = weights.detach().tolist()
    return sharpness, similarity


def _threshold(confidence: Tensor, hits: Tensor) -> float:
    ordered, order = confidence.sort(descending=True)
    shares = hits[order].double().cumsum(dim=0) / torch.arange(1, len(order) + 1)
    # Equal confidences are answered together or not at all.
    last = torch.cat([ordered[1:] < ordered[:-1], torch.tensor([True])])
    enough = torch.arange(1, len(order) + 1) >= _LEAST_ANSWERED
    good = ((shares >= RIGHT) & last & enough).nonzero()
    return float(ordered[int(good[-1])] if len(good) else ordered[0])
