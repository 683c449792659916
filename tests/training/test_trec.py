import os
from itertools import pairwise
from urllib.parse import unquote

import ir_measures
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ir_measures import RR, R, Success, nDCG

from caravan.errors import StorageError
from caravan.training.evaluation import Ranking, measure_each, rank
from caravan.training.trec import write_qrels, write_run


def ranking_of(rows, scores):
    return Ranking(np.array(rows, dtype=np.int64), np.array(scores, dtype=np.float32))


def test_the_lines_of_a_run(tmp_path):
    ranking = ranking_of([[2, 0], [0, 1]], [[1.5, -0.25], [3.0, 0.1]])
    write_run(tmp_path / "run.trec", ranking, ["q1", "q2"], ["d0", "d1", "d2"], tag="head")
    assert (tmp_path / "run.trec").read_text(encoding="utf-8").splitlines() == [
        "q1 Q0 d2 1 1.5 head",
        "q1 Q0 d0 2 -0.25 head",
        "q2 Q0 d0 1 3 head",
        "q2 Q0 d1 2 0.100000001 head",
    ]


def test_the_lines_of_qrels(tmp_path):
    write_qrels(tmp_path / "qrels.trec", [[2, 0], [1]], ["q1", "q2"], ["d0", "d1", "d2"])
    assert (tmp_path / "qrels.trec").read_text(encoding="utf-8").splitlines() == [
        "q1 0 d2 1",
        "q1 0 d0 1",
        "q2 0 d1 1",
    ]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("documents", [7, 60])
def test_our_measures_equal_those_of_trec_eval_on_our_files(tmp_path, documents, ties):
    generator = torch.Generator().manual_seed(documents)
    scores = torch.randn(80, documents, generator=generator)
    ranking = rank([scores.round() if ties else scores], depth=40)
    random = np.random.default_rng(3)
    gold = [random.choice(documents, size=random.integers(1, 6), replace=False).tolist() for _ in range(80)]
    gold[0] = list(range(documents))
    query_ids = [f"query {number}" for number in range(80)]
    doc_ids = [f"{number}%" for number in range(documents)]
    write_run(tmp_path / "run", ranking, query_ids, doc_ids)
    write_qrels(tmp_path / "qrels", gold, query_ids, doc_ids)

    each = measure_each(ranking, gold)
    peers = {"recall@1": R @ 1, "recall@5": R @ 5, "recall@10": R @ 10, "mrr@10": RR @ 10, "ndcg@10": nDCG @ 10}
    qrels = list(ir_measures.read_trec_qrels(str(tmp_path / "qrels")))
    run = list(ir_measures.read_trec_run(str(tmp_path / "run")))
    theirs = {
        (metric.measure, unquote(metric.query_id)): metric.value
        for metric in ir_measures.iter_calc(list(peers.values()), qrels, run)
    }
    for name, peer in peers.items():
        np.testing.assert_allclose(each[name], [theirs[peer, query_id] for query_id in query_ids], atol=1e-6)


def test_with_one_gold_document_recall_at_1_is_the_top_1_accuracy_of_trec_eval(tmp_path):
    ranking = rank([torch.randn(60, 4, generator=torch.Generator().manual_seed(5))])
    gold = [[query % 4] for query in range(60)]
    query_ids, doc_ids = [f"q{number}" for number in range(60)], list("abcd")
    write_run(tmp_path / "run", ranking, query_ids, doc_ids)
    write_qrels(tmp_path / "qrels", gold, query_ids, doc_ids)
    theirs = ir_measures.calc_aggregate(
        [Success @ 1],
        ir_measures.read_trec_qrels(str(tmp_path / "qrels")),
        ir_measures.read_trec_run(str(tmp_path / "run")),
    )[Success @ 1]
    assert 0.0 < theirs < 1.0
    assert measure_each(ranking, gold)["recall@1"].mean() == pytest.approx(theirs)


