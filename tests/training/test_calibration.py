"""Calibration: probabilities that hold on validation queries, how many documents to cite, when to be silent."""

import pytest
import torch

from caravan.errors import DataError
from caravan.training.calibration import Calibration, calibrate, cited, probabilities


def drawn(queries=4000, *, sharpness=2.0, similarity=3.0, seed=0):
    """Gold documents drawn from the very model that is to be found again."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(queries, 6, generator=generator)
    cosines = torch.rand(queries, 6, generator=generator)
    shares = (sharpness * scores + similarity * cosines).softmax(dim=1)
    gold = torch.zeros(queries, 6, dtype=torch.bool)
    gold[torch.arange(queries), torch.multinomial(shares, 1, generator=generator).squeeze(1)] = True
    return scores, cosines, gold


def test_the_weights_that_the_gold_documents_were_drawn_with_are_found_again():
    calibration = calibrate(*drawn())
    assert calibration.sharpness == pytest.approx(2.0, abs=0.15)
    assert calibration.similarity == pytest.approx(3.0, abs=0.3)
    assert calibration.reach == 1
    assert calibration.queries == 4000


def test_stated_confidence_is_how_often_the_citations_hold_on_other_queries():
    calibration = calibrate(*drawn())
    scores, cosines, gold = drawn(seed=1)
    ordered, order = probabilities(calibration, scores, cosines).sort(dim=1, descending=True)
    counts, confidence = cited(ordered)
    hits = gold.gather(1, order).cumsum(dim=1).gather(1, counts.unsqueeze(1) - 1).squeeze(1) > 0
    assert float(hits.float().mean()) == pytest.approx(float(confidence.mean()), abs=0.02)


def test_queries_whose_gold_document_is_out_of_reach_lower_every_probability():
    scores, cosines, gold = drawn(400)
    gold[:100] = False
    calibration = calibrate(scores, cosines, gold)
    assert calibration.reach == 0.75
    assert probabilities(calibration, scores, cosines).sum(dim=1).max() == pytest.approx(0.75, abs=1e-5)


def test_the_fewest_documents_that_hold_nine_tenths_are_cited_and_at_most_five():
    rows = torch.tensor([[0.95, 0.05, 0, 0, 0, 0], [0.5, 0.3, 0.15, 0.05, 0, 0], [1 / 6] * 6])
    counts, confidence = cited(rows)
    assert counts.tolist() == [1, 3, 5]
    assert confidence.tolist() == pytest.approx([0.95, 0.95, 5 / 6])


def test_the_threshold_is_the_lowest_at_which_nine_of_ten_answers_are_right():
    # One candidate leads by a margin that shrinks; where it is small, every second gold document is the last of ten.
    scores = torch.tensor([[5.0 - n / 10] + [0.0] * 9 for n in range(40)])
    gold = torch.zeros(40, 10, dtype=torch.bool)
    gold[torch.arange(40), torch.tensor([9 if n > 20 and n % 2 else 0 for n in range(40)])] = True
    calibration = calibrate(scores, torch.zeros(40, 10), gold)
    _, confidence = cited(probabilities(calibration, scores, torch.zeros(40, 10)))
    right = {limit: float(gold[confidence >= limit, 0].float().mean()) for limit in confidence.tolist()}
    good = [limit for limit, share in right.items() if share >= 0.9 and int((confidence >= limit).sum()) >= 10]
    assert calibration.threshold == min(good)
    assert calibration.right == pytest.approx(right[calibration.threshold])
    assert calibration.answered is not None
    assert 0.5 < calibration.answered < 0.9


def test_where_no_threshold_is_good_enough_only_the_surest_are_answered():
    scores = torch.tensor([[3.0 - n / 10] + [0.0] * 9 for n in range(20)])
    gold = torch.zeros(20, 10, dtype=torch.bool)
    gold[:, 9] = True
    calibration = calibrate(scores, torch.zeros(20, 10), gold)
    assert (calibration.answered, calibration.right) == (pytest.approx(1 / 20), 0)


def test_too_few_queries_are_refused():
    scores, cosines, gold = drawn(9)
    with pytest.raises(DataError, match="9 of 9 validation queries"):
        calibrate(scores, cosines, gold)


def test_the_default_is_the_heads_own_softmax():
    scores = torch.tensor([[1.0, 0.0, -1.0]])
    assert torch.equal(probabilities(Calibration(), scores, torch.ones(1, 3)), scores.softmax(dim=1))
