"""Who ranks better: the same queries for all, measured as others measure, written as others read."""

import json
from dataclasses import replace

import ir_measures
import pytest
import torch

from caravan.app.comparison import Comparison, evaluate, evaluation_split, measure_latency, rank_queries
from caravan.data.catalogue import Catalogue
from caravan.data.records import Document, Example
from caravan.errors import DataError, StorageError, TrainingError
from caravan.training.features import FeatureStore
from caravan.training.trainer import fit
from toy_experiments import DATASET, share_found, toy_settings
from toy_training import CATALOGUE, Log, assert_same_bits, toy_examples, toy_retriever

RIVALS = ["BM25", "MIPS", "centroids", "1-NN", "output adapter"]
MEASURES = {
    "recall@1": ir_measures.R @ 1,
    "recall@5": ir_measures.R @ 5,
    "recall@10": ir_measures.R @ 10,
    "mrr@10": ir_measures.RR @ 10,
    "ndcg@10": ir_measures.nDCG @ 10,
}


@pytest.fixture(scope="module")
def config(backbone):
    return toy_settings(backbone.config, epochs=2)


@pytest.fixture(scope="module")
def trained(backbone, config):
    retriever = toy_retriever(backbone)
    for stage in ("head", "adapter"):
        fit(retriever, DATASET.train, stage, config.training, seed=0)
    return retriever


@pytest.fixture
def comparison(config):
    return Comparison(DATASET, config, store=FeatureStore())


@pytest.fixture(scope="module")
def everybody(config, backbone, trained):
    """All rivals and one of ours; no test changes it."""
    comparison = Comparison(DATASET, config, store=FeatureStore())
    comparison.add_baselines(backbone)
    comparison.add_retriever("ours", trained, seconds=12.5)
    return comparison


# One retriever


def test_a_retriever_is_measured_as_its_searches_say(trained):
    measured = evaluate(trained, DATASET)
    texts, gold = [example.text for example in DATASET.test], [example.doc_ids[0] for example in DATASET.test]
    ranks = [
        [hit.doc_id for hit in hits].index(doc_id) for hits, doc_id in zip(trained.search(texts), gold, strict=True)
    ]
    assert measured["recall@1"].value == pytest.approx(sum(rank == 0 for rank in ranks) / 30)
    assert measured["recall@5"].value == measured["recall@10"].value == 1  # there are five documents
    assert measured["mrr@10"].value == pytest.approx(sum(1 / (rank + 1) for rank in ranks) / 30)
    assert measured["recall@1"].low < measured["recall@1"].value < measured["recall@1"].high
    assert 0 <= measured["calibration_error"].value <= 1
    assert list(measured) == [*MEASURES, "calibration_error"]


def test_examples_alone_are_measured_like_the_data_set_they_come_from(trained):
    assert evaluate(trained, DATASET.test) == evaluate(trained, DATASET)
    assert evaluate(trained, list(DATASET.test)) == evaluate(
        trained, replace(DATASET, test=(), validation=DATASET.test)
    )
    assert evaluate(trained, DATASET.test[:10]) != evaluate(trained, DATASET)


def test_the_interval_follows_from_the_seed_and_can_be_left_out(trained):
    first, again, other = (evaluate(trained, DATASET, seed=seed)["mrr@10"] for seed in (13, 13, 14))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)
    bare = evaluate(trained, DATASET, bootstrap=0)["mrr@10"]
    assert (bare.value, bare.low, bare.high) == (first.value, None, None)


def test_the_progress_of_measuring_is_reported(trained):
    log = Log()
    evaluate(trained, DATASET, report=log)
    assert [(progress.task, progress.done, progress.total) for progress in log.told][-1] == ("evaluating", 30, 30)


def test_nothing_to_evaluate_on_is_refused(trained):
    with pytest.raises(DataError, match="nothing to evaluate on"):
        evaluate(trained, [])
    with pytest.raises(DataError, match=r"letters: neither test nor validation queries; give data\.test"):
        evaluate(trained, replace(DATASET, test=(), validation=()))


def test_queries_about_documents_that_the_retriever_does_not_have_are_refused(trained):
    other = Catalogue([*CATALOGUE, Document("d5", "1 2 3")])
    strange = replace(DATASET, catalogue=other, test=[*DATASET.test, Example("1", ("d5",))])
    for data in (strange, strange.test):
        with pytest.raises(DataError, match="'d5'") as caught:
            evaluate(trained, data)
        assert "\n" not in str(caught.value)


