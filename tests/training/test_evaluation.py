import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from caravan.errors import DataError, TrainingError
from caravan.training import evaluation
from caravan.training.evaluation import Estimate, Ranking, calibration_error, latency, measure, measure_each, rank


def ranking_of(rows, probability=None):
    rows = np.array(rows, dtype=np.int64)
    scores = np.tile(-np.arange(rows.shape[1], dtype=np.float32), (len(rows), 1))
    return Ranking(rows, scores, None if probability is None else np.array(probability, dtype=np.float32))


def random_ranking(queries, seed=0):
    scores = torch.randn(queries, 30, generator=torch.Generator().manual_seed(seed))
    return rank([scores]), [[query % 7] for query in range(queries)]


def test_the_best_documents_come_first_over_all_batches():
    batches = [torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[0.5, -1.0, 0.0], [-3.0, -2.0, -1.0]])]
    ranking = rank(iter(batches), depth=2)
    assert ranking.rows.tolist() == [[1, 2], [0, 2], [2, 1]]
    assert ranking.scores.tolist() == [[3.0, 2.0], [0.5, 0.0], [-1.0, -2.0]]
    assert (ranking.rows.dtype, ranking.scores.dtype) == (np.int64, np.float32)
    assert ranking.probability is None


def test_no_more_places_than_documents():
    assert rank([torch.zeros(2, 3)]).rows.shape == (2, 3)
    assert rank([torch.zeros(2, 300)]).rows.shape == (2, 100)


@given(
    scores=st.integers(1, 12).flatmap(
        lambda width: st.lists(st.lists(st.integers(-2, 2), min_size=width, max_size=width), min_size=1, max_size=6)
    ),
    depth=st.integers(1, 14),
)
def test_equal_scores_are_ordered_by_smaller_row(scores, depth):
    ranking = rank([torch.tensor(scores, dtype=torch.float32)], depth=depth)
    for query, row_scores in enumerate(scores):
        expected = sorted(range(len(row_scores)), key=lambda row: (-row_scores[row], row))[:depth]
        assert ranking.rows[query].tolist() == expected
        assert ranking.scores[query].tolist() == [row_scores[row] for row in expected]


def test_negative_and_positive_zero_are_equal_scores():
    assert rank([torch.tensor([[-0.0, 0.0, -0.0, 0.0]])], depth=3).rows.tolist() == [[0, 1, 2]]


def test_half_precision_scores_are_ranked():
    ranking = rank([torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)])
    assert ranking.rows.tolist() == [[1, 0]]
    assert ranking.scores.dtype == np.float32


def test_the_probability_is_the_softmax_of_the_first_place_over_all_documents():
    logits = torch.log(torch.tensor([[0.2, 0.7, 0.1], [0.25, 0.25, 0.5]])) + 80.0
    ranking = rank([logits], depth=1, logits=True)
    assert ranking.probability is not None
    np.testing.assert_allclose(ranking.probability, [0.7, 0.5], rtol=1e-5)


def test_the_probability_never_exceeds_one():
    ranking = rank([torch.tensor([[500.0, -500.0]])], logits=True)
    assert ranking.probability is not None
    assert ranking.probability.tolist() == [1.0]


def test_one_batch_of_scores_is_let_go_before_the_next_is_made():
    made = []

    def batches():
        for _ in range(6):
            assert all(reference() is None for reference in made)
            memory = np.ones((2, 5), dtype=np.float32)
            made.append(weakref.ref(memory))
            batch = torch.from_numpy(memory)
            del memory
            yield batch
            del batch

    assert rank(batches()).rows.shape == (12, 5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite_is_refused_with_query_and_row(bad):
    second = torch.zeros(3, 4)
    second[1, 2] = bad
    with pytest.raises(TrainingError, match=r"score of query 3 for catalogue row 2 is -?(nan|inf)"):
        rank([torch.zeros(2, 4), second])


def test_batches_against_different_catalogues_are_refused():
    with pytest.raises(DataError, match="query 2 is scored against 5 documents, earlier ones against 4"):
        rank([torch.zeros(2, 4), torch.zeros(2, 5)])


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 4)], [torch.zeros(2, 0)]])
def test_nothing_to_rank_is_refused(batches):
    with pytest.raises(DataError, match="nothing to rank"):
        rank(batches, logits=True)


