"""Privacy sweep: noise, clip, epochs and warm-up; accuracy by epsilon, and which settings nothing else beats."""

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from caravan.app.charts import Chart, Series
from caravan.app.reproduction.federations import simulate
from caravan.app.reproduction.findings import Findings, Table
from caravan.app.reproduction.frame import Bench, counts
from caravan.app.reproduction.ledgers import own_ledger
from caravan.app.reproduction.trials import seeds_text, spread
from caravan.data.dataset import Dataset
from caravan.training.accounting import in_figures

_COLUMNS = (
    *("privacy", "noise multiplier", "clip", "epochs", "warm-up", "epsilon", "validation R@1 %", "over seeds"),
    *("front", "test R@1 %"),
)
_NOTE = (
    "Head alone. Epsilon: of dp-sgd what is proved; of the paper's mode what its noised steps would be worth had each "
    "query been clipped and each batch drawn, for what it does proves nothing. Warm-up: dp-sgd trains on documents' "
    "passages first, which are public (0: it does not); the paper's mode on the queries themselves, without noise, for "
    "so many of its epochs. Clip: an L2 norm for dp-sgd; in the paper's mode, whose clip follows the norms, what is "
    "cut. The front is chosen by validation queries alone, means over seeds; the test split is ranked once a training, "
    "and shown of the front."
)


@dataclass(frozen=True, order=True)
class Setting:
    """One point of the grid.

    Attributes:
        mode: "dp-sgd" or "paper".
        noise: noise multiplier.
        clip: L2 norm, or in mode "paper" what is cut: "batch" or "example".
        epochs: passes.
        warmup: passages a document that are trained on first, or in mode "paper" epochs without noise.
    """

    mode: str
    noise: float
    clip: float | str
    epochs: int
    warmup: int

    def changes(self) -> dict[str, Any]:
        """As settings."""
        common = {"privacy.mode": self.mode, "training.head.epochs": self.epochs}
        if self.mode == "paper":
            own = {"paper_noise": self.noise, "paper_clipping": self.clip, "paper_warmup": self.warmup}
            return common | {f"privacy.{name}": value for name, value in own.items()}
        own = {"privacy.noise_multiplier": self.noise, "privacy.clip": self.clip, "training.passages": self.warmup}
        return common | own

    def __str__(self) -> str:
        """For keys and bars."""
        return f"{self.mode}, noise {self.noise:g}, clip {self.clip}, {self.epochs} epochs, warm-up {self.warmup}"


@dataclass(frozen=True)
class Point:
    """What a setting came to.

    Attributes:
        setting: of the grid.
        epsilon: see the table's note; infinite where there is no noise.
        validation: recall@1 in percent, one a seed.
        test: likewise.
    """

    setting: Setting
    epsilon: float
    validation: tuple[float, ...]
    test: tuple[float, ...]

    @property
    def value(self) -> float:
        """What the front is chosen by."""
        return statistics.mean(self.validation)


def run(bench: Bench) -> Findings:
    """Train with every setting of the grid, and draw the front."""
    settings = bench.settings
    data = bench.present(settings["datasets"])[0]
    dataset = bench.dataset(
        data, train=settings.get("train"), test=settings.get("test"), validation=settings["validation"]
    )
    plain = [_measured(bench, dataset, None, seed) for seed in bench.seeds]
    points = []
    for setting in grid(settings):
        parts = [_measured(bench, dataset, setting, seed) for seed in bench.seeds]
        recalls = [tuple(100 * part[split] for part in parts) for split in ("validation", "test")]
        points.append(Point(setting, _epsilon(parts[0]["guarantee"]), *recalls))
    best = front(points)
    without = 100 * statistics.mean(part["validation"] for part in plain)
    return Findings(
        tables=[_table(dataset, points, best, plain)],
        charts=[_chart(data, points, best, without)],
        notes=_notes(bench, points, best, without),
    )


def grid(settings: Mapping[str, Any]) -> Iterator[Setting]:
    """All settings, those of dp-sgd first."""
    noises, epochs = settings["noise"], settings["epochs"]
    for noise, clip, passes, warmup in itertools.product(noises, settings["clip"], epochs, settings["passages"]):
        yield Setting("dp-sgd", noise, clip, passes, warmup)
    for noise, clip, passes, warmup in itertools.product(
        settings["paper_noise"], settings["paper_clipping"], settings["paper_epochs"], settings["paper_warmup"]
    ):
        if warmup < passes:  # else there is no noise at all
            yield Setting("paper", noise, clip, passes, warmup)


def front(points: Sequence[Point]) -> list[Point]:
    """The Pareto front of what is proved: points that no other one beats in epsilon or recall and equals in the other.

    Points of mode "paper", whose epsilon is not proved, and without any epsilon are left out.

    Returns:
        From the smallest epsilon up, each ranking better than the one before.
    """
    proved = [point for point in points if point.setting.mode != "paper" and math.isfinite(point.epsilon)]
    kept: list[Point] = []
    for point in sorted(proved, key=lambda point: (point.epsilon, -point.value)):
        if not kept or point.value > kept[-1].value:
            kept.append(point)
    return kept