def test_the_test_split_goes_before_the_validation_split():
    assert evaluation_split(DATASET) == ("test", DATASET.test)
    assert evaluation_split(replace(DATASET, test=())) == ("validation", DATASET.validation)


def test_vectors_of_an_untouched_encoder_are_kept_and_those_of_an_adapted_one_are_not(backbone, trained, tmp_path):
    texts = [example.text for example in DATASET.test]
    adapted, untouched = tmp_path / "adapted", tmp_path / "untouched"
    rank_queries(trained, texts, FeatureStore(adapted))
    assert not adapted.exists()
    first = rank_queries(toy_retriever(backbone), texts, FeatureStore(untouched))
    assert len(list(untouched.iterdir())) == 1
    again = rank_queries(toy_retriever(backbone), texts, FeatureStore(untouched))
    assert (first.rows == again.rows).all()
    assert (first.scores == again.scores).all()


def test_a_retriever_whose_scores_are_no_numbers_is_not_measured(backbone):
    retriever = toy_retriever(backbone)
    with torch.no_grad():
        retriever.head.log_scale.fill_(float("inf"))
    with pytest.raises(TrainingError, match="no longer finite"):
        evaluate(retriever, DATASET)


def test_latency_is_told_for_the_vector_and_for_the_hits(trained):
    measured = measure_latency(trained, [example.text for example in DATASET.test])
    assert list(measured) == ["encode_ms", "search_ms", "search_p95_ms"]
    assert all(value > 0 for value in measured.values())


def test_no_more_than_thirty_queries_are_timed(trained, monkeypatch):
    asked = []
    monkeypatch.setattr(type(trained), "search", lambda self, text, k: asked.append((text, k)))
    texts = [example.text for example in toy_examples(60, seed=5)]
    measure_latency(trained, texts)
    assert set(asked) == {(text, 10) for text in texts[:30]}


# Rows side by side


def test_all_rivals_are_measured_in_their_order_and_ours_after_them(everybody, trained):
    assert [row.name for row in everybody.rows] == [*RIVALS, "random backbone", "ours"]
    assert everybody.split == "test"
    assert all(row.ranking.rows.shape == (30, 5) for row in everybody.rows)
    assert everybody.rows[-1].metrics == evaluate(trained, DATASET, bootstrap=20, seed=13)
    assert everybody.rows[-1].metrics["recall@1"].value == pytest.approx(share_found(trained, DATASET.test))
    assert everybody.rows[-1].seconds >= 12.5


def test_the_untrained_rivals_rank_as_their_definitions_say(everybody, backbone):
    rows = {row.name: row.ranking.rows[:, 0].tolist() for row in everybody.rows}
    encoder = toy_retriever(backbone).encoder
    documents = encoder.encode([document.content for document in CATALOGUE])
    queries = encoder.encode([example.text for example in DATASET.test])
    train = encoder.encode([example.text for example in DATASET.train])
    gold = torch.tensor([CATALOGUE.row(example.doc_ids[0]) for example in DATASET.train])
    means = torch.stack([train[gold == row].mean(dim=0) for row in range(4)])
    assert rows["MIPS"] == (queries @ documents.T).argmax(dim=1).tolist()
    assert rows["1-NN"] == gold[(queries @ train.T).argmax(dim=1)].tolist()
    centres = torch.cat([torch.nn.functional.normalize(means, dim=1), documents[4:]])
    assert rows["centroids"] == (queries @ centres.T).argmax(dim=1).tolist()


def test_the_trained_rivals_are_neither_untrained_nor_ours(everybody):
    scores = {row.name: row.ranking for row in everybody.rows}
    assert all(scores[name].probability is not None for name in ("output adapter", "random backbone", "ours"))
    for name in ("MIPS", "random backbone", "ours"):
        assert (scores["output adapter"].rows != scores[name].rows).any()
        assert name == "random backbone" or (scores["random backbone"].rows != scores[name].rows).any()


def test_measuring_rivals_twice_gives_the_same_rows_again(config, backbone, everybody):
    again = Comparison(DATASET, config, store=FeatureStore())
    again.add_baselines(backbone)
    for ours, theirs in zip(everybody.rows, again.rows, strict=False):
        assert ours.metrics == theirs.metrics


def test_measuring_rivals_leaves_retriever_and_backbone_alone(config, backbone, trained):
    frozen = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    before = trained.trainable_state()
    comparison = Comparison(DATASET, config, store=FeatureStore())
    comparison.add_baselines(backbone)
    comparison.add_retriever("ours", trained)
    assert_same_bits(trained.trainable_state(), before)
    assert_same_bits(dict(backbone.state_dict()), frozen)