@pytest.mark.parametrize("score", [0.0, 2.5, -1.0, -1e30])
def test_equal_scores_are_written_falling_and_as_near_as_can_be(tmp_path, score):
    ranking = ranking_of([[0, 1, 2, 3]], [[score] * 4])
    write_run(tmp_path / "run", ranking, ["q"], ["a", "b", "c", "d"])
    written = [np.float32(line.split()[4]) for line in (tmp_path / "run").read_text(encoding="utf-8").splitlines()]
    assert written[0] == np.float32(score)
    assert all(np.nextafter(high, np.float32(-np.inf)) == low for high, low in pairwise(written))
    assert ranking.scores.tolist() == [[np.float32(score)] * 4]


@given(ids=st.lists(st.text(st.characters(codec=None), min_size=1, max_size=5), min_size=1, max_size=5, unique=True))
def test_any_id_stays_one_column_and_can_be_read_back(tmp_path_factory, ids):
    path = tmp_path_factory.mktemp("trec") / "run"
    ranking = ranking_of([range(len(ids))] * len(ids), [-np.arange(len(ids))] * len(ids))
    write_run(path, ranking, ids, ids)
    columns = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    assert {len(line) for line in columns} == {6}
    assert [unquote(line[0], errors="surrogatepass") for line in columns] == [name for name in ids for _ in ids]
    assert [unquote(line[2], errors="surrogatepass") for line in columns] == ids * len(ids)


def test_an_id_without_white_space_is_written_as_it_is(tmp_path):
    write_qrels(tmp_path / "qrels", [[0]], ["où?"], ["doc/7&é#文"])
    assert (tmp_path / "qrels").read_text(encoding="utf-8") == "où? 0 doc/7&é#文 1\n"


@pytest.mark.parametrize(
    ("query_ids", "doc_ids", "message"),
    [
        (["q", "q"], ["a", "b"], "query id 'q' is used twice"),
        (["q", "r"], ["a", "a"], "document id 'a' is used twice"),
        (["q", ""], ["a", "b"], "a query id is empty"),
        (["q", "r"], ["a", ""], "a document id is empty"),
        (["q"], ["a", "b"], "1 query ids where the ranking or gold rows need 2"),
        (["q", "r"], ["a"], "1 document ids where the ranking or gold rows need 2"),
    ],
)
def test_ids_that_do_not_name_the_rows_are_refused_and_nothing_is_written(tmp_path, query_ids, doc_ids, message):
    with pytest.raises(StorageError, match=message):
        write_run(tmp_path / "run", ranking_of([[0, 1], [1, 0]], [[1, 0], [1, 0]]), query_ids, doc_ids)
    with pytest.raises(StorageError, match=message):
        write_qrels(tmp_path / "qrels", [[0], [1]], query_ids, doc_ids)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_tag_is_refused(tmp_path):
    with pytest.raises(StorageError, match="run tag is empty"):
        write_run(tmp_path / "run", ranking_of([[0]], [[1]]), ["q"], ["a"], tag="")


def test_a_missing_folder_is_refused_with_the_path(tmp_path):
    with pytest.raises(StorageError, match=r"nowhere.*: No such file or directory"):
        write_qrels(tmp_path / "nowhere" / "qrels", [[0]], ["q"], ["a"])


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "qrels"
    write_qrels(path, [[0]], ["old"], ["a"])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="No space left on device"):
        write_qrels(path, [[0]], ["new"], ["a"])
    assert path.read_text(encoding="utf-8") == "old 0 a 1\n"
    assert list(tmp_path.iterdir()) == [path]


def test_an_existing_file_is_replaced(tmp_path):
    write_qrels(tmp_path / "qrels", [[0]], ["old"], ["a"])
    write_qrels(tmp_path / "qrels", [[0]], ["new"], ["a"])
    assert (tmp_path / "qrels").read_text(encoding="utf-8") == "new 0 a 1\n"
