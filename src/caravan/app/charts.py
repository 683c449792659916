"""Charts as plain records, and how they are drawn (the only place that imports matplotlib)."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from caravan.errors import ConfigError
from caravan.files import whole_file

INK, PAPER, OURS, THEIRS = "#1f2933", "#ffffff", "#0b7285", "#adb5bd"
# Okabe and Ito's palette (Color Universal Design, 2008), the dark ones first; told apart in every colour vision.
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#6c757d")
_SHAPES = ("o", "s", "^", "D", "v", "P", "X")  # and by shape where there is no colour at all
_NO_MATPLOTLIB = "plots need matplotlib; install it with `pip install 'caravan[report]'`"

_ROOM = 50  # letters that fit side by side below the x axis
_GROUP = 0.8  # of the space of a category that its bars fill together

Place = float | str  # on the x axis: a number, or a category's name


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line, one colour of bars, or one cloud of points.

    Attributes:
        name: in the legend.
        x: N places; strings for categories, which all series share.
        y: N values; None leaves a gap.
        low, high: N bounds of an interval around y, or None for none.
        dashed: draw a line dashed: a bound or a model beside what was measured.
    """

    name: str
    x: Sequence[Place]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A single value to compare with: a figure of the paper, or a goal.

    Attributes:
        name: in the legend, e.g. "paper: 1.75x with 2".
        y: its value.
        x: where it stands; None: a line across the whole chart.
        series: among bars, the name of the series whose bar it stands on; None: in the middle of the group.
    """

    name: str
    y: float
    x: Place | None = None
    series: str | None = None


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What to draw.

    Attributes:
        name: of the files, without ending; lower case and hyphens.
        title: one line above it.
        kind: "line" with points, "bar" side by side (x are categories), or "scatter".
        x_label, y_label: with units.
        series: in the order of the legend.
        paper: its figures, and goals, as marks.
        log_x, log_y: logarithmic axes.
        y_limits: the lowest and highest value shown; None: as the data need.
    """

    name: str
    title: str
    kind: Literal["line", "bar", "scatter"]
    x_label: str
    y_label: str
    series: Sequence[Series]
    paper: Sequence[Mark] = ()
    log_x: bool = False
    log_y: bool = False
    y_limits: tuple[float, float] | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Chart":
        """Take the values of `dataclasses.asdict`, as JSON gives them back.

        Raises:
            LookupError, TypeError: they are not such values.
        """
        series = [Series(**one) for one in values["series"]]
        marks = [Mark(**one) for one in values["paper"]]
        limits = values["y_limits"]
        return cls(**{**values, "series": series, "paper": marks, "y_limits": limits and tuple(limits)})


