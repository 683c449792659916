import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from caravan import __version__
from caravan.app import display
from caravan.app.comparison import Comparison
from caravan.config import Config, EvaluationConfig
from caravan.data.dataset import Dataset
from caravan.data.records import Hit
from caravan.errors import StorageError
from caravan.training.evaluation import Ranking
from caravan.training.features import FeatureStore
from caravan.training.progress import Progress
from command_line import Workshop
from toy_training import CATALOGUE, toy_examples

STYLE = re.compile(r"\x1b\[[\d;]*m")
Terminal = Callable[[int], io.StringIO]


class _Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make standard output and error a terminal of a width, without colours."""

    def terminal(columns: int) -> io.StringIO:
        screen = _Screen()
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setattr(sys, "stderr", screen)
        return screen

    return terminal


def comparison(*names: str, skipped: int = 0, name: str = "letters") -> Comparison:
    """Rows on three queries; the first row finds all of them, the others one."""
    queries = toy_examples(48)
    examples = tuple(next(query for query in queries if query.doc_ids == (f"d{gold}",)) for gold in range(3))
    dataset = Dataset(name, CATALOGUE, tuple(queries), (), examples, skipped)
    result = Comparison(dataset, Config(evaluation=EvaluationConfig(bootstrap=20)), store=FeatureStore())
    for number, row in enumerate(names):
        places = np.array([[0], [1], [2]] if number == 0 else [[0], [0], [0]])
        ranking = Ranking(places, np.ones((3, 1), dtype=np.float32), np.full(3, 0.5, dtype=np.float32))
        result.add_ranking(row, lambda ranking=ranking: ranking)
    return result


def plain(text: str) -> str:
    return " ".join(text.split())


def test_a_table_has_a_line_a_row_with_the_figures_and_says_what_else_is_known(capsys: pytest.CaptureFixture[str]):
    latency = {"encode_ms": 1.04, "search_ms": 2.0, "search_p95_ms": 3.0}
    display.print_comparison(comparison("MIPS", "head", skipped=1234), latency)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "letters: 3 test queries, 5 documents"
    assert plain(lines[1]) == "R@1 % [95%] R@5 R@10 MRR@10 nDCG@10 seconds"
    assert plain(lines[3]).startswith("MIPS 100.0 [100.0, 100.0] 100.0 100.0 100.0 100.0 0.0")
    assert plain(lines[4]).startswith("head 33.3 [")
    assert lines[5] == "head: the first hit's probability is off by 16.7 points on average (ECE)."
    assert lines[6] == "head: one query takes 2.0 ms (p95 3.0), encoding alone 1.0 ms."
    assert lines[7] == "1,234 malformed rows were skipped."


@pytest.mark.parametrize("columns", [30, 80, 200])
def test_no_figure_is_ever_cut(columns: int, terminal: Terminal):
    screen = terminal(columns)
    display.print_comparison(comparison("federated adapter", "a retriever with a long name"), None)
    lines = STYLE.sub("", screen.getvalue()).splitlines()
    assert plain(lines[1]) == "R@1 % [95%] R@5 R@10 MRR@10 nDCG@10 seconds"
    assert plain(lines[3]) == "federated adapter 100.0 [100.0, 100.0] 100.0 100.0 100.0 100.0 0.0"
    assert plain(lines[4]).endswith("] 33.3 33.3 33.3 33.3 0.0")
    assert all(len(line) <= max(columns, 80) for line in lines[:5])


def test_the_best_row_is_bold_on_a_terminal(terminal: Terminal):
    screen = terminal(100)
    display.print_comparison(comparison("best", "other"), None)
    bold = [line for line in screen.getvalue().splitlines() if "\x1b[1m" in line and "R@1" not in line]
    assert len(bold) == 1
    assert "best" in bold[0]


@pytest.mark.parametrize("name", ["[/red]", "[bold]x", "[link=a]b", "a\x1b[2Jb", "\udcff"])
def test_names_are_shown_as_they_are_and_steer_nothing(name: str, terminal: Terminal):
    screen = terminal(100)
    display.print_comparison(comparison(name, name=name), {"encode_ms": 1, "search_ms": 1, "search_p95_ms": 1})
    assert screen.getvalue().count(display.one_line(name)) == 4
    assert "\x1b[2J" not in screen.getvalue()


def test_hits_are_shown_on_two_lines_each_with_rank_probability_id_title_and_text(capsys: pytest.CaptureFixture[str]):
    first = Hit(1, "d1", 9.0, 0.75, "A title", "Its\ntext.")
    last = Hit(10, "d2", 8.0, 0.004, "", "word " * 50)
    display.print_hits(["a\nquery", "nothing"], [[first, last], []])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["a query", "  1.  75.0%  d1: A title", "             Its text.", " 10.   0.4%  d2"]
    assert lines[4].strip().startswith("word word")
    assert lines[4].endswith("…")
    assert len(lines[4].strip()) <= 90
    assert lines[5:] == ["nothing"]


def test_what_steers_a_terminal_does_not_reach_it():
    assert display.one_line("a\x1b]0;title\x07 \x9bb\n\tc\x00") == "a]0;title b c"
    assert display.one_line("caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{THUMBS UP SIGN} \u0627") == (
        "caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{THUMBS UP SIGN} \u0627"
    )


def test_a_long_line_is_not_wrapped_in_a_pipe(capsys: pytest.CaptureFixture[str]):
    display.print_hits(["word " * 100], [[]])
    assert capsys.readouterr().out == "word " * 99 + "word\n"


def test_facts_are_shown_one_a_line_with_sections_indented(capsys: pytest.CaptureFixture[str]):
    display.print_facts({"name": "x", "versions": {"torch": "2"}, "share": 0.123456, "extras": [], "list": [1, "b"]})
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["name      x", "versions", "  torch   2", "share     0.1235", "extras    none", "list      1, b"]


def test_an_installation_is_described_by_versions_and_extras():
    facts = display.describe_installation()
    assert facts["caravan"] == __version__
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "report" in facts["extras"]
    assert json.loads(json.dumps(facts)) == facts


def test_a_retriever_is_described_by_what_it_is_made_of_and_how_good_it_was(workshop: Workshop):
    facts = display.describe_model(str(workshop.model))
    assert facts["documents"] == 5
    assert facts["backbone"]["name"] == str(workshop.backbone)
    assert facts["trained_parameters"] == {
        "adapter.matrix": 32 * 32,
        "head.rows": 5 * 32,
        "head.bias": 5,
        "head.log_scale": 1,
    }
    assert facts["dataset"]["test"] == 12
    saved = json.loads((workshop.model / "training.json").read_text(encoding="utf-8"))
    assert facts["recall@1"] == {"head": saved["metrics"]["head"]["metrics"]["recall@1"]["value"]}


def test_a_missing_retriever_cannot_be_described(here: Path):
    with pytest.raises(StorageError, match="nowhere: no such folder"):
        display.describe_model("nowhere")


def show_progress(bars: display.Bars) -> None:
    with bars:
        bars(Progress("encoding", 1, 4))
        bars(Progress("training the head", 2, 4, loss=0.1234, rate=1234.5))
        bars._progress.refresh()


def test_progress_shows_the_latest_task_with_loss_and_rate_on_a_terminal(terminal: Terminal):
    screen = terminal(120)
    show_progress(display.Bars(quiet=False))
    last = screen.getvalue().rsplit("training the head", 1)[1]
    assert "2/4" in last
    assert "loss 0.123  1,234 queries/s" in last
    assert "encoding" not in last


@pytest.mark.parametrize("quiet", [True, False])
def test_progress_leaves_nothing_in_a_log_nor_where_silence_was_asked_for(
    quiet: bool, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
):
    screen: Any = terminal(120)
    if not quiet:
        monkeypatch.setattr(sys, "stderr", log := io.StringIO())
        screen = log
    show_progress(display.Bars(quiet=quiet))
    assert screen.getvalue() == ""


def test_progress_goes_to_standard_error_only(terminal: Terminal, monkeypatch: pytest.MonkeyPatch):
    errors = terminal(120)
    monkeypatch.setattr(sys, "stdout", output := _Screen())
    show_progress(display.Bars(quiet=False))
    assert output.getvalue() == ""
    assert "training the head" in errors.getvalue()
    assert Console().file is output
