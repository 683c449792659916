"""The command `caravan reproduce`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from caravan.app.command import Json, print_json, work
from caravan.app.options import parse_settings

if TYPE_CHECKING:
    from caravan.app.reproduction.page import Chapter


def reproduce(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Experiments, or all; report: the report alone.")
    ],
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="Each experiment gets a folder in it.")] = (
        "results/reproduce"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="The short form: under five minutes each.")] = False,
    data: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="A folder of data sets; $CARAVAN_DATA if left out."),
    ] = None,
    backbone: Annotated[str, typer.Option(help="minilm, a model folder, or a Hugging Face id.")] = "minilm",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...")] = "cpu",
    seeds: Annotated[str | None, typer.Option(metavar="1,2,3", help="In place of the experiment's own.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the experiment's own TOML file. Repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the paper's tables and figures again, and write them beside its own: table.md, plots, report.html.

    Repeat the command to go on after a stop: what is measured is not measured again. Several experiments may run at
    once with the same --out, each in a process of its own.

    caravan reproduce retrieval --quick
    caravan reproduce all --out results/reproduce --device cuda
    caravan reproduce pooling --backbone TinyLlama/TinyLlama-1.1B-Chat-v1.0 --device cuda
    caravan reproduce report --out results/reproduce
    """
    from caravan.app.reproduction import runner

    place = Path(out)
    if names == ["report"]:
        chapters = runner.write_report(place)
    else:
        from caravan.config import config_from_dict

        request = runner.Request(
            out=place,
            quick=quick,
            data=_folder(data, "CARAVAN_DATA", "data"),
            models=_folder(None, "CARAVAN_MODELS", "models"),
            backbone=config_from_dict(
                {"backbone": {"name": backbone, "device": device}}, source="the options"
            ).backbone,
            seeds=None if seeds is None else _numbers(seeds),
            changes=parse_settings(setting),
        )
        with work(as_json) as bars:
            chapters = runner.reproduce(names, request, report=bars)
    if as_json:
        print_json({"out": out, "experiments": {each.name: each.results["findings"] for each in chapters}})
    else:
        for chapter in chapters:
            _print_chapter(chapter)
        typer.echo(f"All figures: {place / 'report.html'}")


def _folder(given: str | None, variable: str, name: str) -> Path | None:
    """The folder that was named, or the one beside a clone of the repository where there is one."""
    from caravan.errors import DataError

    named = given or os.environ.get(variable)
    beside = Path("..", "shared", name)
    if named is None:
        return beside if beside.is_dir() else None
    if not Path(named).is_dir():
        raise DataError(f"{named}: no such folder; give one that exists, or leave it out (--data, ${variable})")
    return Path(named)


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise typer.BadParameter("give whole numbers with commas between, e.g. 1,2,3", param_hint="--seeds") from None


def _print_chapter(chapter: "Chapter") -> None:
    typer.echo(f"\n{chapter.name}")
    for claim in chapter.findings.claims:
        typer.echo(f"  {claim.verdict}: {claim.says} (paper: {claim.paper}; ours: {claim.ours})")
    for note in chapter.findings.notes:
        typer.echo(f"  {note}")
