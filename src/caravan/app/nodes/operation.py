"""Running a federation: which commands of Flower do what, and their processes watched to an honest end."""

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from caravan.app.nodes.deployment import Deployment
from caravan.errors import ConfigError, FederationError, StorageError
from caravan.federation import starting
from caravan.federation.keys import is_loopback
from caravan.files import make_folder, whole_file

CONNECTION = "caravan"  # the name under which Flower's own commands find the server
MARK = "caravan: "  # begins the lines of Flower's log that are meant for people, see `coordinator`

_START_SECONDS = 300.0  # a very busy machine takes minutes to load Flower
_STOP_SECONDS = 15.0  # to end the processes it has started; then it is killed
_POLL_SECONDS = 0.2
_ON_ITS_WAY = ("pending", "starting", "running")
_KNOWN_KEY = "Public key already in use"  # by this node, where the server was started before


@dataclass(frozen=True)
class Command:
    """One command of Flower, and the environment it needs.

    Attributes:
        words: program and arguments.
        environment: variables beside those that are set already.
        programs: a folder for the front of PATH: Flower starts its further programs by name.
    """

    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    programs: Path | None = None

    def __str__(self) -> str:
        """The line to type into a shell."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        if self.programs is not None:
            settings.append(f'PATH={shlex.quote(str(self.programs))}:"$PATH"')
        return " ".join([*settings, shlex.join(self.words)])

    def start(self, **options: Any) -> subprocess.Popen[str]:
        """Start the process.

        Raises:
            FederationError: Flower is not installed.
        """
        beside = Path(sys.executable).parent
        program = beside / self.words[0]
        first = [str(self.programs)] if self.programs is not None else []
        path = os.pathsep.join((*first, str(beside), os.environ.get("PATH", os.defpath)))
        environment = {**os.environ, **self.environment, "PATH": path, "PYTHONUNBUFFERED": "1"}
        try:
            return subprocess.Popen(
                [str(program), *self.words[1:]], env=environment, text=True, stdin=subprocess.DEVNULL, **options
            )
        except OSError as error:
            raise FederationError(
                f'{program}: cannot be started ({error.strerror}); pip install "caravan[federated]"'
            ) from None


def server_commands(deployment: Deployment) -> list[Command]:
    """The commands that start the server and make the nodes' keys known to it."""
    settings, environment = deployment.config.deployment, _environment(deployment, "server")
    environment["CARAVAN_FEDERATION"] = str(deployment.folder)
    words = ["flower-superlink", "--host", settings.bind, "--port", str(settings.bind_port or settings.port)]
    if settings.insecure:
        words.append("--insecure")
    else:
        words += ["--ssl-ca-certfile", str(deployment.certificate("ca.crt"))]
        words += ["--ssl-certfile", str(deployment.certificate("server.crt"))]
        words += ["--ssl-keyfile", str(deployment.certificate("server.key"))]
        words.append("--enable-supernode-auth")
    words += ["--disable-runtime-dependency-installation", "--database", str(deployment.folder / "flower" / "state.db")]
    return [Command(words, environment, _programs(deployment)), *_register_commands(deployment)]


def _register_commands(deployment: Deployment) -> list[Command]:
    if deployment.config.deployment.insecure:
        return []
    environment = _connection(deployment)
    return [
        Command(
            ["flwr", "supernode", "register", str(deployment.public_key(node)), CONNECTION, "--name", node], environment
        )
        for node in deployment.config.deployment.nodes
    ]


