import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from caravan.errors import DataError, TrainingError
from caravan.training import baselines
from caravan.training.baselines import bm25, centroids, class_centroids, mips, nearest_neighbour


def vectors(count, seed, width=6):
    return normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


GOLD = [[0], [3], [3, 1], [0], [5], [1], [3]]  # rows 2, 4 and 6 have no training query


def test_mips_ranks_by_inner_product():
    documents = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    ranking = mips(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), documents)
    assert ranking.rows.tolist() == [[0, 2, 1], [1, 2, 0]]
    np.testing.assert_allclose(ranking.scores, [[1.0, 0.6, 0.0], [2.0, 1.6, 0.0]], rtol=1e-6)
    assert ranking.probability is None


def test_equal_documents_rank_in_catalogue_order():
    assert mips(torch.ones(1, 2), torch.ones(4, 2)).rows.tolist() == [[0, 1, 2, 3]]


def test_vectors_that_need_gradients_or_are_half_precision_are_ranked():
    queries = vectors(2, 0).requires_grad_()
    documents = vectors(3, 1).to(torch.bfloat16)
    assert mips(queries, documents).rows.shape == (2, 3)
    assert nearest_neighbour(queries, documents, [[0], [1], [0]], document_count=2).rows.shape == (2, 2)


def test_a_centroid_is_the_normalised_mean_of_a_documents_training_queries():
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    documents = torch.tensor([[0.0, -1.0], [0.0, -1.0], [0.3, 0.4]])
    rows = class_centroids(train, [[0], [0], [1]], documents)
    # The mean (0.5, 0.5) at length 1; the one query itself; no query: its own vector, as it is.
    torch.testing.assert_close(rows, torch.tensor([[math.sqrt(0.5)] * 2, [0.6, 0.8], [0.3, 0.4]]))


def test_a_training_query_counts_for_each_of_its_documents():
    rows = class_centroids(torch.tensor([[0.0, 1.0]]), [[0, 2]], torch.tensor([[1.0, 0.0]] * 3))
    assert rows.tolist() == [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]


def test_a_document_whose_training_queries_cancel_out_keeps_its_own_vector():
    rows = class_centroids(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), [[0], [0]], torch.tensor([[0.0, 1.0]]))
    assert rows.tolist() == [[0.0, 1.0]]


def test_class_centroids_leave_the_document_vectors_alone():
    documents = vectors(4, 1)
    before = documents.clone()
    class_centroids(vectors(2, 2), [[0], [1]], documents)
    assert torch.equal(documents, before)


def test_centroids_rank_by_the_centroids():
    queries, train, documents = vectors(9, 0), vectors(7, 1), vectors(7, 2)
    expected = mips(queries, class_centroids(train, GOLD, documents))
    ranking = centroids(queries, train, GOLD, documents)
    assert ranking.rows.tolist() == expected.rows.tolist()
    assert ranking.rows.tolist() != mips(queries, documents).rows.tolist()


def test_a_document_scores_as_its_best_training_query():
    queries, train = vectors(9, 0), vectors(7, 1)
    ranking = nearest_neighbour(queries, train, GOLD, document_count=7)
    assert ranking.rows.shape == (9, 7)
    for query in range(9):
        best = {
            row: max((queries[query] @ train[example]).item() for example, rows in enumerate(GOLD) if row in rows)
            for row in (0, 1, 3, 5)
        }
        # Where two documents share their best query, they are equal and the smaller row comes first.
        expected = sorted(best, key=lambda row: (-round(best[row], 5), row))
        assert ranking.rows[query].tolist() == [*expected, 2, 4, 6]
        np.testing.assert_allclose(ranking.scores[query, :4], [best[row] for row in expected], rtol=1e-5)


def test_documents_without_training_queries_come_last_even_behind_very_poor_scores():
    ranking = nearest_neighbour(torch.tensor([[1e6]]), torch.tensor([[-1e6]]), [[1]], document_count=3)
    assert ranking.rows.tolist() == [[1, 0, 2]]
    assert np.isfinite(ranking.scores).all()


def test_without_any_training_query_the_order_is_the_catalogues():
    ranking = nearest_neighbour(vectors(2, 0), torch.zeros(0, 6), [], document_count=3)
    assert ranking.rows.tolist() == [[0, 1, 2]] * 2