def test_measures_of_three_queries_by_hand():
    # First place; third place; two golds of which one is found, in second place.
    ranking = ranking_of([[4, 0, 1], [0, 1, 2], [3, 2, 0]])
    each = measure_each(ranking, [[4], [2], [2, 9]])
    assert each["recall@1"].tolist() == [1.0, 0.0, 0.0]
    assert each["recall@5"].tolist() == [1.0, 1.0, 0.5]
    assert each["recall@10"].tolist() == [1.0, 1.0, 0.5]
    np.testing.assert_allclose(each["mrr@10"], [1.0, 1 / 3, 1 / 2])
    # log2(2) = 1, log2(3) = 1.58496, log2(4) = 2: 0.63093 / (1 + 0.63093) for the last.
    np.testing.assert_allclose(each["ndcg@10"], [1.0, 0.5, 0.3868528], rtol=1e-6)


def test_only_the_first_ten_places_count():
    each = measure_each(ranking_of([range(12)]), [[10, 11]])
    assert [values.item() for values in each.values()] == [0.0] * 5


def test_more_than_ten_golds_can_reach_full_gain():
    each = measure_each(ranking_of([range(12)]), [list(range(12))])
    assert each["ndcg@10"].item() == pytest.approx(1.0)
    assert each["recall@10"].item() == pytest.approx(10 / 12)


def test_an_estimate_is_the_mean_over_queries():
    estimates = measure(ranking_of([[0, 1], [0, 1], [0, 1], [0, 1]]), [[0], [0], [0], [1]])
    assert list(estimates) == ["recall@1", "recall@5", "recall@10", "mrr@10", "ndcg@10"]
    assert estimates["recall@1"].value == 0.75
    assert estimates["mrr@10"].value == 0.875


def test_the_same_seed_gives_the_same_intervals():
    ranking, gold = random_ranking(200)
    assert measure(ranking, gold, seed=1) == measure(ranking, gold, seed=1)
    assert measure(ranking, gold, seed=1) != measure(ranking, gold, seed=2)


def test_intervals_do_not_depend_on_how_many_resamples_are_held_at_once(monkeypatch):
    ranking, gold = random_ranking(50)
    at_once = measure(ranking, gold, bootstrap=100)
    monkeypatch.setattr(evaluation, "_RESAMPLED_AT_ONCE", 7 * 50)
    assert measure(ranking, gold, bootstrap=100) == at_once


@given(queries=st.integers(1, 60), seed=st.integers(0, 1000))
def test_an_interval_contains_its_value(queries, seed):
    ranking, gold = random_ranking(queries, seed)
    for estimate in measure(ranking, gold, bootstrap=200, seed=seed).values():
        assert 0.0 <= estimate.low <= estimate.value <= estimate.high <= 1.0


def test_an_interval_is_that_of_the_normal_distribution_where_there_are_many_queries():
    # Half of 2,500 queries are right: a standard error of 0.5 / sqrt(2,500) = 0.01, so 0.5 -+ 1.96 * 0.01.
    estimate = measure(ranking_of([[0, 1]] * 2500), [[query % 2] for query in range(2500)])["recall@1"]
    assert estimate.value == 0.5
    assert estimate.low == pytest.approx(0.5 - 0.0196, abs=0.002)
    assert estimate.high == pytest.approx(0.5 + 0.0196, abs=0.002)


def test_an_interval_shrinks_with_the_number_of_queries():
    def width(queries):
        estimate = measure(ranking_of([[0, 1]] * queries), [[query % 2] for query in range(queries)])["recall@1"]
        return estimate.high - estimate.low

    assert width(40) > width(400) > width(4000)


