"""The commands around versions: `caravan improve`, `caravan versions`, `caravan rollback`."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from caravan.app.command import Json, Set, print_json, work
from caravan.app.options import parse_settings

if TYPE_CHECKING:
    from caravan.app.feedback.retraining import Improvement
    from caravan.app.feedback.versions import Version

Model = Annotated[str, typer.Argument(metavar="DIR", help="A folder that `caravan train` wrote.")]
Keep = Annotated[int, typer.Option(min=1, help="Versions to keep beside the current one.")]


def improve(
    model: Model,
    data: Annotated[str | None, typer.Option(help="What it was trained on; as its record says if left out.")] = None,
    setting: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Train and compare, and change nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Put the new version in place even if it is worse.")] = False,
    keep: Keep = 5,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted attempt stood.")] = False,
    as_json: Json = False,
) -> None:
    """Learn from the results that users marked right or wrong, and from documents that came since.

    Trains on the data of then and the marks, compares old and new on queries that neither was trained on, and puts the
    new version in place if it is not worse; `caravan rollback` undoes it. Exit code 1 where the old one stays.

    caravan improve my-retriever
    caravan improve my-retriever --dry-run
    """
    from caravan.app.experiment import checkpoint_folder
    from caravan.app.feedback.retraining import improve as make_better

    changes = parse_settings(setting)
    with work(as_json, checkpoint=checkpoint_folder(model)) as bars:
        done = make_better(model, data, changes, dry_run=dry_run, force=force, keep=keep, resume=resume, report=bars)
    if as_json:
        print_json(done.to_dict())
    else:
        _print_improvement(model, done, dry_run=dry_run)
    if done.verdict.objection is not None and done.version is None:
        raise typer.Exit(1)


def versions(model: Model, as_json: Json = False) -> None:
    """List the versions of a retriever: when each was made, what was new in it, how it did beside the one before.

    caravan versions my-retriever
    """
    from caravan.app.feedback.versions import Versions

    found = Versions(model).listed()
    if as_json:
        print_json({"versions": [asdict(version) for version in found]})
    else:
        for version in found:
            _print_version(version)


def rollback(
    model: Model,
    to: Annotated[
        int | None, typer.Option(metavar="N", help="Which version; the one that the present one came from if left out.")
    ] = None,
    keep: Keep = 5,
    as_json: Json = False,
) -> None:
    """Put an earlier version back in place; documents stay as they are now, and the present version is kept.

    A running `caravan serve --watch` takes it up by itself.

    caravan rollback my-retriever
    caravan rollback my-retriever --to 3
    """
    from caravan.app.feedback.versions import Versions

    number = Versions(model).back(to, keep=keep)
    if as_json:
        print_json({"version": number})
    else:
        typer.echo(f"Version {number} is in place. The one before it is kept: caravan versions {model}")


def _print_improvement(model: str, done: "Improvement", *, dry_run: bool) -> None:
    taught = done.lessons
    typer.echo(
        f"{len(done.marked.marks)} marks: {len(taught.examples)} queries learned, {len(taught.questions)} held back, "
        f"{len(taught.contradicted)} wrong pairs, {taught.gone} of removed documents, "
        f"{len(done.marked.damaged)} damaged lines; {done.left_out} training queries left out"
    )
    for line in done.marked.damaged[:3]:
        typer.echo(f"  passed over: {line}")
    typer.echo(f"{'answered first':<18} {'queries':>7} {'old':>7} {'new':>7} {'won':>5} {'lost':>5}")
    for tally in done.verdict.tallies:
        shares = [f"{100 * count / tally.questions:.1f}%" for count in (tally.old, tally.new)]
        typer.echo(
            f"{tally.name:<18} {tally.questions:>7} {shares[0]:>7} {shares[1]:>7} {tally.won:>5} {tally.lost:>5}"
        )
    if done.version is not None:
        typer.echo(f"Version {done.version} is in place. To undo this: caravan rollback {model}")
    elif done.verdict.objection is not None:
        typer.echo(f"The old version stays: {done.verdict.objection}. With --force the new one takes its place.")
    else:
        assert dry_run
        typer.echo("The new version is not worse. Nothing was changed, as --dry-run says.")


def _print_version(version: "Version") -> None:
    origin = f" from {version.of}" if version.of is not None else ""
    time = version.time[:16].replace("T", " ")
    typer.echo(f"{'*' if version.current else ' '} {version.number:>3}  {time}  {version.what}{origin}")
    for tally in version.comparison.get("tallies", ()):
        typer.echo(
            f"       {tally['name']}: {tally['new']} of {tally['questions']} answered first, {tally['old']} before"
        )
