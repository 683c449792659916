import json
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from caravan.app import report
from caravan.app.comparison import Comparison, Row
from caravan.config import Config, EvaluationConfig
from caravan.data.dataset import Dataset
from caravan.errors import ConfigError, StorageError
from caravan.training.evaluation import Estimate, Ranking
from caravan.training.features import FeatureStore
from command_line import listing
from toy_training import CATALOGUE, toy_examples

FILES = ["BM25.run", "a-b-c.run", "qrels.txt", "recall.png", "recall.svg", "results.json", "table.md"]


def row(name: str, value: float = 0.5, *, interval: bool = True, seconds: float = 1.26) -> Row:
    first = Estimate(value, value - 0.25, value + 0.25) if interval else Estimate(value)
    others = {column: Estimate(0.6254) for column in report.COLUMNS[1:]}
    return Row(name, {"recall@1": first, **others}, seconds, Ranking(np.zeros((1, 1)), np.zeros((1, 1))))


@pytest.fixture
def comparison() -> Comparison:
    """Two rows on three queries, whose golds are d0, d1, d2: BM25 finds the first only, the other one all."""
    queries = toy_examples(48)
    examples = [next(query for query in queries if query.doc_ids == (f"d{gold}",)) for gold in range(3)]
    dataset = Dataset("letters", CATALOGUE, tuple(queries), (), tuple(examples))
    config = Config(evaluation=EvaluationConfig(bootstrap=0))
    comparison = Comparison(dataset, config, store=FeatureStore())
    for name, rows in (("BM25", [[0, 1], [0, 2], [0, 1]]), ("a/b + c", [[0, 1], [1, 0], [2, 0]])):
        ranking = Ranking(np.array(rows), np.array([[2.0, 1.0]] * 3, dtype=np.float32))
        comparison.add_ranking(name, lambda ranking=ranking: ranking)
    return comparison


def test_a_row_shows_percent_with_the_interval_of_the_first_measure_and_seconds():
    assert report.cells(row("ours")) == ["ours", "50.0 [25.0, 75.0]", "62.5", "62.5", "62.5", "62.5", "1.3"]
    assert report.cells(row("ours", interval=False))[1] == "50.0"
    assert len(report.headings()) == len(report.cells(row("ours")))


def test_the_markdown_table_has_a_line_a_row_and_keeps_bars_in_names_inside_their_cell():
    assert report.markdown([row("a|b", interval=False)]).splitlines() == [
        "|  | R@1 % [95%] | R@5 | R@10 | MRR@10 | nDCG@10 | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        r"| a\|b | 50.0 | 62.5 | 62.5 | 62.5 | 62.5 | 1.3 |",
    ]


def test_a_report_holds_the_same_figures_in_every_form(comparison: Comparison, tmp_path: Path):
    report.write_report(tmp_path / "new" / "report", comparison, {"model": "ours"})
    folder = tmp_path / "new" / "report"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert (results["dataset"], results["split"], results["model"]) == ("letters", "test", "ours")
    recalls = {name: row["metrics"]["recall@1"]["value"] for name, row in results["rows"].items()}
    assert recalls == {"BM25": pytest.approx(1 / 3), "a/b + c": 1.0}
    table = (folder / "table.md").read_text(encoding="utf-8").splitlines()
    assert [line.split(" | ")[:2] for line in table[2:]] == [["| BM25", "33.3"], ["| a/b + c", "100.0"]]
    drawing = (folder / "recall.svg").read_text(encoding="utf-8")
    assert ">33.3</text>" in drawing
    assert ">letters, test split, 3 queries</text>" in drawing
    run = [line.split() for line in (folder / "a-b-c.run").read_text(encoding="utf-8").splitlines()]
    gold = [line.split() for line in (folder / "qrels.txt").read_text(encoding="utf-8").splitlines()]
    assert [line[2] for line in run if line[3] == "1"] == [line[2] for line in gold] == ["d0", "d1", "d2"]
    assert {line[0] for line in run} == {line[0] for line in gold}


def test_the_same_figures_give_the_same_drawing(comparison: Comparison, tmp_path: Path):
    for name in ("first", "second"):
        report.write_report(tmp_path / name, comparison, {})
    first, second = listing(tmp_path / "first"), listing(tmp_path / "second")
    assert first == second


def test_the_longer_bar_is_the_better_row(tmp_path: Path):
    report.plot([row("BM25", 0.25, interval=False), row("ours", 0.75, interval=False)], "bars", tmp_path / "bars.png")
    image = matplotlib.image.imread(tmp_path / "bars.png")[..., :3]
    theirs = np.all(np.isclose(image, np.array([0xAD, 0xB5, 0xBD]) / 255, atol=0.01), axis=2)
    ours = np.all(np.isclose(image, np.array([0x0B, 0x72, 0x85]) / 255, atol=0.01), axis=2)
    assert ours.any(axis=0).sum() == pytest.approx(3 * theirs.any(axis=0).sum(), rel=0.02)
    assert np.flatnonzero(theirs.any(axis=1)).max() < np.flatnonzero(ours.any(axis=1)).min()


@pytest.mark.parametrize("name", ["$\\frac{$", "cost $5$", "a\udcff", "<&>"])
def test_a_name_is_drawn_as_it_is_written(name: str, tmp_path: Path):
    report.plot([row(name)], name, tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text(encoding="utf-8")


def test_a_plot_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"caravan\[report\]"):
        report.plot([row("ours")], "", tmp_path / "plot.svg")
    monkeypatch.setattr("caravan.app.charts.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"caravan\[report\]"):
        report.check_report(tmp_path)
    assert listing(tmp_path) == {}


def test_a_report_folder_is_checked_without_being_made(tmp_path: Path):
    report.check_report(tmp_path / "a" / "b")
    report.check_report(tmp_path)
    assert listing(tmp_path) == {}
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        with pytest.raises(StorageError, match=f"{place}: cannot be written: Not a directory"):
            report.check_report(tmp_path / place)
