"""Which experiments there are, how they are run, and the report over all that were."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from shlex import quote
from typing import Any

from caravan.app.charts import check_drawing, draw
from caravan.app.reproduction.frame import Bench, read_results, read_settings
from caravan.app.reproduction.page import Chapter, markdown_of, write_page
from caravan.config import BackboneConfig
from caravan.errors import ConfigError
from caravan.files import check_writable, make_folder, whole_file
from caravan.training.progress import Report

# Name to the module with its `run(bench: Bench) -> Findings`; in the order of the report.
EXPERIMENTS = {
    "retrieval": "caravan.app.reproduction.retrieval",
    "pooling": "caravan.app.reproduction.pooling",
    "learning-rate": "caravan.app.reproduction.learning_rate",
    "scale": "caravan.app.reproduction.scale",
    "central-vs-federated": "caravan.app.reproduction.central_vs_federated",
    "privacy": "caravan.app.reproduction.privacy",
    "privacy-sweep": "caravan.app.reproduction.privacy_sweep",
    "communication": "caravan.app.reproduction.communication",
    "heterogeneity": "caravan.app.reproduction.heterogeneity",
    "clients": "caravan.app.reproduction.clients",
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for, whatever the experiment.

    Attributes:
        out: a folder; each experiment gets one of its own in it.
        quick: the short form.
        data: a folder of data sets; None: the bundled corpus alone.
        models: a folder of further, smaller models; None: there are none.
        backbone: the frozen model, and on which device.
        seeds: in place of those of the settings; None: those.
        changes: settings of the one experiment that is named, in place of the shipped ones.
    """

    out: Path
    quick: bool = False
    data: Path | None = None
    models: Path | None = None
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    seeds: Sequence[int] | None = None
    changes: Mapping[str, Any] | None = None


def named(names: Sequence[str]) -> list[str]:
    """Give the experiments that are meant, each once, in the order of the report; "all" means all.

    Raises:
        ConfigError: a name is unknown, or none is given.
    """
    unknown = [name for name in names if name != "all" and name not in EXPERIMENTS]
    if unknown or not names:
        what = f"no experiment is called {unknown[0]}" if unknown else "no experiment is named"
        raise ConfigError(f"{what}; give some of {', '.join(EXPERIMENTS)}, or all")
    return [name for name in EXPERIMENTS if "all" in names or name in names]


def reproduce(names: Sequence[str], request: Request, *, report: Report | None = None) -> list[Chapter]:
    """Run experiments, each resumed where it stood, and write the report over all that lie in the folder.

    Args:
        names: of experiments, or "all".
        request: what is asked for.
        report: called as the work goes on.

    Returns:
        The chapters of those that were named.

    Raises:
        ConfigError: a name or a setting is unknown, or matplotlib is not installed.
        CaravanError: what an experiment raises; what it measured so far is kept.
    """
    benches = [prepare(name, request, report) for name in named(names)]
    if request.changes and len(benches) > 1:
        raise ConfigError("--set changes the settings of one experiment, and several are named; run them one by one")
    check_drawing()
    check_writable(request.out)
    chapters = []
    for bench in benches:
        before = bench.results().get("findings", {}).get("charts", [])
        findings = import_module(EXPERIMENTS[bench.name]).run(bench)
        make_folder(bench.folder)
        for chart in findings.charts:  # before they are spoken of: another process may be writing the report
            draw(chart, bench.folder)
        bench.keep(replace(findings, notes=[*findings.notes, *bench.notes]))
        chapters.append(_write_chapter(bench.folder, [chart["name"] for chart in before]))
        write_report(request.out)
    return chapters


def prepare(name: str, request: Request, report: Report | None = None) -> Bench:
    """Make an experiment's bench.

    Raises:
        ConfigError: a setting is unknown, or of another kind than the shipped one.
    """
    settings = read_settings(name, quick=request.quick)
    unknown = [key for key in request.changes or {} if key not in settings]
    if unknown:
        raise ConfigError(f"--set {unknown[0]}: {name} has no such setting; give one of {', '.join(sorted(settings))}")
    for key, value in (request.changes or {}).items():
        kinds = (int, float) if type(settings[key]) is float else (type(settings[key]),)
        if type(value) not in kinds:  # a bool is no number here
            like = _toml(settings[key])
            raise ConfigError(f"--set {key}={_toml(value)}: {name} needs a value like {like}")
    settings |= request.changes or {}
    return Bench(
        name=name,
        folder=request.out / name,
        settings=settings,
        quick=request.quick,
        data=request.data,
        models=request.models,
        backbone=request.backbone,
        seeds=tuple(request.seeds or settings["seeds"]),
        command=_command(name, request),
        report=report,
    )


def write_report(out: Path) -> list[Chapter]:
    """Write report.html and report.md over all experiments that were run to their end in a folder.

    Raises:
        ConfigError: none was.
        StorageError: a file cannot be read or written.
    """
    found = ((out / name, read_results(out / name)) for name in EXPERIMENTS)
    chapters = [Chapter.read(folder, results) for folder, results in found if "findings" in results]
    if not chapters:
        raise ConfigError(f"{out}: no experiment was run to its end here; run one with `caravan reproduce NAME --out`")
    write_page(out, chapters)
    return chapters


def _write_chapter(folder: Path, before: Sequence[str]) -> Chapter:
    """Write an experiment's table, and remove the charts that an earlier run drew and this one did not."""
    chapter = Chapter.read(folder, read_results(folder))
    for name in set(before) - {chart.name for chart in chapter.findings.charts}:
        for ending in ("png", "svg"):
            (folder / f"{name}.{ending}").unlink(missing_ok=True)
    with whole_file(folder / "table.md") as temporary:
        temporary.write_text(markdown_of(chapter), encoding="utf-8")
    return chapter


def _command(name: str, request: Request) -> str:
    default = BackboneConfig()
    words = ["caravan reproduce", name, *(["--quick"] if request.quick else [])]
    words += [f"--backbone {quote(request.backbone.name)}"] if request.backbone.name != default.name else []
    words += [f"--device {request.backbone.device}"] if request.backbone.device != default.device else []
    words += [f"--seeds {','.join(map(str, request.seeds))}"] if request.seeds else []
    words += [f"--set {quote(f'{key}={_toml(value)}')}" for key, value in (request.changes or {}).items()]
    return " ".join([*words, f"--out {quote(os.fspath(request.out))}"])


def _toml(value: Any) -> str:
    """A value as TOML on one line; JSON is, but for tables."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{json.dumps(key)} = {_toml(inner)}' for key, inner in value.items())}}}"
    return json.dumps(value)