def _measured(bench: Bench, dataset: Dataset, setting: Setting | None, seed: int) -> dict[str, Any]:
    """Recall@1 on validation and test, and the record's guarantee; None: without privacy."""
    settings = bench.settings
    changes = setting.changes() if setting else {"training.head.epochs": max(settings["epochs"])}
    # The data are public, so validation may choose.
    changes |= {"training.mode": "head", "privacy.public_validation": True}

    def work() -> dict[str, Any]:
        with own_ledger():
            found = simulate(bench, dataset, bench.config(seed, changes), str(setting or "no privacy"))
        guarantee = found.get("guarantees", {}).get("all", {})
        test, validation = found["head"]["recall@1"]["value"], found["curve"][-1][1]
        return {"validation": validation, "test": test, "guarantee": guarantee}

    matters = {**changes, **{name: settings.get(name) for name in ("train", "test", "validation")}}
    return bench.measure(f"{dataset.name}/{setting or 'no privacy'}/seed {seed}", work, matters=matters)


def _epsilon(guarantee: Mapping[str, Any]) -> float:
    """Of the mode's own steps, or of the paper's as if they were accounted for."""
    value = guarantee.get("accounted", guarantee)["epsilon"]
    return math.inf if value is None else float(value)


def _table(
    dataset: Dataset, points: Sequence[Point], best: Sequence[Point], plain: Sequence[Mapping[str, Any]]
) -> Table:
    free = [100 * part["validation"] for part in plain]
    tested = f"{100 * statistics.mean(part['test'] for part in plain):.2f}"
    rows = [["none", *["-"] * 4, "no privacy", f"{statistics.mean(free):.2f}", spread(free), "", tested]]
    for point in sorted(points, key=lambda point: (point.setting.mode, point.epsilon, point.setting)):
        setting, on_front = point.setting, point in best
        rows.append(
            [
                *(setting.mode, f"{setting.noise:g}", _clip(setting), str(setting.epochs), str(setting.warmup)),
                *(_shown(point), f"{point.value:.2f}", spread(point.validation)),
                *(("on it", f"{statistics.mean(point.test):.2f}") if on_front else ("", "")),
            ]
        )
    title = f"Noise, clip, epochs and warm-up on {counts(dataset)}, {len(dataset.validation):,} validation"
    return Table(title=title, columns=_COLUMNS, rows=rows, note=_NOTE)


def _clip(setting: Setting) -> str:
    return f"{setting.clip:g}" if isinstance(setting.clip, int | float) else f"a quantile, of each {setting.clip}"


def _shown(point: Point) -> str:
    found = in_figures(point.epsilon)
    return f"proved infinity; {found} if accounted" if point.setting.mode == "paper" else found


def _chart(data: str, points: Sequence[Point], best: Sequence[Point], without: float) -> Chart:
    known = [point for point in points if math.isfinite(point.epsilon)]
    ends = [min(point.epsilon for point in known), max(point.epsilon for point in known)]
    clouds = {
        "DP-SGD, proved": [point for point in known if point.setting.mode == "dp-sgd"],
        "paper's mode, not proved": [point for point in known if point.setting.mode == "paper"],
    }
    series = [
        Series(name=name, x=[point.epsilon for point in own], y=[point.value for point in own])
        for name, own in clouds.items()
        if own
    ]
    x, y = [point.epsilon for point in best], [point.value for point in best]
    series += [
        Series(name="front of the proved", x=x, y=y, dashed=True),
        Series(name="no privacy", x=ends, y=[without, without], dashed=True),
    ]
    return Chart(
        name="front",
        title=f"{data}, head: recall by epsilon, over the grid",
        kind="scatter",
        x_label="epsilon (logarithmic)",
        y_label="recall@1, % of validation queries",
        series=series,
        log_x=True,
    )


def _notes(bench: Bench, points: Sequence[Point], best: Sequence[Point], without: float) -> list[str]:
    notes = [f"Means over the seeds {seeds_text(bench.seeds)}; noise itself comes from the operating system."]
    named = [point.epsilon for point in points if point.setting.mode == "dp-sgd" and point.setting.noise <= 0.5]
    if named:
        notes.append(
            "With noise of 0.01 to 0.5, the range of the paper's scales, no setting here proves an epsilon below "
            f"{in_figures(min(named))}."
        )
    usable = [point for point in best if point.epsilon <= 8]
    if usable:
        point = usable[-1]
        notes.append(
            f"With epsilon of 8 or less the front reaches {point.value:.2f}% on validation ({point.setting}), "
            f"{without - point.value:.2f} points below no privacy."
        )
    return notes