@pytest.mark.parametrize("queries", [1, 11, 20, 30])
def test_queries_that_all_agree_have_an_interval_of_no_width_around_their_value(queries):
    # A third has no exact float: sums in another order differ from it in the last digit.
    estimate = measure(ranking_of([[0, 1, 2]] * queries), [[2]] * queries)["mrr@10"]
    assert estimate == Estimate(pytest.approx(1 / 3), pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert estimate.low <= estimate.value <= estimate.high


def test_no_resamples_give_no_intervals():
    ranking, gold = random_ranking(20)
    assert all((e.low, e.high) == (None, None) for e in measure(ranking, gold, bootstrap=0).values())


def test_the_calibration_error_is_measured_where_there_are_probabilities():
    # One query right at 0.95, one wrong at 0.55, in different bins: (0.05 + 0.55) / 2.
    estimates = measure(ranking_of([[0, 1], [0, 1]], probability=[0.95, 0.55]), [[0], [1]])
    assert estimates["calibration_error"].value == pytest.approx(0.3)
    assert estimates["calibration_error"].low is None


@pytest.mark.parametrize("gold", [[[0], []], [[0], [1, 1]], [[0], [-1]]])
def test_gold_rows_that_make_no_sense_are_refused_with_the_query(gold):
    with pytest.raises(DataError, match=r"query 1 has the gold rows \["):
        measure(ranking_of([[0, 1], [0, 1]]), gold)


def test_gold_rows_for_another_number_of_queries_are_refused():
    with pytest.raises(DataError, match="2 ranked queries but gold rows for 1"):
        measure(ranking_of([[0, 1], [0, 1]]), [[0]])


def test_calibration_error_by_hand():
    # Upper half: mean probability 0.85, half right: gap 0.35. Lower half: 0.25, none right: gap 0.25.
    probability, correct = np.array([0.9, 0.8, 0.3, 0.2]), np.array([True, False, False, False])
    assert calibration_error(probability, correct, bins=2) == pytest.approx(0.3)
    # One bin: mean probability 0.55, a quarter right.
    assert calibration_error(probability, correct, bins=1) == pytest.approx(0.3)
    # Each in its own bin: (0.1 + 0.8 + 0.3 + 0.2) / 4.
    assert calibration_error(probability, correct) == pytest.approx(0.35)


def test_a_probability_on_an_edge_belongs_to_the_bin_below():
    # 0.5 falls in with 0.25, so its right answer makes up for their mean: |1 - 0.75| / 2; apart it would be 0.375.
    assert calibration_error(np.array([0.25, 0.5]), np.array([False, True]), bins=2) == pytest.approx(0.125)


def test_zero_and_one_are_probabilities():
    assert calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0.0


@pytest.mark.parametrize("probability", [[1.1], [-0.1], [float("nan")]])
def test_what_is_no_probability_is_refused(probability):
    with pytest.raises(DataError, match=r"outside \[0, 1\]"):
        calibration_error(np.array(probability), np.array([True]))


@pytest.mark.parametrize(("probability", "correct"), [([], []), ([0.5], [True, False])])
def test_probabilities_without_matching_answers_are_refused(probability, correct):
    with pytest.raises(DataError, match="one of each for every query"):
        calibration_error(np.array(probability), np.array(correct))


def test_latency_is_the_median_and_95th_percentile_of_the_calls_after_warm_up(monkeypatch):
    now_ns, called = 0, []

    def work(text):
        nonlocal now_ns
        called.append(text)
        now_ns += 1_000_000 * (1000 if len(called) <= 2 else len(called) - 2)

    monkeypatch.setattr(evaluation, "perf_counter_ns", lambda: now_ns)
    measured = latency(work, ["a", "b", "c"], warm_up=2, repeats=7)
    # 21 calls of 1, 2, ..., 21 ms: the 95th percentile lies on the 20th.
    assert (measured.median_ms, measured.percentile95_ms, measured.calls) == (11.0, 20.0, 21)
    assert called == ["a", "b"] + ["a", "b", "c"] * 7


@pytest.mark.parametrize(("texts", "repeats"), [([], 1), (["a"], 0)])
def test_nothing_to_time_is_refused(texts, repeats):
    with pytest.raises(DataError, match="nothing to time"):
        latency(len, texts, repeats=repeats)
