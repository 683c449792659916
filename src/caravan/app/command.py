"""What the commands share: options that mean the same everywhere, bars around the work, JSON."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from click import Command, Context
from typer.core import TyperGroup

from caravan.config import AUTO

if TYPE_CHECKING:
    from caravan.app.display import Bars

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output instead of text.")]
Config = Annotated[
    str | None, typer.Option("--config", "-c", metavar="FILE", help="A TOML file; options given here win over it.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting, e.g. --set head.hidden=0. Repeatable."),
]


def number_or_auto(text: str) -> float | str:
    """Read a learning rate.

    Raises:
        BadParameter: it is neither a number nor "auto".
    """
    if text == AUTO:
        return text
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number nor {AUTO}") from None


LearningRate = Annotated[
    Any,
    typer.Option(
        parser=number_or_auto,
        metavar="RATE",
        help="Of the adapter, or of the head in head mode; auto chooses it on held-out queries (head) or by the loss's "
        "curvature.",
    ),
]


class TwoWords(TyperGroup):
    """Commands of which a name may be two words, beside one of the first word alone that takes any arguments."""

    def resolve_command(self, ctx: Context, args: list[str]) -> tuple[str | None, Command | None, list[str]]:
        """Take two words for the name where there is such a command, else the first."""
        name = " ".join(args[:2])
        return super().resolve_command(ctx, [name, *args[2:]] if name in self.commands else args)


@contextmanager
def work(as_json: bool, *, checkpoint: Path | None = None) -> Iterator["Bars"]:
    """Show bars while the work goes on, and end with exit code 130 where it is interrupted."""
    from caravan.app.display import Bars

    try:
        with Bars(quiet=as_json) as bars:
            yield bars
    except KeyboardInterrupt:
        kept = checkpoint is not None and checkpoint.is_dir()
        typer.echo("Interrupted." + (" Repeat the command with --resume to go on." if kept else ""), err=True)
        raise typer.Exit(130) from None


def print_json(value: Any) -> None:
    """Print plain values as one JSON object."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=True))
