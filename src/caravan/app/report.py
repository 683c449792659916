"""Results for people: rows as text, Markdown and a plot."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caravan.app.charts import INK, OURS, THEIRS, check_drawing, new_figure, save_figure
from caravan.app.comparison import Comparison, Row
from caravan.files import check_writable, make_folder, whole_file

COLUMNS = ("recall@1", "recall@5", "recall@10", "mrr@10", "ndcg@10")

_RIVALS = {"BM25", "MIPS", "centroids", "1-NN", "output adapter", "random backbone"}


def cells(row: Row) -> list[str]:
    """One row as strings: name, the measures in percent (recall@1 with its interval), seconds."""
    first = row.metrics["recall@1"]
    interval = "" if first.low is None or first.high is None else f" [{100 * first.low:.1f}, {100 * first.high:.1f}]"
    measures = [f"{100 * row.metrics[name].value:.1f}" for name in COLUMNS]
    return [row.name, measures[0] + interval, *measures[1:], f"{row.seconds:.1f}"]


def headings() -> list[str]:
    """The headings above `cells`; R is recall."""
    return ["", "R@1 % [95%]", "R@5", "R@10", "MRR@10", "nDCG@10", "seconds"]


def markdown(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    figures = [[cell.replace("|", "\\|") for cell in cells(row)] for row in rows]
    lines = [headings(), ["---", *["---:"] * len(COLUMNS), "---:"], *figures]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw recall@1 as horizontal bars with 95% intervals; the file's ending says PNG or SVG.

    Raises:
        ConfigError: matplotlib is not installed.
        StorageError: the file cannot be written.
    """
    values = [100 * row.metrics["recall@1"].value for row in rows]
    bounds = [(row.metrics["recall@1"].low, row.metrics["recall@1"].high) for row in rows]
    errors = [
        [value - 100 * low if low is not None else 0.0 for value, (low, _) in zip(values, bounds, strict=True)],
        [100 * high - value if high is not None else 0.0 for value, (_, high) in zip(values, bounds, strict=True)],
    ]
    figure = new_figure(7.2, 0.9 + 0.36 * len(rows))
    axes = figure.add_subplot()
    colours = [THEIRS if row.name in _RIVALS else OURS for row in rows]
    axes.barh(range(len(rows)), values, xerr=errors, color=colours, ecolor=INK, height=0.66, capsize=2)
    for place, (value, upper) in enumerate(zip(values, errors[1], strict=True)):
        axes.text(value + upper + 0.8, place, f"{value:.1f}", va="center", color=INK, fontsize=9)
    # A name may hold dollar signs, which are no formula, and bytes of a path that are no text.
    axes.set_yticks(range(len(rows)), [_text(row.name) for row in rows], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xlabel("recall@1, % of queries (bar: 95% bootstrap interval)")
    axes.set_title(_text(title), loc="left", fontsize=11, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def check_report(folder: str | Path) -> None:
    """Refuse what `write_report` could not do, so that this is known before the work and not after it.

    Raises:
        ConfigError: matplotlib is not installed.
        StorageError: the folder cannot be written.
    """
    check_drawing()
    check_writable(folder)


def write_report(folder: str | Path, comparison: Comparison, extra: Mapping[str, Any]) -> None:
    """Write `results.json`, `table.md`, `recall.svg`, `recall.png`, `qrels.txt` and one TREC run a row.

    Args:
        folder: made if it is not there; files of these names are replaced.
        comparison: the rows.
        extra: further plain values for `results.json`.

    Raises:
        ConfigError: matplotlib is not installed.
        StorageError: the folder cannot be written.
    """
    folder = make_folder(folder)
    title = f"{comparison.dataset.name}, {comparison.split} split, {len(comparison.examples):,} queries"
    plot(comparison.rows, title, folder / "recall.svg")
    plot(comparison.rows, title, folder / "recall.png")
    comparison.write_trec(folder)
    with whole_file(folder / "table.md") as temporary:
        temporary.write_text(_text(markdown(comparison.rows)), encoding="utf-8")
    with whole_file(folder / "results.json") as temporary:
        temporary.write_text(json.dumps(comparison.summary(extra), indent=2) + "\n", encoding="utf-8")


def _text(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