def test_the_random_backbone_can_be_left_out(config, backbone):
    lean = replace(config, evaluation=replace(config.evaluation, random_backbone=False))
    comparison = Comparison(DATASET, lean, store=FeatureStore())
    comparison.add_baselines(backbone)
    assert [row.name for row in comparison.rows] == RIVALS


def test_a_name_that_is_taken_gets_a_number(comparison, trained):
    for name in ("ours", "ours", "ours (2)", "ours"):
        comparison.add_retriever(name, trained)
    assert [row.name for row in comparison.rows] == ["ours", "ours (2)", "ours (2) (2)", "ours (3)"]
    assert len(comparison.to_dict()) == 4


def test_a_retriever_of_other_documents_is_refused_by_name(comparison, trained):
    changed = [Document(document.doc_id, document.text + " z") for document in CATALOGUE]
    other = Comparison(replace(DATASET, catalogue=Catalogue(changed)), comparison.config, store=FeatureStore())
    with pytest.raises(DataError, match="old one was trained on other documents than those of letters") as caught:
        other.add_retriever("old one", trained)
    assert "\n" not in str(caught.value)
    assert other.rows == []


def test_a_comparison_without_held_out_queries_is_refused(config):
    with pytest.raises(DataError, match="neither test nor validation queries"):
        Comparison(replace(DATASET, test=(), validation=()), config, store=FeatureStore())


def test_rivals_say_what_they_are_doing(config, backbone):
    log = Log()
    Comparison(DATASET, config, store=FeatureStore(), report=log).add_baselines(backbone)
    tasks = list(dict.fromkeys(progress.task for progress in log.told))
    assert "encoding test queries" in tasks
    assert "random backbone: training the head" in tasks
    assert tasks.index("output adapter: training the head") < tasks.index("encoding documents, random backbone")


# Written down


def test_rows_are_plain_values(everybody):
    summary = json.loads(json.dumps(everybody.summary({"model": "here"}), allow_nan=False))
    assert (summary["dataset"], summary["split"], summary["model"]) == ("letters", "test", "here")
    assert list(summary["rows"]) == [row.name for row in everybody.rows]
    found = everybody.rows[-1].metrics["recall@1"]
    assert summary["rows"]["ours"]["metrics"]["recall@1"] == {
        "value": found.value,
        "low": found.low,
        "high": found.high,
    }
    assert summary["rows"]["ours"]["seconds"] >= 12.5


def test_the_files_of_every_row_give_the_same_measures_to_ir_measures(everybody, tmp_path):
    everybody.write_trec(tmp_path / "trec")
    files = sorted(path.name for path in (tmp_path / "trec").iterdir())
    runs = ["1-NN.run", "BM25.run", "MIPS.run", "centroids.run", "ours.run", "output-adapter.run"]
    assert files == [*runs, "qrels.txt", "random-backbone.run"]
    qrels = list(ir_measures.read_trec_qrels(str(tmp_path / "trec" / "qrels.txt")))
    assert len(qrels) == 30
    for row in everybody.rows:
        run = ir_measures.read_trec_run(str(tmp_path / "trec" / f"{row.name.replace(' ', '-')}.run"))
        theirs = ir_measures.calc_aggregate(list(MEASURES.values()), qrels, run)
        for name, measure in MEASURES.items():
            assert row.metrics[name].value == pytest.approx(theirs[measure], abs=1e-9), (row.name, name)


def test_several_gold_documents_are_measured_as_ir_measures_does(config, trained, tmp_path):
    several = [replace(example, doc_ids=(example.doc_ids[0], "d4")) for example in DATASET.test]
    comparison = Comparison(replace(DATASET, test=several), config, store=FeatureStore())
    row = comparison.add_retriever("federated head", trained)
    comparison.write_trec(tmp_path)
    qrels = list(ir_measures.read_trec_qrels(str(tmp_path / "qrels.txt")))
    run = ir_measures.read_trec_run(str(tmp_path / "federated-head.run"))
    theirs = ir_measures.calc_aggregate(list(MEASURES.values()), qrels, run)
    assert {name: row.metrics[name].value for name in MEASURES} == pytest.approx(
        {name: theirs[measure] for name, measure in MEASURES.items()}
    )


def test_a_folder_that_cannot_be_made_is_refused(everybody, tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(StorageError, match="file"):
        everybody.write_trec(tmp_path / "file" / "trec")
