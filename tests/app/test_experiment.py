"""A whole experiment on files: read, train, measure, save; and saved retrievers side by side."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from caravan.app.comparison import evaluate
from caravan.app.experiment import checkpoint_folder, compare_saved, run_experiment
from caravan.app.learning import train
from caravan.data.dataset import Dataset
from caravan.errors import DataError, StorageError
from caravan.storage import load, save
from caravan.training.features import FeatureStore
from command_line import write_table
from toy_experiments import DATASET, share_found
from toy_training import CATALOGUE, Log, assert_same_bits

RIVALS = ["BM25", "MIPS", "centroids", "1-NN", "output adapter", "random backbone"]
FILES = ["README.md", "adapter.safetensors", "config.json", "documents.jsonl", "head.safetensors", "training.json"]

pytestmark = pytest.mark.usefixtures("vectors_are_kept_here", "few_queries_are_timed")


@pytest.fixture(scope="module")
def central(place, tmp_path_factory):
    """A comparison with all rivals and the folder that was saved; no test changes it."""
    root = tmp_path_factory.mktemp("central")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARAVAN_CACHE", str(root / "cache"))
        comparison, retriever = run_experiment(place.config(evaluation={"baselines": True}), root / "central")
    return comparison, retriever, root / "central"


# From files to a folder


def test_an_experiment_measures_all_rivals_and_each_stage_and_saves_the_last(central):
    comparison, retriever, out = central
    assert [row.name for row in comparison.rows] == [*RIVALS, "head", "adapter"]
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert [path.name for path in out.parent.iterdir() if path.name != "cache"] == ["central"]  # no snapshots left
    assert_same_bits(load(out).trainable_state(), retriever.trainable_state())
    assert comparison.rows[-1].seconds >= comparison.rows[-2].seconds > 0


def test_the_saved_measures_are_those_of_the_loaded_retriever(central, place):
    comparison, _, out = central
    record = json.loads((out / "training.json").read_text(encoding="utf-8"))
    dataset = Dataset.from_config(place.config().data, seed=13)
    again = evaluate(load(out), dataset, bootstrap=20, seed=13)
    assert record["metrics"]["adapter"]["metrics"] == {name: asdict(estimate) for name, estimate in again.items()}
    assert record["metrics_split"] == "test"
    assert list(record["metrics"]) == [row.name for row in comparison.rows]
    assert again["recall@1"].value == pytest.approx(share_found(load(out), list(dataset.test)))
    assert again["recall@1"].value > record["metrics"]["MIPS"]["metrics"]["recall@1"]["value"]
    assert list(record["latency"]) == ["encode_ms", "search_ms", "search_p95_ms"]


def test_the_heads_row_is_that_of_a_training_of_the_head_alone(central, place, tmp_path):
    lean, _ = run_experiment(place.config(mode="head"), tmp_path / "head")
    assert [row.name for row in lean.rows] == ["head"]
    head = next(row for row in central[0].rows if row.name == "head")
    assert lean.rows[0].metrics == head.metrics


def test_clients_are_named_in_the_rows(place, tmp_path):
    sites = {"partition": "column", "column": "site", "rounds": 2}
    comparison, retriever = run_experiment(place.config(federation=sites), tmp_path / "sites")
    assert [row.name for row in comparison.rows] == ["federated head", "federated adapter"]
    assert [each["name"] for each in retriever.record["federation"]["clients"]] == ["east", "north", "west"]
    saved = json.loads((tmp_path / "sites" / "training.json").read_text(encoding="utf-8"))
    assert saved == json.loads(json.dumps(retriever.record))
    assert not checkpoint_folder(tmp_path / "sites").exists()


def test_without_test_queries_the_validation_split_is_measured(place, tmp_path):
    shutil.copytree(place.data, tmp_path / "data", ignore=shutil.ignore_patterns("test.csv"))
    comparison, _ = run_experiment(place.config(path=tmp_path / "data", mode="head"), tmp_path / "out")
    assert (comparison.split, len(comparison.examples)) == ("validation", 20)


def test_without_held_out_queries_nothing_is_measured_but_all_is_saved(place, tmp_path):
    shutil.copytree(place.data, tmp_path / "data", ignore=shutil.ignore_patterns("test.csv", "validation.csv"))
    config = place.config(path=tmp_path / "data", validation_fraction=0, mode="head", evaluation={"baselines": True})
    comparison, retriever = run_experiment(config, tmp_path / "out")
    assert comparison is None
    assert "metrics" not in retriever.record
    assert load(tmp_path / "out").record["dataset"]["validation"] == 0
    assert_same_bits(load(tmp_path / "out").trainable_state(), retriever.trainable_state())


def test_the_experiment_is_the_public_training_and_its_measures(place, tmp_path):
    config = place.config(mode="head")
    _, retriever = run_experiment(config, tmp_path / "out")
    dataset = Dataset.from_config(config.data, seed=config.seed)
    assert_same_bits(train(dataset, config).trainable_state(), retriever.trainable_state())


@pytest.mark.parametrize("kind", ["file", "folder of something else", "read-only"])
def test_a_place_that_cannot_be_saved_to_is_refused_before_any_work(place, tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine", encoding="utf-8")
    elif kind == "read-only":
        out = Path("/proc/out")  # even root cannot write there
    else:
        out.mkdir()
        (out / "thesis.tex").write_text("mine", encoding="utf-8")
    log = Log()
    with pytest.raises(StorageError, match="out: ") as caught:
        run_experiment(place.config(path="nowhere"), out, report=log)  # even before the data is looked at
    assert "\n" not in str(caught.value)
    assert log.told == []
    assert not checkpoint_folder(out).exists()


def test_a_second_experiment_replaces_the_first_and_keeps_what_is_not_its(place, tmp_path):
    config = place.config(mode="head", epochs=1)
    run_experiment(config, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine", encoding="utf-8")
    run_experiment(replace(config, seed=14), tmp_path / "out")
    assert load(tmp_path / "out").record["seed"] == 14
    assert (tmp_path / "out" / "notes.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("out", "expected"), [("a/b", "a/b.checkpoint"), ("a/b/", "a/b.checkpoint"), (".", "+.checkpoint")]
)
def test_snapshots_lie_beside_the_folder(tmp_path, monkeypatch, out, expected):
    monkeypatch.chdir(tmp_path)
    place = tmp_path.parent / f"{tmp_path.name}.checkpoint" if expected[0] == "+" else tmp_path / expected
    assert checkpoint_folder(out) == place


# Saved retrievers side by side


@pytest.fixture(scope="module")
def sites(place, tmp_path_factory):
    root = tmp_path_factory.mktemp("sites")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARAVAN_CACHE", str(root / "cache"))
        clients = {"partition": "column", "column": "site", "rounds": 2}
        run_experiment(place.config(mode="head", federation=clients), root / "central")  # the name of the other one
        shutil.copytree(root / "central", root / "sites")
    return root


def test_two_saved_retrievers_are_measured_on_the_same_queries(central, sites):
    comparison, latency = compare_saved([str(central[2]), str(sites / "sites")], None)
    assert [row.name for row in comparison.rows] == [*RIVALS, "central", "sites"]  # as the first one's record says
    assert comparison.split == "test"
    measured = {row.name: row.metrics for row in central[0].rows}
    for row in comparison.rows[:-1]:
        assert row.metrics == measured["adapter" if row.name == "central" else row.name]
    record = load(sites / "sites").record
    assert asdict(comparison.rows[-1].metrics["mrr@10"]) == record["metrics"]["federated head"]["metrics"]["mrr@10"]
    assert comparison.rows[-1].seconds >= record["seconds"]
    assert list(latency) == ["encode_ms", "search_ms", "search_p95_ms"]


def test_rivals_are_measured_or_not_as_asked(central, sites):
    comparison, _ = compare_saved([str(central[2])], None, baselines=False)
    assert [row.name for row in comparison.rows] == ["central"]
    changes = {"evaluation.random_backbone": False, "evaluation.bootstrap": 0}
    comparison, _ = compare_saved([str(sites / "sites")], None, changes, baselines=True)
    assert [row.name for row in comparison.rows] == [*RIVALS[:-1], "sites"]
    assert comparison.rows[0].metrics["recall@1"].low is None


def test_two_of_one_name_are_told_apart_by_their_paths(central, sites):
    folders = [str(central[2]), str(sites / "central")]
    comparison, _ = compare_saved(folders, None, baselines=False)
    assert [row.name for row in comparison.rows] == folders


def test_retrievers_on_one_frozen_model_share_it(central, sites, monkeypatch):
    measured = []
    monkeypatch.setattr(
        "caravan.app.experiment.Comparison.add_retriever",
        lambda self, name, retriever, **options: measured.append(retriever.encoder.backbone),
    )
    compare_saved([str(central[2]), str(sites / "sites")], None, baselines=False)
    assert measured[0] is measured[1]


def test_a_retriever_saved_without_any_record_is_compared_on_given_data(place, tmp_path):
    retriever = train(DATASET, place.config(mode="head", epochs=1))
    retriever.record = {}
    save(retriever, tmp_path / "bare")
    changes = {"evaluation.bootstrap": 0}
    comparison, _ = compare_saved([str(tmp_path / "bare")], str(place.data), changes, baselines=False)
    found = comparison.rows[0].metrics["recall@1"].value
    assert found == pytest.approx(share_found(retriever, DATASET.test))


def test_other_data_is_read_without_the_files_named_for_the_training_data(place, central, tmp_path):
    config = place.config(mode="head", epochs=1)
    named = replace(config.data, test=str(place.data / "validation.csv"))
    run_experiment(replace(config, data=named), tmp_path / "named")
    comparison, _ = compare_saved([str(tmp_path / "named")], None)
    assert [example.text for example in comparison.examples] == [example.text for example in DATASET.validation]
    comparison, _ = compare_saved([str(tmp_path / "named")], str(place.data))
    assert [example.text for example in comparison.examples] == [example.text for example in DATASET.test]


def test_retrievers_of_other_documents_are_refused_before_anything_is_measured(place, central, tmp_path):
    shutil.copytree(place.data, tmp_path / "other")
    write_table(tmp_path / "other" / "documents.csv", ("doc_id", "text"), [(name, "z") for name in CATALOGUE.ids])
    run_experiment(place.config(path=tmp_path / "other", mode="head", epochs=1), tmp_path / "stranger")
    log = Log()
    with pytest.raises(DataError, match="stranger was trained on other documents than those of letters"):
        compare_saved([str(central[2]), str(tmp_path / "stranger")], None, report=log)
    assert log.told == []
    with pytest.raises(DataError, match="central was trained on other documents than those of other"):
        compare_saved([str(central[2])], str(tmp_path / "other"))


def test_a_folder_that_is_no_retriever_is_refused(central, place, tmp_path):
    for folder in (place.data, tmp_path / "nowhere"):
        with pytest.raises(StorageError, match=folder.name) as caught:
            compare_saved([str(central[2]), str(folder)], None)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [["head"], "head", {"data": 3}, {"seed": 1}])
def test_a_record_whose_settings_are_none_is_refused(central, tmp_path, wrong):
    shutil.copytree(central[2], tmp_path / "changed")
    record = json.loads((tmp_path / "changed" / "training.json").read_text(encoding="utf-8"))
    (tmp_path / "changed" / "training.json").write_text(json.dumps({**record, "config": wrong}), encoding="utf-8")
    with pytest.raises(StorageError, match=r"training\.json: config holds no settings"):
        compare_saved([str(tmp_path / "changed")], None)


def test_vectors_are_kept_where_the_environment_says(place, tmp_path, monkeypatch):
    monkeypatch.setenv("CARAVAN_CACHE", str(tmp_path / "mine"))
    run_experiment(place.config(mode="head", epochs=1), tmp_path / "out")
    assert [path.suffix for path in (tmp_path / "mine").iterdir()] == [".sqlite"]
    encoded = []
    original = FeatureStore.encode
    monkeypatch.setattr(
        FeatureStore,
        "encode",
        lambda self, encoder, texts, **options: (
            encoded.append(self.folder),
            original(self, encoder, texts, **options),
        )[1],
    )
    run_experiment(place.config(mode="head", epochs=1), tmp_path / "again")
    assert set(encoded) == {tmp_path / "mine"}
