"""Each experiment from a tiny corpus to its tables: verdicts follow from figures, every row is in the report."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from caravan.app.reproduction import learning_rate, retrieval_claims, runner, spam
from caravan.app.reproduction.findings import Findings
from caravan.app.reproduction.frame import read_results
from caravan.app.reproduction.runner import Request, reproduce
from caravan.config import BackboneConfig
from caravan.data.dataset import Dataset
from caravan.data.records import Example
from caravan.errors import TrainingError
from command_line import check_refused, run, write_table
from tiny_models import make_tiny_bert, make_tiny_llama
from toy_experiments import toy_dataset
from toy_training import CATALOGUE

_TINY = {
    "retrieval": {
        **{"datasets": ["letters", "sms_spam"], "max_tokens": 24, "small_models": ["llama"], "classes": 4},
        **{"train": 40, "test": 20, "adapter_train": 30, "head_epochs": 2, "protocol_epochs": 1},
        **{"adapter_epochs": {"letters": 1, "sms_spam": 1}, "prompts": [["a b", "f g"], ["h", "s"]]},
    },
    "pooling": {"datasets": ["letters"], "models": ["llama"], "head_epochs": 2, "train": 40, "test": 20},
    "learning-rate": {
        **{"datasets": ["letters"], "head_rates": [1e-3, 1e-1], "adapter_rates": [1e-3], "train": 40},
        **{"head_epochs": 2, "passages": 0},
    },
    "scale": {"datasets": ["letters"], "models": ["llama"], "head_epochs": 2, "train": 40, "test": 20},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Request:
    """A request for the quick form on two data sets of letters, one of which is called SMS spam."""
    root = tmp_path_factory.mktemp("tiny")
    dataset = toy_dataset(60, test=30)
    documents = [(document.doc_id, document.text) for document in CATALOGUE]
    labels = {"d0": "ham", "d1": "ham", "d2": "ham", "d3": "spam"}
    for name in ("letters", "sms_spam"):
        for split in ("train", "test"):
            rows = [(example.text, example.doc_ids[0]) for example in getattr(dataset, split)]
            rows = [(text, labels[gold] if name == "sms_spam" else gold) for text, gold in rows]
            write_table(root / "data" / name / f"{split}.csv", ("text", "label"), rows)
    write_table(root / "data" / "letters" / "documents.csv", ("doc_id", "text"), documents)
    short = [("ham", "a b c d e"), ("spam", "p q r s t")]
    write_table(root / "data" / "sms_spam" / "documents.csv", ("doc_id", "text"), short)
    make_tiny_llama(root / "models" / "llama")
    backbone = BackboneConfig(name=str(make_tiny_bert(root / "bert")), max_tokens=24)
    return Request(out=root / "out", quick=True, data=root / "data", models=root / "models", backbone=backbone)


@pytest.fixture(scope="module")
def chapters(tiny: Request) -> dict:
    found = {}
    for name, changes in _TINY.items():
        (found[name],) = reproduce([name], replace(tiny, changes=changes))
    return found


@pytest.mark.parametrize("name", _TINY)
def test_an_experiment_runs_from_a_tiny_corpus_to_its_files(name, tiny, chapters):
    folder = tiny.out / name
    findings: Findings = chapters[name].findings
    assert findings.claims
    assert findings.charts
    for table in findings.tables:
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.columns)}
    for chart in findings.charts:
        assert (folder / f"{chart.name}.png").stat().st_size > 1000
        assert (folder / f"{chart.name}.svg").read_text(encoding="utf-8").count("<svg") == 1
    text = (folder / "table.md").read_text(encoding="utf-8")
    assert chapters[name].results["command"] in text
    assert "letters: " in text
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["machine"]["torch"]
    assert results["settings"]["train"] == 40


@pytest.mark.parametrize("name", _TINY)
def test_running_again_measures_nothing_and_finds_the_same(name, tiny, chapters, monkeypatch):
    before = read_results(tiny.out / name)

    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr("caravan.app.reproduction.trials.Experiment", refuse)
    (again,) = reproduce([name], replace(tiny, changes=_TINY[name]))
    assert again.findings == chapters[name].findings
    assert read_results(tiny.out / name)["measures"] == before["measures"]


def test_the_report_holds_every_row_claims_first_and_needs_no_other_file(tiny, chapters):
    page = (tiny.out / "report.html").read_text(encoding="utf-8")
    markdown = (tiny.out / "report.md").read_text(encoding="utf-8")
    assert page.index("The paper&#x27;s claims") < page.index("<section")
    assert "http" not in page.replace("http://www.w3.org", "")  # nothing is fetched
    assert page.count("data:image/svg+xml;base64,") == sum(len(each.findings.charts) for each in chapters.values())
    for chapter in chapters.values():
        for claim in chapter.findings.claims:
            assert claim.paper in markdown
            assert f'class="{claim.verdict.replace(" ", "-")}"' in page
        for table in chapter.findings.tables:
            for row in table.rows:
                line = f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
                assert " ".join(line.split()) in markdown.replace("  ", " ")


def test_retrieval_has_every_method_and_the_seconds_of_those_that_are_trained(chapters):
    main = chapters["retrieval"].findings.tables[0]
    methods = [row[1] for row in main.rows if row[0].startswith("letters")]
    assert methods == [
        *("MIPS", "centroid", "1-NN", "classifier alone", "classifier alone, 30 queries", "adapter + classifier"),
    ]
    assert [row[2] for row in main.rows if row[0].startswith("sms_spam")] == ["12.36", "-", "-", "97.02", "-", "99.95"]
    assert all((row[-1] == "-") == ("classifier" not in row[1]) for row in main.rows)


def test_the_protocols_rank_what_they_say(chapters):
    table = chapters["retrieval"].findings.tables[3]
    seen = {row[0]: (row[1], row[2]) for row in table.rows}
    assert seen["held out"] == ("30", "0")
    assert seen["the training set"] == ("30", "30")


@pytest.mark.parametrize(
    ("percent", "queries", "hits"),
    [(50.0, 4, 2), (33.33, 3, 1), (66.67, 3, 2), (12.36, 5574, 689), (99.95, 5574, 5571), (99.95, 1115, None)],
)
def test_a_share_is_reached_by_a_whole_number_of_hits_or_by_none(percent, queries, hits):
    assert spam.hits_for(percent, queries) == hits


def test_the_chance_of_so_many_spam_messages_is_the_hypergeometric_one():
    messages = [Example("a", ("spam",)), Example("b", ("spam",)), Example("c", ("ham",)), Example("d", ("ham",))]
    assert spam.share(messages) == 50
    # Of the 6 pairs one is both spam, four have one, one has none.
    assert [spam.chance_of(count, 2, messages) for count in (0, 1, 2)] == pytest.approx([1 / 6, 4 / 6, 1 / 6])


def test_a_text_that_comes_twice_is_counted_once():
    messages = [Example("a", ("ham",), "1"), Example("b", ("spam",), "2"), Example("a", ("ham",), "3")]
    assert [message.query_id for message in spam.distinct(messages)] == ["1", "2"]


def test_a_random_split_deals_every_message_once_and_keeps_repeats():
    messages = [Example(f"text {number % 7}", ("ham",), str(number)) for number in range(20)]
    whole = Dataset("sms_spam", CATALOGUE, messages[:15], (), messages[15:])
    split = spam.split_for("repeats across the split", whole, 1)
    assert sorted(int(one.query_id) for one in (*split.train, *split.test)) == list(range(20))
    assert len(split.test) == 4
    assert spam.split_for("held out", whole, 1) is whole


def _outcome(recall: float, seconds: float = 1.0) -> dict:
    found = {"value": recall, "low": recall - 0.01, "high": recall + 0.01}
    return {"recall@1": found, "seconds": seconds, "data": "letters: 5 documents, 40 train, 20 test"}


@pytest.mark.parametrize(
    ("mips", "head", "adapter", "seconds", "order", "time"),
    [
        (0.5, 0.8, 0.9, 600.0, "confirmed", "confirmed"),
        (0.5, 0.8, 0.7, 600.0, "not confirmed", "confirmed"),
        (0.9, 0.8, 0.95, 600.0, "not confirmed", "confirmed"),
        (0.5, 0.8, 0.9, 40.0, "confirmed", "not confirmed"),
    ],
)
def test_verdicts_follow_from_the_figures(tiny, mips, head, adapter, seconds, order, time):
    found = {
        ("letters", "MIPS"): [_outcome(mips)],
        ("letters", "classifier alone"): [_outcome(head, 10.0)],
        ("letters", "adapter + classifier"): [_outcome(adapter, seconds)],
    }
    bench = runner.prepare("retrieval", replace(tiny, quick=False))
    claims = {claim.says.split()[0]: claim for claim in retrieval_claims.claims(bench, found, None)}
    assert claims["MIPS"].verdict == order
    assert claims["Training"].verdict == time
    assert claims["SMS"].verdict == "not testable here"
    assert claims["arXiv"].verdict == "not testable here"


def test_good_rates_are_those_around_the_best_without_a_gap():
    recalls = {1e-4: 0.90, 1e-3: 0.70, 1e-2: 0.898, 1e-1: 0.90, 1.0: 0.893}
    sweep = {rate: [_outcome(recall)] for rate, recall in recalls.items()}
    assert learning_rate.good_rates(sweep, 0.5) == [1e-4]  # the smallest of equals; behind a gap nothing counts
    sweep[1e-1] = [_outcome(0.91)]
    assert learning_rate.good_rates(sweep, 0.5) == [1e-1]
    assert learning_rate.good_rates(sweep, 1.5) == [1e-2, 1e-1]
    assert learning_rate.good_rates(sweep, 2.0) == [1e-2, 1e-1, 1.0]


@pytest.mark.parametrize(("chosen", "says"), [(0.899, "confirmed"), (0.897, "not confirmed")])
def test_the_automatic_rate_is_held_against_the_best_of_the_sweep(tiny, tmp_path, monkeypatch, chosen, says):
    recalls = {1e-3: 0.9, 1e-1: 0.8, "auto": chosen}
    monkeypatch.setattr(learning_rate, "_measured", lambda bench, dataset, mode, rate, seed: _outcome(recalls[rate]))
    changes = {**_TINY["learning-rate"], "modes": ["head"], "automatic": True}
    (chapter,) = reproduce(["learning-rate"], replace(tiny, out=tmp_path, changes=changes))
    (claim,) = chapter.findings.claims
    assert claim.verdict == says
    assert claim.ours.startswith(f"{100 * (0.9 - chosen):.2f} points behind")
    row = dict(zip(chapter.findings.tables[0].columns, chapter.findings.tables[0].rows[0], strict=True))
    assert row["recall@1 % at automatic"] == f"{100 * chosen:.2f}"
    assert row["best rate"] == "0.001"


def test_a_training_that_diverges_counts_as_nothing_found(tiny, monkeypatch, tmp_path):
    def diverged(*_, **__):
        raise TrainingError("the loss is nan")

    monkeypatch.setattr(learning_rate, "train", diverged)
    changes = {**_TINY["learning-rate"], "modes": ["head"]}
    (chapter,) = reproduce(["learning-rate"], replace(tiny, out=tmp_path, changes=changes))
    assert chapter.findings.tables[0].rows[0][4] == "0.00"


def test_the_report_does_without_a_picture_that_is_gone(tiny, tmp_path):
    changes = {**_TINY["learning-rate"], "modes": ["head"]}
    reproduce(["learning-rate"], replace(tiny, out=tmp_path, changes=changes))
    (tmp_path / "learning-rate" / "letters-head.svg").unlink()
    runner.write_report(tmp_path)
    assert "no picture (No such file or directory)" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_chart_that_is_no_longer_drawn_is_removed(tiny, tmp_path):
    changes = {**_TINY["learning-rate"], "modes": ["head"]}
    reproduce(["learning-rate"], replace(tiny, out=tmp_path, changes=changes))
    (tmp_path / "learning-rate" / "mine.png").touch()
    reproduce(["learning-rate"], replace(tiny, out=tmp_path, changes={**changes, "datasets": ["sms_spam"]}))
    names = sorted(path.name for path in (tmp_path / "learning-rate").iterdir())
    assert names == ["mine.png", "results.json", "sms-spam-head.png", "sms-spam-head.svg", "table.md"]


def test_without_any_data_the_bundled_corpus_is_used(tiny, tmp_path):
    changes = {"models": [], "head_epochs": 1, "train": 20, "test": 10, "classes": 3, "poolings": ["mean", "last"]}
    (chapter,) = reproduce(["pooling"], replace(tiny, out=tmp_path, data=None, changes=changes))
    assert [row[0] for row in chapter.findings.tables[0].rows] == 2 * ["helpdesk: 3 documents, 20 train, 10 test"]
    assert any("bundled corpus" in note for note in chapter.findings.notes)


def _command(tiny: Request, out: Path, *more: object):
    changes = [f"--set={key}={json.dumps(value)}" for key, value in _TINY["pooling"].items()]
    where = ["--data", tiny.data, "--backbone", tiny.backbone.name, "--out", out]
    return run("reproduce", "pooling", "--quick", *where, *changes, *more)


def test_the_command_says_verdicts_and_where_the_report_lies(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("CARAVAN_MODELS", str(tiny.models))
    outcome = _command(tiny, tmp_path)
    assert outcome.code == 0, outcome.err
    assert "confirmed: The state of the end-of-sequence token" in outcome.out
    assert outcome.out.endswith(f"All figures: {tmp_path / 'report.html'}\n")
    (tmp_path / "report.html").unlink()
    again = run("reproduce", "report", "--out", tmp_path, "--json")
    assert list(json.loads(again.out)["experiments"]) == ["pooling"]
    assert (tmp_path / "report.html").is_file()


def test_ctrl_c_keeps_what_was_measured_and_the_same_command_goes_on(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("CARAVAN_MODELS", str(tiny.models))
    with monkeypatch.context() as patch:
        done = []

        def stop_at_the_third(*arguments, **options):
            done.append(1)
            if len(done) == 3:
                raise KeyboardInterrupt
            return train(*arguments, **options)

        from caravan.app.reproduction import pooling

        train = pooling.train
        patch.setattr(pooling, "train", stop_at_the_third)
        stopped = _command(tiny, tmp_path)
    assert stopped.code == 130
    assert "Traceback" not in stopped.err
    kept = read_results(tmp_path / "pooling")["measures"]
    assert sum("/seed 1 " in key for key in kept) == 2
    assert _command(tiny, tmp_path).code == 0
    after = read_results(tmp_path / "pooling")["measures"]
    assert {key: after[key] for key in kept} == kept
    assert sum("/seed 1 " in key for key in after) == 6


def test_wrong_names_settings_seeds_and_folders_are_told_in_one_line(tiny, tmp_path):
    check_refused(run("reproduce", "poling", "--out", tmp_path), "no experiment is called poling", "pooling")
    check_refused(run("reproduce", "scale", "--set", "x=1", "--out", tmp_path), "--set x", "head_epochs")
    unknown = ["--data", tiny.data, "--set", 'datasets=["letters"]', "--out", tmp_path]
    check_refused(run("reproduce", "retrieval", "--quick", *unknown), "adapter_epochs says nothing of letters")
    check_refused(run("reproduce", "scale", "--data", tmp_path / "no", "--out", tmp_path), "no such folder")
    check_refused(run("reproduce", "report", "--out", tmp_path), "no experiment was run")
    check_refused(run("reproduce", "scale", "--seeds", "one", "--out", tmp_path), "whole numbers", code=2)
    check_refused(run("reproduce", "all", "--set", "seeds=[1]", "--out", tmp_path), "several are named")
    check_refused(run("reproduce", "scale", "--out", tiny.data / "letters" / "train.csv"), "train.csv")
