"""`caravan doctor`: what is wrong with a run, told from what its training wrote down, and what to turn."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from caravan.app.command import Json, print_json

if TYPE_CHECKING:
    from caravan.config import Config
    from caravan.training.diagnosis import Course, Finding
    from caravan.training.stages import Stage

_MBIT = 100.0  # an office's line: where even this is too slow, others are too


def doctor(
    run: Annotated[str, typer.Argument(help="A folder that `caravan train` wrote.")],
    mbit: Annotated[
        float, typer.Option(min=1e-3, help="Of the clients' lines, Mbit/s: a simulation has none.")
    ] = _MBIT,
    as_json: Json = False,
) -> None:
    """Say what is wrong with a run: the evidence, the likely cause, and what to change in which direction.

    Worst first. It reads what the training wrote down, so it takes no time and needs neither data nor backbone.

    caravan doctor my-retriever
    caravan doctor four-sites --mbit 1 --json
    """
    from caravan.storage import read_record

    record = read_record(run)
    findings = _examine_file(record, run, mbit)
    unseen = _unseen(record)
    if as_json:
        print_json({"run": run, "findings": [each.to_dict() for each in findings], "not_looked_at": unseen})
        return
    from caravan.app.display import one_line

    name = one_line(run)
    if not findings:
        typer.echo(f"{name}: healthy. No rule has found anything.")
    for number, each in enumerate(findings, start=1):
        typer.echo(f"{number}. {one_line(each.name)}")
        typer.echo(f"   evidence:     {one_line(each.evidence)}")
        typer.echo(f"   likely cause: {one_line(each.cause)}")
        typer.echo(f"   change:       {one_line(each.remedy)}")
        if each.settings:
            typer.echo(f"                 first: --set {one_line(each.settings[0])}")
    for sentence in unseen:
        typer.echo(f"Not looked at: {sentence}.")


def print_hints(record: Mapping[str, Any], run: str) -> None:
    """Say on standard error, a line each, what `caravan doctor` would say of a run; nothing of a healthy one."""
    from caravan.app.display import one_line

    findings = examine(record)
    for each in findings:
        first = f" (--set {each.settings[0]})" if each.settings else ""
        typer.echo(one_line(f"{each.name}: {each.remedy}{first}"), err=True)
    if findings:
        typer.echo(f"caravan doctor {one_line(run)} says more.", err=True)


def examine(record: Mapping[str, Any], *, mbit: float = _MBIT) -> "list[Finding]":
    """Apply every rule to a training's record, worst finding first.

    Args:
        record: as `record.training_record` makes it, with `federation` where there were clients.
        mbit: of the clients' lines where the rounds were simulated, Mbit/s.

    Raises:
        ConfigError: its settings are not settings.
    """
    from caravan.app.wording import cut_off, shredded
    from caravan.config import config_from_dict
    from caravan.federation.diagnosis import drifting, line_bound
    from caravan.training.diagnosis import diagnose

    config = config_from_dict(record["config"])
    wording = record.get("wording", {})
    findings = [shredded(wording, config.backbone), cut_off(wording, config.backbone)]
    for course in courses(record, config):
        findings += diagnose(course)
    rounds = record.get("federation", {}).get("rounds", [])
    for stage, own in _by_stage(rounds).items():
        findings.append(drifting(stage, own, config))
        measured = not record["dataset"]["train"]  # who coordinates real nodes has no queries
        findings.append(line_bound(stage, own, config, mbit=mbit, measured=measured))
    return sorted((each for each in findings if each is not None), key=lambda each: -each.severity)


def courses(record: Mapping[str, Any], config: "Config") -> "list[Course]":
    """The stages of a training as the rules look at them."""
    from caravan.training.diagnosis import Course
    from caravan.training.rate import automatic, with_rates

    sizes, federation = record["dataset"], record.get("federation")
    rows = [_of_round(each) for each in federation["rounds"]] if federation else record["history"]
    queries = sizes["train"]
    if federation:
        counts = [client["examples"] for client in federation["clients"]]
        queries = max(1, round(sum(counts) / len(counts))) if counts else 0
    found = []
    for name, own in _by_stage(rows).items():
        stage: Stage = "head" if name == "head" else "adapter"
        epochs = [_epoch(row) for row in own]
        chosen = {name: record["learning_rates"][stage][name] for name in automatic(config.training, stage)}
        training = with_rates(config.training, stage, chosen)
        share = getattr(config.training, stage).epochs / len(epochs) if federation else 1.0
        found.append(
            Course(stage, epochs, training, config.privacy, sizes["documents"], queries, sizes["validation"], share)
        )
    return found


def _by_stage(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        stages.setdefault(row["stage"], []).append(row)
    return stages


def _epoch(row: Mapping[str, Any]) -> Any:
    """An epoch as it was recorded, by this version or one that recorded less."""
    from caravan.training.vitals import EpochRecord

    names = {field.name for field in fields(EpochRecord)}
    return EpochRecord(**{"loss": None, **{name: value for name, value in row.items() if name in names}})


def _of_round(each: Mapping[str, Any]) -> dict[str, Any]:
    """A round's clients as one, weighted by their examples; what they did not tell is left out."""
    row = {
        "stage": each["stage"],
        "epoch": each["round"] - 1,
        "validation_recall": each["validation_recall"],
        "seconds": each["seconds"],
    }
    from caravan.app.traces import of_clients

    return of_clients(each) | row


def _unseen(record: Mapping[str, Any]) -> list[str]:
    """What could not be judged, and why, so that silence is not taken for health."""
    private = record["config"].get("privacy", {}).get("mode", "none") != "none"
    rounds = record.get("federation", {}).get("rounds", [])
    unseen = []
    if private:
        unseen.append("losses, cut gradients, padding and the queries' words, which privacy keeps out of the record")
    elif rounds and not any(each["metrics"] and any(each["metrics"]) for each in rounds):
        unseen.append("the clients' own losses and times, which no client lets out")
    if not private and not record["dataset"]["validation"]:
        unseen.append("over-fitting, for want of validation queries")
    return unseen


def _examine_file(record: Mapping[str, Any], run: str, mbit: float) -> "list[Finding]":
    from caravan.errors import StorageError

    try:
        return examine(record, mbit=mbit)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        what = f"not as caravan writes it ({type(error).__name__}: {error})"
        raise StorageError(f"{run}/training.json: {what}; restore the file, or train again") from None
