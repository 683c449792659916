"""The commands of a federation of real machines: `caravan federate init`, `server`, `client`, `submit`, `status`."""

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from caravan.app.nodes.operation import Command

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="""Train on machines that keep their queries, with Flower between them.

    caravan federate init shop --documents faq.csv --node oslo --node lima --host fed.example.org
    caravan federate server shop
    caravan federate client shop --name oslo --data queries.csv
    caravan federate submit shop --out retriever
""",
)

Folder = Annotated[str, typer.Argument(metavar="DIR", help="The federation's folder, made by `federate init`.")]
PrintCommands = Annotated[
    bool, typer.Option("--print-commands", help="Print the commands of Flower that this runs, and run nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output instead of text.")]


@app.command()
def init(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The folder to make; it must not be there.")],
    documents: Annotated[
        str, typer.Option(metavar="FILE", help="The shared documents (doc_id, text), or a data set that has some.")
    ],
    node: Annotated[
        list[str] | None, typer.Option("--node", metavar="NAME", help="A node that takes part. Repeatable.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="This many nodes: client-0, client-1, ...")] = None,
    host: Annotated[str | None, typer.Option(help="The server's name or address, as the nodes reach it.")] = None,
    port: Annotated[int | None, typer.Option(help="The server's port, as the nodes reach it.")] = None,
    config: Annotated[
        str | None, typer.Option("--config", "-c", metavar="FILE", help="A TOML file of settings to start from.")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, e.g. training.mode=head.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Neither TLS nor node keys; on loopback addresses only.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a federation's folder: settings, documents, certificates, node keys and the Flower app.

    caravan federate init shop --documents faq.csv --node oslo --node lima
    caravan federate init here --documents helpdesk --nodes 3
    """
    from caravan.app.options import build_config

    if bool(node) == (nodes is not None):
        raise typer.BadParameter("name the nodes with --node NAME, or count them with --nodes N", param_hint="--node")
    names = sorted(node) if node else [f"client-{number}" for number in range(nodes or 0)]
    options = {
        "deployment.host": host,
        "deployment.port": port,
        "deployment.nodes": names,
        "deployment.insecure": insecure or None,
    }
    settings = build_config(config, setting, options)
    from caravan.app.nodes.deployment import init_deployment

    made = init_deployment(folder, documents, names, settings)
    if as_json:
        _print_json({"folder": str(made.folder), "nodes": names})
        return
    typer.echo(f"Made {folder} for {len(names)} nodes: {', '.join(names)}.")
    files = "caravan.toml documents.jsonl"
    if not made.config.deployment.insecure:
        files += f" certificates/ca.crt nodes/{names[0]}.key"
        typer.echo("The .key files are private: each node gets its own and no other.")
    typer.echo(f"For {names[0]}'s machine: tar -C {folder} -cf {names[0]}.tar {files}")


@app.command()
def server(folder: Folder, print_commands: PrintCommands = False) -> None:
    """Start the server, make the nodes' keys known to it, and keep it running.

    caravan federate server shop
    """
    from caravan.app.nodes.deployment import Deployment
    from caravan.app.nodes.operation import exposed, serve, server_commands

    deployment = Deployment.read(folder)
    if print_commands:
        _print_commands(server_commands(deployment))
        return
    if exposed(deployment):
        typer.echo(
            f"WARNING: whoever reaches {deployment.config.deployment.bind} can start runs, that is, run code here and "
            "on the nodes; bind to 127.0.0.1 and put a proxy in front (docs/federation.md).",
            err=True,
        )
    with _until_stopped(), serve(deployment) as process:
        settings = deployment.config.deployment
        typer.echo(f"ready: nodes connect to {settings.host}:{settings.port}; `caravan federate submit {folder}`")
        _wait(process, "the server", "its last lines say why")


@app.command()
def client(
    folder: Folder,
    data: Annotated[str, typer.Option(metavar="FILE", help="This node's queries; they stay here.")],
    name: Annotated[str | None, typer.Option(help="Which node this is; needed where several keys lie here.")] = None,
    max_examples: Annotated[int | None, typer.Option(min=1, help="Send at most this as the number of queries.")] = None,
    weight: Annotated[int | None, typer.Option(min=1, help="Send this in place of the number of queries.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", help="A number that may be sent beside the tensors. Repeatable.")
    ] = None,
    print_commands: PrintCommands = False,
) -> None:
    """Start a node, and keep it running.

    caravan federate client shop --name oslo --data queries.csv
    caravan federate client shop --data queries.csv --weight 1
    """
    from caravan.app.nodes.deployment import Deployment
    from caravan.app.nodes.operation import client_command, running, wait_for_server

    deployment = Deployment.read(folder)
    node = name or deployment.only_node()
    lets_out = {"max-examples": max_examples, "weight": weight, "metrics": " ".join(metric or ()) or None}
    command = client_command(
        deployment, node, data, lets_out={key: value for key, value in lets_out.items() if value is not None}
    )
    if print_commands:
        _print_commands([command])
        return
    if not deployment.config.deployment.insecure:
        deployment.check_files(deployment.certificate("ca.crt"), deployment.key(node))
    with _until_stopped():
        wait_for_server(deployment)  # Flower's node gives up after seconds
        with running(command.start()) as process:
            _wait(process, f"node {node}", "its last lines, or the server's, say why")


@app.command()
def submit(
    folder: Folder,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Folder for the trained retriever; DIR/model if left out.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last round of a run that failed.")] = False,
    as_json: Json = False,
    print_commands: PrintCommands = False,
) -> None:
    """Start a training on the nodes, follow it, and save the retriever; run it on the server's machine.

    caravan federate submit shop --out retriever
    caravan federate submit shop --out retriever --resume
    """
    from caravan.app.nodes import operation
    from caravan.app.nodes.deployment import Deployment

    deployment = Deployment.read(folder)
    place = out or deployment.folder / "model"
    if print_commands:
        _print_commands(operation.submit_commands(deployment, place, resume=resume))
        return
    try:
        for line in operation.submit(deployment, place, resume=resume):
            typer.echo(line, err=as_json)
    except KeyboardInterrupt:
        typer.echo(f"Interrupted; the run goes on. `caravan federate status {folder}` says where it is.", err=True)
        raise typer.Exit(130) from None
    if as_json:
        _print_json({"model": str(place)})


@app.command()
def status(folder: Folder, as_json: Json = False, print_commands: PrintCommands = False) -> None:
    """List the runs and the nodes that the server knows; run it on the server's machine.

    caravan federate status shop --json
    """
    from caravan.app.nodes import operation
    from caravan.app.nodes.deployment import Deployment

    deployment = Deployment.read(folder)
    if print_commands:
        _print_commands(operation.status_commands(deployment))
        return
    found = operation.status(deployment)
    if as_json:
        _print_json(found)
        return
    online = sum(node["status"] == "online" for node in found["nodes"])
    typer.echo(f"nodes: {online} online of {len(deployment.config.deployment.nodes)}")
    for run in found["runs"]:
        details = run.get("status-details", "N/A")
        typer.echo(f"run {run['run-id']}: {run['status']}" + (f": {details}" if details not in ("", "N/A") else ""))


def _wait(process: "subprocess.Popen[str]", what: str, reason: str) -> None:
    from caravan.errors import FederationError

    if code := process.wait():
        raise FederationError(f"{what} ended with exit code {code}; {reason}")


@contextmanager
def _until_stopped() -> Iterator[None]:
    """Take Ctrl-C, and SIGTERM as systemd sends it, for the orderly end of what runs until it is stopped."""
    before = None
    with suppress(ValueError):  # not in the main thread
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt):
            yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _print_commands(commands: "list[Command]") -> None:
    for command in commands:
        typer.echo(str(command))


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=True))
