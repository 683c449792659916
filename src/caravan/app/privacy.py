"""The commands about privacy: `caravan privacy plan`, `ledger` and `audit`."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from caravan.app.command import Config, Json, Set, print_json, work
from caravan.app.options import build_config

if TYPE_CHECKING:
    from caravan.app.auditing import Verdict
    from caravan.app.planning import Plan
    from caravan.training.ledger import Entry, Ledger

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="""Plan a training with differential privacy, see what data has been used for, and attack the mechanism.

    caravan privacy plan --examples 4472 --epochs 10 --batch 512 --epsilon 3
    caravan privacy ledger
    caravan privacy audit --repeats 20
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


@app.command()
def audit(
    epsilon: Annotated[float, typer.Option(help="Of the step that is attacked, by the accountant.")] = 3.0,
    delta: Annotated[float, typer.Option(help="Chance of failure.")] = 1e-5,
    repeats: Annotated[int, typer.Option(min=1, help="How many attacks.")] = 1,
    canaries: Annotated[int, typer.Option(min=2, help="Of each attack; more can show more.")] = 1000,
    config: Config = None,
    setting: Set = None,
    as_json: Json = False,
) -> None:
    """Attack one step of private training: what the attack proves must stay below the accounted epsilon.

    Canaries of known gradients, far louder than the clip, are trained on or not by the toss of a coin, and the coins
    are guessed from what the weights changed by. To pass proves nothing but that there is no gross fault; to fail, with
    exit code 1, is a fault but for one chance in 20.

    caravan privacy audit
    caravan privacy audit --repeats 20 --set privacy.clip=8 --json
    """
    settings = build_config(config, setting, {})
    from caravan.app.auditing import attack

    with work(as_json) as bars:
        verdict = attack(settings, epsilon, delta=delta, repeats=repeats, canaries=canaries, report=bars)
    if as_json:
        print_json(verdict.to_dict())
    else:
        _print_verdict(verdict)
    if verdict.passed < len(verdict.audits):
        raise typer.Exit(1)


def _print_verdict(verdict: "Verdict") -> None:
    from caravan.app.display import print_facts

    first = verdict.audits[0]
    bounds = sorted(audit.lower_bound for audit in verdict.audits)
    print_facts(
        {
            "mechanism": f"{verdict.privacy.mode}, unit {verdict.privacy.unit}, clip {verdict.privacy.clip:g}",
            "sigma": verdict.sigma,
            "accounted": str(verdict.accounted),
            "attacks": f"{len(bounds)}, each with {first.canaries:,} canaries and {first.guesses:,} guesses",
            "lower bound": f"{bounds[0]:.2f} to {bounds[-1]:.2f}, each with confidence {first.confidence:.4g}",
            "could have shown": f"{first.ceiling:.2f}",
            "passed": f"{verdict.passed} of {len(bounds)}",
        }
    )


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
    from caravan.app.planning import plain
    from caravan.training.accounting import default_delta

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