def client_command(
    deployment: Deployment, node: str, data: str | Path, *, lets_out: Mapping[str, object] | None = None
) -> Command:
    """The command that starts a node.

    Args:
        deployment: the federation's folder, or a part of it on the node's machine.
        node: its name.
        data: its queries.
        lets_out: `max-examples`, `weight` and `metrics`, see `node.policy_of`.

    Raises:
        ConfigError: the federation has no such node.
    """
    settings = deployment.config.deployment
    if node not in settings.nodes:
        raise ConfigError(f"{node} is not among deployment.nodes ({', '.join(settings.nodes)}); check --name")
    environment = _environment(deployment, node)
    own = {
        "name": node,
        "folder": str(deployment.folder),
        "data": str(Path(data).absolute()),
        "cache": os.environ.get("CARAVAN_CACHE") or str(deployment.folder / "cache"),
        **(lets_out or {}),
    }
    # A file, because Flower's own quoting knows no path with an apostrophe.
    configuration = _write(Path(environment["FLWR_HOME"]) / "node.toml", own)
    words = ["flower-supernode", "--superlink", f"{settings.host}:{settings.port}"]
    if settings.insecure:
        words.append("--insecure")
    else:
        words += ["--root-certificates", str(deployment.certificate("ca.crt"))]
        words += ["--auth-supernode-private-key", str(deployment.key(node))]
    words += ["--host", "127.0.0.1", "--port", str(_free_port()), "--node-config", str(configuration)]
    return Command(words, environment, _programs(deployment))


def submit_commands(deployment: Deployment, out: str | Path, *, resume: bool = False) -> list[Command]:
    """The commands that start a run, follow it, and say how it ended; RUN_ID stands for what the first one prints."""
    environment = _connection(deployment)
    run = {"out": str(Path(out).absolute()), "resume": resume}
    configuration = _write(Path(environment["FLWR_HOME"]) / "run.toml", run)
    return [
        Command(
            ["flwr", "run", str(deployment.app), CONNECTION, "--run-config", str(configuration), "--format", "json"],
            environment,
        ),
        Command(["flwr", "log", "RUN_ID", CONNECTION, "--stream"], environment),
        Command(["flwr", "list", CONNECTION, "--run-id", "RUN_ID", "--format", "json"], environment),
    ]


def status_commands(deployment: Deployment) -> list[Command]:
    """The commands that list runs and nodes."""
    environment = _connection(deployment)
    return [
        Command(["flwr", "list", CONNECTION, "--format", "json"], environment),
        Command(["flwr", "supernode", "list", CONNECTION, "--format", "json"], environment),
    ]


@contextmanager
def serve(deployment: Deployment) -> Iterator[subprocess.Popen[str]]:
    """Start the server, wait until it listens, and make the nodes' keys known; stopped at the end.

    Raises:
        StorageError: a certificate or key is missing or can be read by others.
        FederationError: the server does not start, or refuses a key.
    """
    settings = deployment.config.deployment
    if not settings.insecure:
        deployment.check_files(*(deployment.certificate(name) for name in ("ca.crt", "server.crt", "server.key")))
        deployment.check_files(*(deployment.public_key(node) for node in settings.nodes))
    start, *registrations = server_commands(deployment)
    port = settings.bind_port or settings.port
    if _listens(_reached(settings.bind), port):
        raise FederationError(f"something listens on {settings.bind}:{port} already; stop it, or set another port")
    with running(start.start()) as server:
        _wait_until_it_listens(server, _reached(settings.bind), port)
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        processes = [command.start(**pipes) for command in registrations]
        for node, process in zip(settings.nodes, processes, strict=bool(processes)):
            said = _last_words(process.communicate()[0])
            if process.returncode and _KNOWN_KEY not in said:
                raise FederationError(f"the key of node {node} is refused: {said}")
        yield server


def wait_for_server(deployment: Deployment) -> None:
    """Wait, as long as it takes, until something listens where the nodes reach the server."""
    settings = deployment.config.deployment
    while not _listens(settings.host, settings.port):
        time.sleep(_POLL_SECONDS)