def check_drawing() -> None:
    """Refuse to begin work whose charts could not be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError(_NO_MATPLOTLIB)


def new_figure(width: float, height: float) -> Any:
    """Make an empty figure, sizes in inches, that needs no screen.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(_NO_MATPLOTLIB) from None
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure; the file's ending says PNG or SVG. The same figure gives the same file.

    Raises:
        StorageError: the file cannot be written.
    """
    from matplotlib import rc_context

    # A fixed salt and no date: the same figures give the same file. Text stays text, which is small and can be read.
    with whole_file(path) as temporary, rc_context({"svg.hashsalt": "caravan", "svg.fonttype": "none"}):
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(temporary, format=path.suffix.lstrip("."), dpi=150, metadata=metadata)


def draw(chart: Chart, folder: Path) -> None:
    """Draw a chart as `NAME.png` and `NAME.svg`.

    Raises:
        ConfigError: matplotlib is not installed.
        StorageError: a file cannot be written.
    """
    # Narrow, so that letters of 11 points are still 7 in a column of a page; as high as what stands below asks for.
    names = _legend_names(chart)
    height = 3.7 + 0.22 * math.ceil(len(names) / _columns(names)) + 1.2 * _is_crowded(chart)
    figure = new_figure(5.4, height)
    axes = figure.add_subplot()
    {"line": _lines, "scatter": _points, "bar": _bars}[chart.kind](axes, chart)
    looks = list(dict.fromkeys(mark.name for mark in chart.paper))
    for number, mark in enumerate(chart.paper):
        first = mark.name not in [earlier.name for earlier in chart.paper[:number]]
        _mark(axes, chart, mark, looks.index(mark.name), label=mark.name if first else None)
    if chart.log_x:
        axes.set_xscale("log")
    if chart.log_y:
        axes.set_yscale("log")
    if chart.y_limits is not None:
        axes.set_ylim(*chart.y_limits)
    axes.set_xlabel(chart.x_label, parse_math=False, fontsize=12)
    axes.set_ylabel(chart.y_label, parse_math=False, fontsize=12)
    axes.set_title(chart.title, loc="left", fontsize=13, parse_math=False, wrap=True)
    axes.tick_params(labelsize=11)
    axes.grid(axis="y" if chart.kind == "bar" else "both", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, axes, chart)
    for ending in ("png", "svg"):
        save_figure(figure, folder / f"{chart.name}.{ending}")


def _lines(axes: Any, chart: Chart) -> None:
    for number, series in enumerate(chart.series):
        style = "--" if series.dashed else "-"
        marker = "" if series.dashed else _SHAPES[number % len(_SHAPES)]
        _with_interval(axes, series, number, fmt=f"{marker}{style}")


def _points(axes: Any, chart: Chart) -> None:
    for number, series in enumerate(chart.series):
        _with_interval(axes, series, number, fmt="--" if series.dashed else _SHAPES[number % len(_SHAPES)])


def _with_interval(axes: Any, series: Series, number: int, *, fmt: str) -> None:
    kept = [place for place, value in enumerate(series.y) if value is not None]
    axes.errorbar(
        [series.x[place] for place in kept],
        [series.y[place] for place in kept],
        yerr=_reach(series, kept),
        fmt=fmt,
        color=_PALETTE[number % len(_PALETTE)],
        label=series.name,
        linewidth=2,
        markersize=7,
        capsize=3,
        elinewidth=1.2,
    )


def _legend_names(chart: Chart) -> list[str]:
    return list(dict.fromkeys([*(series.name for series in chart.series), *(mark.name for mark in chart.paper)]))


def _columns(names: Sequence[str]) -> int:
    """How many names of the legend stand side by side."""
    longest = max(map(len, names))
    return 3 if longest <= 12 else 2 if longest <= 26 else 1


def _is_crowded(chart: Chart) -> bool:
    """Whether the categories' names must be turned."""
    names = _wrapped(_categories(chart)) if chart.kind == "bar" else []
    return any(len(line) > _ROOM // len(names) + 1 for name in names for line in name.split("\n"))


def _wrapped(names: Sequence[str]) -> list[str]:
    """Category names broken between words, so that they fit side by side."""
    return [textwrap.fill(name, max(6, _ROOM // len(names)), break_long_words=False) for name in names]


def _bars(axes: Any, chart: Chart) -> None:
    places = _categories(chart)
    width = _GROUP / len(chart.series)
    for number, series in enumerate(chart.series):
        kept = [place for place, value in enumerate(series.y) if value is not None]
        shift = _shift(chart, number)
        axes.bar(
            [places.index(str(series.x[place])) + shift for place in kept],
            [series.y[place] for place in kept],
            width=0.92 * width,
            yerr=_reach(series, kept),
            color=_PALETTE[number % len(_PALETTE)],
            ecolor=INK,
            capsize=2,
            label=series.name,
        )
    if _is_crowded(chart):
        turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(len(places)), places, parse_math=False, **turned)
    else:
        axes.set_xticks(range(len(places)), _wrapped(places), parse_math=False)


def _shift(chart: Chart, number: int) -> float:
    """How far the bars of a series stand from the middle of their group."""
    return (number - (len(chart.series) - 1) / 2) * _GROUP / len(chart.series)


def _mark(axes: Any, chart: Chart, mark: Mark, number: int, *, label: str | None) -> None:
    """Draw a mark, in the look of its number; marks of one name have one look and one line in the legend."""
    if mark.x is None:
        style = ("--", ":", "-.")[number % 3]
        axes.axhline(mark.y, color=INK, linewidth=1.4, linestyle=style, label=label, zorder=1)
        return
    place = mark.x
    if chart.kind == "bar":
        names = [series.name for series in chart.series]
        place = _categories(chart).index(str(mark.x))
        place += 0.0 if mark.series is None else _shift(chart, names.index(mark.series))
    marker = ("*", "d", "p")[number % 3]
    style = {"color": INK, "markerfacecolor": "#f0e442", "markersize": 12, "linestyle": "none", "zorder": 5}
    axes.plot([place], [mark.y], marker=marker, label=label, clip_on=False, **style)


def _legend(figure: Any, axes: Any, chart: Chart) -> None:
    """Ours in their order, then the paper's; none where there is nothing to tell apart."""
    names = _legend_names(chart)
    if len(names) < 2:
        return
    handles, labels = axes.get_legend_handles_labels()
    ordered = sorted(range(len(labels)), key=lambda place: names.index(labels[place]))
    legend = figure.legend(
        [handles[place] for place in ordered],
        [labels[place] for place in ordered],
        loc="outside lower center",
        ncols=_columns(names),
        fontsize=11,
        frameon=False,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may hold dollar signs, which are no formula


def _categories(chart: Chart) -> list[str]:
    return list(dict.fromkeys(str(place) for series in chart.series for place in series.x))


def _reach(series: Series, kept: Sequence[int]) -> list[list[float]] | None:
    """How far the interval reaches below and above each value that is kept."""
    if series.low is None or series.high is None:
        return None
    below, above = [], []
    for place in kept:
        value, low, high = series.y[place], series.low[place], series.high[place]
        below.append(max(0.0, value - low) if value is not None and low is not None else 0.0)
        above.append(max(0.0, high - value) if value is not None and high is not None else 0.0)
    return [below, above]