def test_scoring_few_queries_at_a_time_changes_nothing(monkeypatch):
    queries, train, documents = vectors(40, 0), vectors(7, 1), vectors(7, 2)
    texts = [f"word{number % 5} word{number % 3}" for number in range(40)]

    def rankings():
        return [
            mips(queries, documents),
            nearest_neighbour(queries, train, GOLD, document_count=7),
            bm25(texts, ["word1", "word2 word4", "word0 word3"]),
        ]

    at_once = rankings()
    largest = 0

    def watched(batches, **options):
        nonlocal largest
        batches = list(batches)
        largest = max(largest, *(batch.numel() for batch in batches))
        return rank(batches, **options)

    rank = baselines.rank
    monkeypatch.setattr(baselines, "rank", watched)
    monkeypatch.setattr(baselines, "_SCORED_AT_ONCE", 21)
    for few, all_ in zip(rankings(), at_once, strict=True):
        assert few.rows.tolist() == all_.rows.tolist()
        np.testing.assert_allclose(few.scores, all_.scores, rtol=1e-5, atol=1e-6)
    assert largest <= 21


def test_a_vector_that_is_not_finite_is_refused():
    train = vectors(7, 1)
    train[4] = float("nan")
    with pytest.raises(TrainingError, match="query 0 for catalogue row 5 is nan"):
        nearest_neighbour(vectors(2, 0), train, GOLD, document_count=7)
    with pytest.raises(TrainingError, match="query 0 for catalogue row 4 is nan"):
        mips(vectors(2, 0), train)


@pytest.mark.parametrize("row", [-1, 3])
def test_a_gold_row_outside_the_catalogue_is_refused_with_the_query(row):
    message = f"training query 1 has the gold row {row}, the catalogue has rows 0 to 2"
    with pytest.raises(DataError, match=message):
        class_centroids(vectors(2, 0), [[0], [row]], vectors(3, 1))
    with pytest.raises(DataError, match=message):
        nearest_neighbour(vectors(2, 0), vectors(2, 1), [[0], [row]], document_count=3)


def test_gold_rows_for_another_number_of_training_queries_are_refused():
    with pytest.raises(DataError, match="2 training queries but gold rows for 1"):
        class_centroids(vectors(2, 0), [[0]], vectors(3, 1))


def test_no_query_and_no_document_are_refused():
    with pytest.raises(DataError, match="nothing to rank"):
        mips(vectors(0, 0), vectors(3, 1))
    with pytest.raises(DataError, match="nothing to rank"):
        nearest_neighbour(vectors(2, 0), vectors(0, 1), [], document_count=0)
    for query_texts, document_texts in (([], ["a word"]), (["a word"], [])):
        with pytest.raises(DataError, match="nothing to rank"):
            bm25(query_texts, document_texts)


def test_bm25_scores_by_hand():
    ranking = bm25(["Apple?"], ["apple banana", "durian", "an apple, Apple and a cherry"])
    # 3 documents of 2, 1 and 3 words (mean 2; "an", "and" and "a" do not count), 2 of them with the word:
    # idf = ln(1 + 1.5 / 2.5); the word's weight is tf / (tf + 1.5 (0.25 + 0.75 length / 2)).
    idf = math.log(1.6)
    assert ranking.rows.tolist() == [[2, 0, 1]]
    np.testing.assert_allclose(ranking.scores, [[idf * 2 / 4.0625, idf * 1 / 2.5, 0.0]], rtol=1e-5)


@pytest.mark.parametrize("query", ["unknown", "", "the of and", "?!", "\x00\ud800"])
def test_a_query_without_a_known_word_ranks_in_catalogue_order(query):
    ranking = bm25(["cherry", query], ["apple", "banana", "cherry"])
    assert ranking.rows.tolist() == [[2, 0, 1], [0, 1, 2]]
    assert ranking.scores[1].tolist() == [0.0, 0.0, 0.0]


def test_a_document_without_words_scores_zero():
    assert bm25(["apple"], ["", "the", "apple"]).rows.tolist() == [[2, 0, 1]]


def test_documents_without_any_word_rank_in_catalogue_order():
    assert bm25(["apple", "the"], ["", "the", "?"]).rows.tolist() == [[0, 1, 2]] * 2


def test_bm25_prints_nothing(capfd):
    bm25(["apple", "zebra"], ["apple", "banana"])
    assert capfd.readouterr() == ("", "")
