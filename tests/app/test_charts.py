"""Charts: every kind is drawn, with intervals, gaps and the paper's marks, the same bytes for the same figures."""

import re
from dataclasses import asdict, replace
from html import escape

import pytest

from caravan.app.charts import Chart, Mark, Series, draw

LINE = Chart(
    name="speed",
    title="Speed by clients",
    kind="line",
    x_label="clients",
    y_label="seconds a round",
    series=[
        Series(name="measured", x=[1, 2, 4], y=[8.0, None, 2.5], low=[7.0, None, 2.0], high=[9.0, None, 3.0]),
        Series(name="bound", x=[1, 2, 4], y=[8.0, 4.0, 2.0], dashed=True),
    ],
    paper=[Mark(name="paper: 4.6 with 2", y=4.6, x=2), Mark(name="the goal", y=1.0)],
)
BARS = replace(
    LINE,
    name="bars",
    kind="bar",
    series=[Series(name="head $x$", x=["a", "b"], y=[1.0, 2.0]), Series(name="adapter", x=["a", "b"], y=[2.0, 3.0])],
    paper=[Mark(name="paper", y=2.5, x="b", series="adapter")],
    y_limits=(0, 4),
)


@pytest.mark.parametrize("chart", [LINE, BARS, replace(LINE, name="points", kind="scatter", log_x=True, log_y=True)])
def test_a_chart_is_drawn_as_png_and_svg_with_all_its_words(chart, tmp_path):
    draw(chart, tmp_path)
    assert (tmp_path / f"{chart.name}.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / f"{chart.name}.svg").read_text(encoding="utf-8")
    names = [*(series.name for series in chart.series), *(mark.name for mark in chart.paper)]
    for words in (chart.title, chart.x_label, chart.y_label, *names):
        assert f">{escape(words)}</text>" in text  # to be read aloud, and searched


def test_the_same_chart_gives_the_same_file(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        draw(BARS, tmp_path / folder)
    assert (tmp_path / "one" / "bars.svg").read_bytes() == (tmp_path / "two" / "bars.svg").read_bytes()


@pytest.mark.parametrize("chart", [LINE, BARS])
def test_a_chart_comes_back_from_plain_values(chart):
    assert Chart.from_dict(asdict(chart)) == chart


def test_the_svg_needs_nothing_from_elsewhere(tmp_path):
    draw(LINE, tmp_path)
    text = (tmp_path / "speed.svg").read_text(encoding="utf-8")
    assert not re.search(r'(href|src)="(?!#)', text)
