"""The command line: parse, call one function, print."""

import io
import logging
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from caravan import __version__
from caravan.app import ask, communicate, doctor, federate, improve, mcp, personal, privacy, reproduce, serve
from caravan.app.command import Config, Json, LearningRate, Set, TwoWords, print_json, work
from caravan.app.options import build_config, parse_settings
from caravan.errors import CaravanError

if TYPE_CHECKING:
    from caravan.app.comparison import Comparison

app = typer.Typer(
    cls=TwoWords,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Train a retriever on a frozen small language model, on one machine or across many.

A query goes through a frozen model with a small trainable adapter on its
token embeddings, and a trainable classifier head scores every document.
Only adapter and head are trained, saved and sent.

    caravan demo
    caravan train helpdesk --out my-retriever
    caravan search my-retriever "flat after 10 km??"
""",
)

Report = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Also write results.json, table.md, plots, TREC runs and qrels into this folder."),
]
Rivals = Annotated[
    bool | None, typer.Option("--baselines/--no-baselines", help="Print BM25, MIPS, centroids, 1-NN, ... beside ours.")
]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"caravan {__version__}")
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="Where the trained retriever goes.")] = "runs/helpdesk",
    config: Config = None,
    setting: Set = None,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Train on the bundled help desk, centrally and on four sites, and show where MIPS is wrong.

    Takes a few minutes on two cores.

        caravan demo
        caravan search runs/helpdesk "the bike forgot my phone"
    """
    from caravan.app.demo import run_demo

    settings = build_config(config, setting, {})
    _check_report(report)
    with work(as_json) as bars:
        result = run_demo(settings, out, report=bars)
    extra = {"model": out, "searches": result.searches_dict()}
    _show_comparison(result.comparison, as_json, extra)
    if not as_json:
        from caravan.app.display import print_searches

        print_searches(result)
        typer.echo(f'\nSaved to {out}. Ask it something: caravan search {out} "flat after 10 km??"')
    _write_report(report, result.comparison, as_json, extra)


@app.command()
def train(
    data: Annotated[
        str | None, typer.Argument(help="helpdesk, a file, a folder, or a Hugging Face data set id.")
    ] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder for the trained retriever.")] = None,
    config: Config = None,
    setting: Set = None,
    mode: Annotated[str | None, typer.Option(help="adapter: adapter and head; head: the head alone (fast).")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data in the last stage.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Queries a step in the last stage.")] = None,
    learning_rate: LearningRate = None,
    adapter: Annotated[str | None, typer.Option(help="full, lowrank, core or none.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of a lowrank or core adapter.")] = None,
    backbone: Annotated[str | None, typer.Option(help="minilm, a model folder, or a Hugging Face id.")] = None,
    pooling: Annotated[str | None, typer.Option(help="auto, mean, last or cls.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, ...")] = None,
    clients: Annotated[int | None, typer.Option(help="Train on this many clients that do not pool queries.")] = None,
    partition_by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="One client a value of this column.")
    ] = None,
    dirichlet: Annotated[
        float | None, typer.Option(metavar="ALPHA", help="Deal each document's queries unevenly.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of averaging; the epochs are divided over them.")] = None,
    clients_per_round: Annotated[int | None, typer.Option(help="Draw this many clients for each round.")] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="fedavg, fedprox, fedavgm, fedadam, fedyogi, median, trimmed_mean, krum, multi_krum or bulyan."
        ),
    ] = None,
    secure_aggregation: Annotated[
        bool | None,
        typer.Option(
            "--secure-aggregation",
            help="The server sees the sum of the clients' updates alone; needs federation.max_examples.",
        ),
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Train with differential privacy for each query: this epsilon in all.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same result.")] = None,
    documents: Annotated[
        str | None, typer.Option(metavar="FILE", help="Documents: doc_id, text, perhaps title, metadata.")
    ] = None,
    test: Annotated[str | None, typer.Option(metavar="FILE", help="Test queries.")] = None,
    text_column: Annotated[str | None, typer.Option(help="The query's column.")] = None,
    label_column: Annotated[str | None, typer.Option(help="The document id's column.")] = None,
    on_bad_row: Annotated[
        str | None, typer.Option(help="fail (default) or skip malformed rows and count them.")
    ] = None,
    baselines: Rivals = None,
    report: Report = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a killed run of the same command stood.")
    ] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print all settings as TOML and exit.")] = False,
    as_json: Json = False,
) -> None:
    """Train a retriever, measure it beside its rivals, and save it.

    caravan train helpdesk -o my-retriever
    caravan train faq.csv --test held-out.csv -o faq-retriever --mode head
    caravan train helpdesk -o sites --partition-by site --rounds 5
    caravan train faq.csv -o private --mode head --epsilon 3
    caravan train --print-config > caravan.toml
    caravan train -c caravan.toml -o my-retriever --set training.adapter.epochs=8
    """
    if partition_by is not None and dirichlet is not None:
        raise typer.BadParameter("contradicts --dirichlet; leave one of them out", param_hint="--partition-by")
    partition = None if dirichlet is None else "dirichlet"
    if partition_by is not None:
        partition, clients = "column", clients or 0  # a number of clients in the file gives way to the column
    settings = build_config(
        config,
        setting,
        {
            "seed": seed,
            "data.path": data,
            "data.documents": documents,
            "data.test": test,
            "data.text_column": text_column,
            "data.label_column": label_column,
            "data.on_bad_row": on_bad_row,
            "backbone.name": backbone,
            "backbone.pooling": pooling,
            "backbone.device": device,
            "adapter.kind": adapter,
            "adapter.rank": rank,
            "training.mode": mode,
            "federation.clients": clients,
            "federation.partition": partition,
            "federation.column": partition_by,
            "federation.alpha": dirichlet,
            "federation.rounds": rounds,
            "federation.clients_per_round": clients_per_round,
            "federation.strategy": strategy,
            "federation.secure_aggregation": secure_aggregation,
            "privacy.mode": None if epsilon is None else "dp-sgd",
            "privacy.epsilon": epsilon,
            "evaluation.baselines": baselines,
        },
        last_stage={"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate},
    )
    if not settings.federation.clients and settings.federation.partition != "column":
        of_clients = {
            "--rounds": rounds,
            "--clients-per-round": clients_per_round,
            "--strategy": strategy,
            "--secure-aggregation": secure_aggregation,
        }
        for option in (name for name, value in of_clients.items() if value is not None):
            raise typer.BadParameter("needs clients; give --clients or --partition-by", param_hint=option)
    if print_config:
        if as_json:
            print_json(settings.to_dict())
        else:
            typer.echo(settings.to_toml(), nl=False)
        return
    if out is None:
        raise typer.BadParameter("name a folder for the trained retriever, e.g. --out my-retriever", param_hint="--out")
    from caravan.app.experiment import checkpoint_folder, run_experiment

    _check_report(report)
    with work(as_json, checkpoint=checkpoint_folder(out)) as bars:
        comparison, retriever = run_experiment(settings, out, resume=resume, report=bars)
    extra = {"model": out, "latency": retriever.record.get("latency"), "seconds": retriever.record["seconds"]}
    _show_comparison(comparison, as_json, extra)
    if not as_json:
        typer.echo(
            f"Saved to {out}." + ("" if comparison else " Nothing was measured: the data has no held-out queries.")
        )
        doctor.print_hints(retriever.record, out)
    _write_report(report, comparison, as_json, extra)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A folder that `caravan train` wrote.")],
    data: Annotated[
        str | None, typer.Argument(help="What to evaluate on; the data it was trained on if left out.")
    ] = None,
    setting: Set = None,
    baselines: Rivals = None,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Measure a saved retriever on the test split, beside its rivals.

    caravan evaluate my-retriever
    caravan evaluate my-retriever other-data/ --no-baselines --json
    """
    compare([model], data=data, setting=setting, baselines=baselines, report=report, as_json=as_json)


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(help="Folders that `caravan train` wrote.")],
    data: Annotated[
        str | None, typer.Option(help="What to compare on; the first model's training data if left out.")
    ] = None,
    setting: Set = None,
    baselines: Rivals = None,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Measure several saved retrievers and their rivals on the same queries.

    What a federation sends is another command, `caravan compare communication`; write a folder of that name as
    ./communication.

    caravan compare central federated
    caravan compare head adapter --data helpdesk --report results/
    """
    from caravan.app.experiment import compare_saved

    changes = parse_settings(setting)
    _check_report(report)
    with work(as_json) as bars:
        comparison, latency = compare_saved(models, data, changes, baselines=baselines, report=bars)
    _show_comparison(comparison, as_json, {"latency": latency})
    _write_report(report, comparison, as_json, {"latency": latency})


app.command("compare communication")(communicate.communication)


@app.command()
def search(
    model: Annotated[str, typer.Argument(help="A folder that `caravan train` wrote.")],
    queries: Annotated[
        list[str] | None, typer.Argument(help="One or more queries; read from standard input if left out.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Hits a query.")] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    as_json: Json = False,
) -> None:
    """Find the documents that answer.

    caravan search my-retriever "flat after 10 km??"
    cat queries.txt | caravan search my-retriever -k 3 --json
    """
    from caravan.app.display import print_hits
    from caravan.storage import load

    asked = list(queries) if queries else [line.strip() for line in sys.stdin or () if line.strip()]
    if not asked:
        raise typer.BadParameter("give at least one query, as an argument or on standard input", param_hint="QUERIES")
    results = load(model, device=device).search(asked, k)
    if as_json:
        from dataclasses import asdict

        rows = [
            {"query": query, "hits": [asdict(hit) for hit in hits]} for query, hits in zip(asked, results, strict=True)
        ]
        print_json({"results": rows})
    else:
        print_hits(asked, results)


@app.command()
def info(
    model: Annotated[
        str | None, typer.Argument(help="A folder that `caravan train` wrote; the installation if left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a saved retriever is, or what this installation has.

    caravan info my-retriever
    caravan info --json
    """
    from caravan.app.display import describe_installation, describe_model, print_facts

    facts = describe_installation() if model is None else describe_model(model)
    if as_json:
        print_json(facts)
    else:
        print_facts(facts)


for command in (ask.ask, personal.personalise, doctor.doctor, serve.serve, mcp.mcp, reproduce.reproduce):
    app.command()(command)
for command in (improve.improve, improve.versions, improve.rollback):
    app.command()(command)
app.add_typer(federate.app, name="federate")
app.add_typer(privacy.app, name="privacy")


def main() -> None:
    """Run the command line: exit code 0, 1 for an error a user can act on, 2 for wrong usage, 130 when interrupted."""
    warnings.simplefilter("ignore")
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)  # a library's logger may let more through than the root's level says
    logging.basicConfig(format="%(levelname)s: %(message)s", handlers=[handler])
    for stream in (sys.stdout, sys.stderr):
        # A query may hold any character; a terminal that cannot show one must not end the program.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text: refused as the query they are in
    try:
        app()
    except CaravanError as error:
        _fail(f"{type(error).__name__}: {error}")
    except OSError as error:  # what writes files tells its own errors; left is mostly standard output on a full disk
        _fail(f"{type(error).__name__}: {error}; nothing more could be read or written")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):  # PyTorch has no class for it on the CPU
            raise
        _fail(f"BudgetError: not enough memory ({str(error)[:200]}); use smaller sizes, a batch_size or hidden below")


def _fail(message: str) -> NoReturn:
    # Names and cells of files may stand in a message, and in them what would steer the terminal.
    shown = "".join(part if part.isprintable() else repr(part)[1:-1] for part in " ".join(message.split()))
    typer.echo(shown, err=True)
    # What standard output did not take must not be tried again at exit, which would print a second message.
    with suppress(OSError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def _check_report(report: str | None) -> None:
    if report is not None:
        from caravan.app.report import check_report

        check_report(report)


def _show_comparison(comparison: "Comparison | None", as_json: bool, extra: dict[str, Any]) -> None:
    from caravan.app.display import print_comparison

    if as_json:
        print_json(comparison.summary(extra) if comparison is not None else extra)
    elif comparison is not None:
        print_comparison(comparison, extra.get("latency"))


def _write_report(report: str | None, comparison: "Comparison | None", as_json: bool, extra: dict[str, Any]) -> None:
    """Comes last: a report that cannot be written must not cost the table on the screen."""
    from caravan.app.report import write_report

    if report is None or comparison is None:
        return
    write_report(report, comparison, extra)
    if not as_json:
        typer.echo(f"Report written to {Path(report)}.")
