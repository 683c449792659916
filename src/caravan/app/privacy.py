"""The commands about privacy: `caravan privacy plan` and `ledger`."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from caravan.app.command import Config, Json, Set, print_json
from caravan.app.options import build_config

if TYPE_CHECKING:
    from caravan.app.planning import Plan
    from caravan.training.ledger import Entry, Ledger

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="""Plan a training with differential privacy, and see what data has been used for.

    caravan privacy plan --examples 4472 --epochs 10 --batch 512 --epsilon 3
    caravan privacy ledger
""",
)


@app.command()
def plan(
    examples: Annotated[int, typer.Option(min=2, help="Training queries, or users, of one client.")],
    epochs: Annotated[int, typer.Option(min=1, help="Passes over them, all stages together.")],
    batch: Annotated[int, typer.Option(min=1, help="Queries, or users, a step on average.")],
    epsilon: Annotated[float | None, typer.Option(help="Find the noise for this epsilon,")] = None,
    sigma: Annotated[float | None, typer.Option(help="or the epsilon of this noise multiplier.")] = None,
    delta: Annotated[float | None, typer.Option(help="Chance of failure; examples^-1.1 if left out.")] = None,
    cap: Annotated[float | None, typer.Option(help="How often would it fit under this epsilon cap?")] = None,
    numbers: Annotated[
        int | None, typer.Option(min=1, help="How many numbers are trained, for noise to signal.")
    ] = None,
    documents: Annotated[int | None, typer.Option(min=1, help="Or count them, for a head of this many rows.")] = None,
    adapter: Annotated[str | None, typer.Option(help="With --documents: full, lowrank, core or none.")] = None,
    rank: Annotated[int | None, typer.Option(help="With --documents: of a lowrank or core adapter.")] = None,
    config: Config = None,
    setting: Set = None,
    as_json: Json = False,
) -> None:
    """Say how much noise an epsilon needs, or what epsilon some noise gives, and what would help.

    The epsilon is that of one client's data, by the tightest sound accountant, under adding or removing one example.

    caravan privacy plan --examples 4472 --epochs 10 --batch 512 --epsilon 3
    caravan privacy plan --examples 4472 --epochs 10 --batch 512 --epsilon 3 --documents 77 --adapter core --cap 8
    caravan privacy plan --examples 60000 --epochs 60 --batch 256 --sigma 1.1 --delta 1e-5 --json
    """
    if (epsilon is None) == (sigma is None):
        raise typer.BadParameter("give --epsilon to find the noise, or --sigma to find epsilon", param_hint="--epsilon")
    if numbers is not None and documents is not None:
        raise typer.BadParameter("contradicts --numbers; leave one of them out", param_hint="--documents")
    for option, value in {"--adapter": adapter, "--rank": rank}.items():
        if value is not None and documents is None:
            raise typer.BadParameter("counts what is trained; add --documents", param_hint=option)
    settings = build_config(config, setting, {"adapter.kind": adapter, "adapter.rank": rank})
    from caravan.app.planning import make_plan, trained_numbers

    if documents is not None:
        numbers = trained_numbers(settings, documents)
    made = make_plan(
        examples,
        epochs,
        batch,
        target_epsilon=epsilon,
        noise_multiplier=sigma,
        delta=delta,
        numbers=numbers,
        cap=cap,
    )
    if as_json:
        print_json(made.to_dict())
    else:
        _print_plan(made)


@app.command()
def ledger(
    folder: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where it lies; $CARAVAN_LEDGER or the user's own if left out.")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="Chance of failure; units^-1.1 if left out.")] = None,
    as_json: Json = False,
) -> None:
    """Show what each data set has been used for on this machine, and the epsilon that this comes to.

    What other data sets that share a text or a user with it were used for counts, too.

    caravan privacy ledger
    caravan privacy ledger --folder runs/ledger --json
    """
    from caravan.training.ledger import default_folder, read_ledger

    place = default_folder() if folder is None else folder
    found = [_described(each, entries, delta) for each, entries in read_ledger(place)]
    if as_json:
        print_json({"folder": str(place), "data_sets": found})
    else:
        _print_ledger(str(place), found)


def _print_plan(made: "Plan") -> None:
    from caravan.app.display import print_facts
    from caravan.training.accounting import in_figures

    by = {name: "no answer" if value is None else in_figures(value) for name, value in made.by_accountant.items()}
    facts: dict[str, Any] = {
        "sigma": made.mechanism.noise_multiplier,
        "steps": f"{made.mechanism.steps:,}",
        "sampling": made.mechanism.sampling,
        "guarantee": str(made.guarantee),
        "by accountant": by,
    }
    if made.noise_to_signal is not None:
        facts["numbers"] = f"{made.numbers:,}"
        facts["noise to signal"] = f"{made.noise_to_signal:.3g}"
    if made.runs_within_cap is not None:
        facts["runs within cap"] = made.runs_within_cap
    print_facts(facts)
    for sentence in made.advice:
        typer.echo(f"- {sentence}")


def _described(each: "Ledger", entries: "list[Entry]", delta: float | None) -> dict[str, Any]:
    from caravan.app.planning import default_delta, plain

    count = len(each.hashes)
    guarantee = each.guarantee(default_delta(max(count, 2)) if delta is None else delta)
    return {
        **{"data": each.data, "unit": each.unit, "units": count},
        **{**asdict(guarantee), "epsilon": plain(guarantee.epsilon)},
        "entries": [asdict(entry) for entry in entries],
        "guarantee": str(guarantee),
    }


def _print_ledger(place: str, found: list[dict[str, Any]]) -> None:
    from caravan.app.display import one_line

    typer.echo(f"{one_line(place)}: {len(found)} data sets")
    for each in found:
        typer.echo(f"\n{each['data'][:12]}, {each['units']:,} units ({each['unit']}): {each['guarantee']}")
        for entry in each["entries"]:
            spend = entry["mechanism"]
            what = " ".join(entry[name] for name in ("stage", "run", "part") if entry[name]) or "-"
            typer.echo(
                f"  {one_line(entry['time'])}  {spend['steps']:6,} steps  sampling {spend['sampling']:.4g}  "
                f"sigma {spend['noise_multiplier']:.4g}  {one_line(what)}"
            )
