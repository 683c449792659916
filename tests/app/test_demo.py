"""The demonstration on a tiny backbone: all that `make demo` shows, checked by computing it again."""

from dataclasses import replace

import pytest
import torch

from caravan.app.demo import run_demo
from caravan.config import DataConfig, EvaluationConfig, FederationConfig, HeadConfig
from caravan.data.dataset import Dataset
from caravan.errors import ConfigError, StorageError
from caravan.model.adapter import IdentityAdapter
from caravan.model.encoder import Encoder
from caravan.storage import load
from toy_experiments import toy_settings
from toy_training import Log

ROWS = ["BM25", "MIPS", "centroids", "1-NN", "output adapter", "head", "adapter", "federated adapter"]


@pytest.fixture(scope="module")
def helpdesk():
    """The bundled data set, cut down to forty documents so that a test can train on it."""
    whole = Dataset.read()
    kept = set(whole.catalogue.ids[:40])

    def some(examples):
        return [example for example in examples if set(example.doc_ids) <= kept]

    return replace(whole, train=some(whole.train), validation=some(whole.validation), test=some(whole.test))


@pytest.fixture(scope="module")
def demo(backbone, helpdesk, tmp_path_factory):
    """A demonstration and its folder; settings that are its own are set wrong."""
    root = tmp_path_factory.mktemp("demo")
    settings = toy_settings(backbone.config, epochs=1, batch_size=64, rate=0.02)
    config = replace(
        settings,
        training=replace(settings.training, adapter=replace(settings.training.adapter, epochs=9)),
        data=DataConfig(path="elsewhere", documents="nowhere.csv", test="nowhere.csv", text_column="question"),
        federation=FederationConfig(clients=3, rounds=1),
        evaluation=EvaluationConfig(baselines=False, random_backbone=True, bootstrap=20),
    )
    read = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARAVAN_CACHE", str(root / "cache"))
        patch.setattr(Dataset, "from_config", lambda config, *, seed: (read.append(config), helpdesk)[1])
        log = Log()
        result = run_demo(config, root / "out", report=log)
    assert read == [DataConfig(path="helpdesk")]
    return result, root / "out", log


def test_the_table_has_eight_rows_in_order(demo):
    result, _, _ = demo
    assert [row.name for row in result.comparison.rows] == ROWS
    assert result.comparison.split == "test"
    assert all(len(row.ranking.rows) == len(result.comparison.texts) for row in result.comparison.rows)
    assert all(row.seconds > 0 for row in result.comparison.rows)


def test_four_sites_train_the_federated_row(demo):
    tasks = {progress.task for progress in demo[2].told}
    clients = {task.split(", ")[1].split(":")[0] for task in tasks if task.startswith("four sites: round 1/1")}
    assert len(clients) == 4
    assert {"training the head", "training the adapter"} <= tasks
    assert "random backbone: training the head" not in tasks


def test_the_central_retriever_is_saved_with_the_whole_table(demo):
    result, out, _ = demo
    record = load(out).record
    assert list(record["metrics"]) == ROWS
    assert "federation" not in record
    assert record["config"]["data"]["path"] == "helpdesk"
    assert record["config"]["training"]["adapter"]["epochs"] == 2
    assert [epoch["stage"] for epoch in record["history"]] == ["head", "adapter", "adapter"]
    saved = record["metrics"]["adapter"]["metrics"]["mrr@10"]["value"]
    assert saved == result.comparison.rows[6].metrics["mrr@10"].value


def test_the_searches_shown_are_right_for_ours_and_wrong_for_mips(demo, backbone, helpdesk):
    result, out, _ = demo
    assert len(result.searches) == 3
    retriever, catalogue = load(out), helpdesk.catalogue
    encoder = Encoder(backbone, IdentityAdapter(backbone.embedding_width))
    documents = encoder.encode([document.content for document in catalogue])
    gold = {example.text: example.doc_ids for example in helpdesk.test}
    sure = []
    for search in result.searches:
        best = retriever.search(search.query, 1)[0]
        assert search.ours == best.doc_id
        assert search.ours in gold[search.query]
        assert search.ours_title == best.title
        other = catalogue.document(int((encoder.encode([search.query]) @ documents.T).argmax()))
        assert (search.mips, search.mips_title) == (other.doc_id, other.title)
        assert search.mips not in gold[search.query]
        sure.append(best.probability)
    assert sure == sorted(sure, reverse=True)


def test_queries_won_and_lost_are_counted_over_the_whole_test_split(demo, backbone, helpdesk):
    result, out, _ = demo
    encoder = Encoder(backbone, IdentityAdapter(backbone.embedding_width))
    documents = encoder.encode([document.content for document in helpdesk.catalogue])
    texts = [example.text for example in helpdesk.test]
    gold = torch.tensor([helpdesk.catalogue.row(example.doc_ids[0]) for example in helpdesk.test])
    theirs = (encoder.encode(texts) @ documents.T).argmax(dim=1) == gold
    hits = load(out).search(texts, 1)
    ours = torch.tensor([each[0].doc_id in example.doc_ids for each, example in zip(hits, helpdesk.test, strict=True)])
    assert result.won == int((ours & ~theirs).sum()) >= 3
    assert result.lost == int((theirs & ~ours).sum())
    rows = {row.name: row.metrics["recall@1"].value for row in result.comparison.rows}
    assert result.won - result.lost == pytest.approx((rows["adapter"] - rows["MIPS"]) * len(texts))


def test_what_was_found_is_told_as_plain_values(demo):
    result, _, _ = demo
    told = result.searches_dict()
    assert (told["won"], told["lost"]) == (result.won, result.lost)
    assert [example["query"] for example in told["examples"]] == [search.query for search in result.searches]
    assert set(told["examples"][0]) == {"query", "ours", "ours_title", "mips", "mips_title"}


def test_a_folder_of_something_else_is_refused_before_any_work(backbone, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine", encoding="utf-8")
    log = Log()
    with pytest.raises(StorageError, match="left alone"):
        run_demo(toy_settings(backbone.config), tmp_path / "out", report=log)
    assert log.told == []


def test_settings_that_sites_refuse_are_refused_before_any_training(backbone, helpdesk, tmp_path, monkeypatch):
    monkeypatch.setattr(Dataset, "from_config", lambda config, *, seed: helpdesk)
    config = replace(toy_settings(backbone.config), head=HeadConfig(start="centroids"))
    log = Log()
    with pytest.raises(ConfigError, match='"centroids" would pool'):
        run_demo(config, tmp_path / "out", report=log)
    assert log.steps == []
    assert not (tmp_path / "out").exists()
