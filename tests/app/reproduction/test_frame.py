"""Measurements are made once and kept whole; settings, data and names that do not exist are told in one line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from caravan.app.charts import Chart, Mark, Series
from caravan.app.reproduction.findings import Claim, Findings, Table, verdict
from caravan.app.reproduction.frame import Bench, counts, read_settings
from caravan.app.reproduction.parts import first_classes, part_of, some
from caravan.app.reproduction.runner import EXPERIMENTS, Request, named, prepare
from caravan.config import BackboneConfig
from caravan.errors import ConfigError, StorageError
from caravan.training.progress import Progress
from toy_experiments import DATASET


def make_bench(folder: Path, **changes) -> Bench:
    facts = {
        "name": "toy",
        "folder": folder / "toy",
        "settings": {"epochs": 2},
        "quick": True,
        "data": None,
        "models": None,
        "backbone": BackboneConfig(),
        "seeds": (1,),
        "command": "caravan reproduce toy",
    }
    return Bench(**{**facts, **changes})


class Work:
    """Counts how often it is done."""

    def __init__(self, value: float = 0.5) -> None:
        self.done, self.value = 0, value

    def __call__(self) -> dict:
        self.done += 1
        return {"recall": self.value, "pair": (1, 2)}


def test_what_is_measured_is_not_measured_again(tmp_path):
    work = Work()
    first = make_bench(tmp_path).measure("a", work)
    again = make_bench(tmp_path).measure("a", work)
    assert work.done == 1
    assert first == again
    assert first["recall"] == 0.5
    assert first["seconds"] >= 0
    assert first["pair"] == [1, 2]  # the first answer is already as the file will give it back


def test_another_key_setting_or_backbone_is_measured_anew_and_the_old_stays_on_any_device(tmp_path):
    bench, work = make_bench(tmp_path), Work()
    bench.measure("a", work)
    bench.measure("b", work)
    replace(bench, settings={"epochs": 3}).measure("a", work)
    replace(bench, backbone=BackboneConfig(name="other")).measure("a", work)
    assert work.done == 4
    bench.measure("a", work)
    replace(bench, backbone=BackboneConfig(device="cuda")).measure("a", work)
    assert work.done == 4
    assert len(bench.results()["measures"]) == 4


def test_only_what_is_said_to_matter_matters(tmp_path):
    bench, work = make_bench(tmp_path), Work()
    bench.measure("a", work, matters={"rate": 1.0})
    replace(bench, settings={"epochs": 9}).measure("a", work, matters={"rate": 1.0})
    assert work.done == 1
    bench.measure("a", work, matters={"rate": 2.0})
    assert work.done == 2


def test_an_interrupted_measurement_leaves_the_earlier_ones_whole(tmp_path):
    bench = make_bench(tmp_path)
    bench.measure("a", Work(0.25))
    before = (bench.folder / "results.json").read_bytes()

    def stopped() -> dict:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.measure("b", stopped)
    assert (bench.folder / "results.json").read_bytes() == before
    assert [path.name for path in bench.folder.iterdir()] == ["results.json"]
    assert bench.measure("a", stopped)["recall"] == 0.25


def test_a_kill_in_the_middle_of_writing_leaves_the_old_file(tmp_path, monkeypatch):
    bench = make_bench(tmp_path)
    bench.measure("a", Work())

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            bench.measure("b", Work())
    assert [key.split(" #")[0] for key in bench.results()["measures"]] == ["a"]


def test_each_measurement_names_the_machine_it_was_made_on(tmp_path, monkeypatch):
    bench = make_bench(tmp_path)
    bench.measure("a", Work())
    monkeypatch.setattr("caravan.app.reproduction.frame._processor", lambda: "another")
    bench.measure("b", Work())
    results = bench.results()
    assert [entry["machine"] for entry in results["measures"].values()] == [0, 1]
    assert results["machines"][1]["processor"] == "another"
    assert results["machines"][0]["processor"] != "another"


@pytest.mark.parametrize("content", ["{", "[]", '{"machines": 1, "measures": {}}', "\xff"])
def test_damaged_results_are_told_and_not_overwritten(tmp_path, content):
    bench = make_bench(tmp_path)
    bench.folder.mkdir()
    path = bench.folder / "results.json"
    path.write_text(content, encoding="latin-1")
    work = Work()
    with pytest.raises(StorageError, match="not as caravan writes it"):
        bench.measure("a", work)
    assert work.done == 0
    assert path.read_text(encoding="latin-1") == content


@pytest.mark.parametrize(
    ("holds", "says"), [(True, "confirmed"), (False, "not confirmed"), (None, "not testable here")]
)
def test_a_verdict_follows_from_what_holds(holds, says):
    assert verdict(holds) == says


def test_findings_come_back_from_json_as_they_were(tmp_path):
    claim = Claim(says="s", paper="p", ours="o", verdict="confirmed", reason="r")
    series = [Series(name="ours", x=["a", "b"], y=[1.0, None], low=[0.5, None], high=[1.5, None])]
    labels = {"x_label": "x", "y_label": "y"}
    chart = Chart(name="c", title="t", kind="bar", series=series, paper=[Mark(name="m", y=2.0)], **labels)
    limited = replace(chart, y_limits=(0, 1))
    table = Table(title="t", columns=["a"], rows=[["1"]])
    findings = Findings(claims=[claim], tables=[table], charts=[chart, limited], notes=["n"])
    bench = make_bench(tmp_path)
    bench.measure("a", Work())
    bench.keep(findings)
    kept = json.loads((bench.folder / "results.json").read_text())
    assert Findings.from_dict(kept["findings"]) == findings
    assert kept["command"] == "caravan reproduce toy"
    assert kept["machine"]["torch"]
    assert list(kept["measures"]) == list(bench.results()["measures"])


def test_absent_data_sets_are_left_out_with_the_reason_and_the_bundled_corpus_takes_their_place(tmp_path):
    (tmp_path / "data" / "here").mkdir(parents=True)
    bench = make_bench(tmp_path, data=tmp_path / "data")
    assert bench.present(["here", "absent"]) == ["here"]
    assert bench.notes == ["Without absent: not there."]
    alone = make_bench(tmp_path)
    assert alone.present(["here"]) == ["helpdesk"]
    assert "no folder of data sets" in alone.notes[0]
    assert "helpdesk" in alone.notes[1]
    alone.present(["here"])
    assert len(alone.notes) == 2  # said once


def test_absent_small_models_are_left_out_with_the_reason(tmp_path):
    (tmp_path / "tiny").mkdir()
    bench = make_bench(tmp_path, models=tmp_path)
    assert bench.small_models(["tiny", "absent"]) == [str(tmp_path / "tiny")]
    assert "absent" in bench.notes[0]


def test_a_part_keeps_the_first_documents_and_the_queries_they_alone_answer():
    part = first_classes(DATASET, 2)
    assert list(part.catalogue.ids) == ["d0", "d1"]
    expected = [example for example in DATASET.train if example.doc_ids[0] in ("d0", "d1")]
    assert list(part.train) == expected
    assert 0 < len(expected) < len(DATASET.train)
    assert {example.doc_ids[0] for example in part.test} == {"d0", "d1"}


def test_a_draw_keeps_the_order_and_follows_the_seed():
    drawn = some(DATASET.train, 10, 1)
    places = [DATASET.train.index(example) for example in drawn]
    assert places == sorted(set(places))
    assert len(places) == 10
    assert some(DATASET.train, 10, 1) == drawn
    assert some(DATASET.train, 10, 2) != drawn
    assert some(DATASET.train, 1000, 1) is DATASET.train


def test_a_sweep_says_what_it_is_about_and_does_not_warn_of_its_own_rates(tmp_path):
    told = []
    bench = make_bench(tmp_path, report=told.append)
    bench.telling("rate 10")(Progress("training the head", 1, 2, warning="the rate is too high"))
    assert [(progress.task, progress.done, progress.warning) for progress in told] == [
        (f"{bench.name}, rate 10: training the head", 1, None)
    ]
    assert make_bench(tmp_path, report=None).telling("rate 10") is None


def test_counts_say_how_much_of_what_was_used():
    assert counts(part_of(DATASET, train=7, test=3)) == "letters: 5 documents, 7 train, 3 test"


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("quick", [False, True])
def test_every_experiment_ships_its_settings(name, quick):
    settings = read_settings(name, quick=quick)
    assert settings["seeds"]
    if quick:
        full = read_settings(name, quick=False)
        assert full != settings
        assert set(full) <= set(settings)


def test_all_means_every_experiment_and_each_is_run_once():
    assert named(["all", "pooling"]) == list(EXPERIMENTS)
    assert named(["scale", "pooling", "scale"]) == ["pooling", "scale"]


def test_an_unknown_experiment_or_setting_is_told_with_those_there_are(tmp_path):
    with pytest.raises(ConfigError, match=r"no experiment is called poling; give some of .*pooling"):
        named(["poling"])
    with pytest.raises(ConfigError, match=r"--set epoch: pooling has no such setting; give one of .*head_epochs"):
        prepare("pooling", Request(out=tmp_path, changes={"epoch": 3}))


@pytest.mark.parametrize("value", ["many", True, 2.5, [3]])
def test_a_setting_of_another_kind_is_refused(tmp_path, value):
    with pytest.raises(ConfigError, match=r"--set head_epochs=.*: pooling needs a value like 30"):
        prepare("pooling", Request(out=tmp_path, changes={"head_epochs": value}))


def test_a_whole_number_will_do_for_a_fraction(tmp_path):
    assert prepare("learning-rate", Request(out=tmp_path, changes={"within": 1})).settings["within"] == 1


def test_the_command_of_a_chapter_repeats_the_request(tmp_path):
    request = Request(
        out=tmp_path,
        quick=True,
        seeds=[1, 2],
        backbone=BackboneConfig(name="m", device="cuda"),
        changes={"test": 5},
    )
    assert prepare("pooling", request).command == (
        f"caravan reproduce pooling --quick --backbone m --device cuda --seeds 1,2 --set test=5 --out {tmp_path}"
    )