@contextmanager
def running(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Have a process stopped, kindly at first, when the block ends."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def submit(deployment: Deployment, out: str | Path, *, resume: bool = False) -> Iterator[str]:
    """Start a run and follow it: what it says, line by line.

    Raises:
        FederationError: the server cannot be reached or the run did not end well; the message has its reason.
    """
    run, follow, status = submit_commands(deployment, out, resume=resume)
    number = str(_ask(run)["run-id"])
    yield f"run {number} started"
    log = make_folder(deployment.folder / "flower" / "runs") / f"{number}.log"
    process = _filled_in(follow, number).start(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with running(process), log.open("w", encoding="utf-8") as file:
        for line in process.stdout or ():
            file.write(line)
            if line.startswith(MARK):
                yield line.removeprefix(MARK).rstrip("\n")
    # The log may end a moment before the run's state says so.
    while (state := _ask(_filled_in(status, number))["runs"][0])["status"].split(":")[0] in _ON_ITS_WAY:
        time.sleep(_POLL_SECONDS)
    if state["status"] != "finished:completed":
        reason = str(state.get("status-details", "")).removeprefix("ServerApp failed with exception: ")
        raise FederationError(f"run {number} {state['status'].removeprefix('finished:')}: {reason} (all of it: {log})")


def status(deployment: Deployment) -> dict[str, Any]:
    """Which runs and nodes the server knows.

    Raises:
        FederationError: the server cannot be reached.
    """
    runs, nodes = (_ask(command) for command in status_commands(deployment))
    return {"runs": runs["runs"], "nodes": nodes["nodes"]}


def _filled_in(command: Command, number: str) -> Command:
    return Command([number if word == "RUN_ID" else word for word in command.words], command.environment)


def _ask(command: Command) -> dict[str, Any]:
    """Run a command that prints one JSON object.

    Raises:
        FederationError: it failed; Flower's commands exit with 0 even then.
    """
    process = command.start(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    try:
        answer = json.loads(out[out.index("{") :])
    except ValueError:
        raise FederationError(f"{' '.join(command.words[:2])} failed: {_last_words(out + err)}") from None
    if not answer.get("success"):
        raise FederationError(f"{' '.join(command.words[:2])} failed: {_last_words(str(answer.get('error-message')))}")
    return answer


def _last_words(said: str) -> str:
    lines = [line for line in (line.strip(" │╭╮╰╯─\t") for line in said.splitlines()) if line]
    return " ".join(lines)[-300:] or "without a word"


def _programs(deployment: Deployment) -> Path:
    """Programs by the names of Flower's own, which do not lose their task on a busy machine."""
    folder = make_folder(deployment.folder / "flower" / "programs")
    for program in starting.PROGRAMS:
        line = shlex.join([sys.executable, "-P", "-m", starting.__name__, program])
        with whole_file(folder / program) as path:
            path.write_text(f'#!/bin/sh\nexec {line} "$@"\n', encoding="utf-8")
        (folder / program).chmod(0o755)
    return folder


def _environment(deployment: Deployment, role: str) -> dict[str, str]:
    # Every role has a home of its own: processes that start together would write the same files.
    home = make_folder(deployment.folder / "flower" / role)
    return {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


def _connection(deployment: Deployment) -> dict[str, str]:
    """The environment of Flower's own commands, with the address in their configuration."""
    settings, environment = deployment.config.deployment, _environment(deployment, "operator")
    address = f"{_bracketed(_reached(settings.bind))}:{settings.bind_port or settings.port}"
    connection: dict[str, object] = {"address": address}
    if settings.insecure:
        connection["insecure"] = True
    else:
        connection["root-certificates"] = str(deployment.certificate("ca.crt"))
    _write(
        Path(environment["FLWR_HOME"]) / "config.toml", {"superlink": {"default": CONNECTION, CONNECTION: connection}}
    )
    return environment


def _reached(bind: str) -> str:
    """Where the server that listens there is reached from its own machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bind, bind)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def exposed(deployment: Deployment) -> bool:
    """Whether others than this machine's users can reach what starts runs."""
    return not is_loopback(deployment.config.deployment.bind)


def _write(path: Path, values: Mapping[str, object]) -> Path:
    try:
        path.write_text(tomli_w.dumps(values), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}; give the folder's owner the right") from None
    return path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _listens(host: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


def _wait_until_it_listens(server: subprocess.Popen[str], host: str, port: int) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not _listens(host, port):
        if server.poll() is not None:
            raise FederationError(f"the server did not start (exit code {server.returncode}); its last lines say why")
        if time.monotonic() > deadline:
            raise FederationError(f"the server does not listen after {_START_SECONDS:g} seconds; look at its lines")
        time.sleep(_POLL_SECONDS)
