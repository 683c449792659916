"""A federation of real processes on this machine: server, nodes and runs, as an operator starts them."""

import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomli_w

from caravan.app.nodes.deployment import init_deployment
from caravan.config import Config
from command_line import PROGRAM
from toy_experiments import Place

_PROGRAM = f"import sys; sys.argv[0] = {str(PROGRAM)!r}; from caravan.app.cli import main; main()"
_WORKING = "Start `flwr-clientapp` process"  # says each of them in its node's log
_WAIT_SECONDS = 900.0  # for anything at all, on a machine that has other work; no test may hang for ever


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_folder(folder: Path, place: Place, config: Config, nodes: Sequence[str]) -> Path:
    """Make a federation's folder on a port that is free, for a machine that takes its time."""
    deployment = replace(config.deployment, port=free_port(), connect_seconds=_WAIT_SECONDS / 3)
    return init_deployment(
        folder, str(place.data / "documents.csv"), nodes, replace(config, deployment=deployment)
    ).folder


def wait_until(condition: Callable[[], Any], what: Callable[[], str], *, seconds: float = _WAIT_SECONDS) -> Any:
    """Wait for something to be true, and give it; fail with what `what` says."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)
    return found


@dataclass
class RealFederation:
    """A federation's folder, and the processes that were started around it.

    Attributes:
        folder: made by `caravan federate init`.
        logs: where each process writes.
        processes: those of the command line, by the names they were started under.
        seen: all processes that ever belonged to them; Flower starts some in sessions of their own.
        begun: how often each node had worked before the training that was begun last.
    """

    folder: Path
    logs: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    seen: set[tuple[int, str]] = field(default_factory=set)
    begun: dict[str, int] = field(default_factory=dict)

    def start(self, name: str, *arguments: object, **settings: str) -> subprocess.Popen[bytes]:
        """Start `caravan federate ...` as a process with a log; `settings` are further environment variables."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25", **settings}
        if name in self.processes:
            self.stop(name)
        path = self.logs / f"{name}.log"
        path.write_bytes(b"")
        with path.open("ab") as log:  # what is left of an earlier process of this name may write to it, too
            process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, "federate", *map(str, arguments)],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        self.processes[name] = process
        return process

    def said(self, name: str) -> str:
        return (self.logs / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def wait_for(self, name: str, text: str) -> None:
        """Wait until a process has said something."""

        def heard() -> bool:
            ended = self.processes[name].poll() is not None
            there = text in self.said(name)
            assert there or not ended, self.said(name)
            return there

        wait_until(heard, lambda: self.said(name))

    def end_of(self, name: str) -> int:
        """Wait for a process; its exit code."""
        process = self.processes[name]
        wait_until(lambda: process.poll() is not None, lambda: f"{name} does not end: {self.said(name)}")
        return process.returncode

    def serve(self, **settings: str) -> None:
        """Start the server and wait until it is ready."""
        self.start("server", "server", self.folder, **settings)
        self.wait_for("server", "ready: nodes connect to")

    def join(
        self,
        node: str,
        data: Path,
        *options: object,
        folder: Path | None = None,
        log: str | None = None,
        **settings: str,
    ) -> subprocess.Popen[bytes]:
        """Start a node."""
        arguments = ("client", folder or self.folder, "--name", node, "--data", data, *options)
        return self.start(log or node, *arguments, **settings)

    def submit(self, out: Path, *options: object) -> int:
        """Run a training to its end; the exit code."""
        self.begin(out, *options)
        return self.end_of("submit")

    def begin(self, out: Path, *options: object) -> None:
        """Start a training."""
        self.begun = {name: self.said(name).count(_WORKING) for name in self.processes if name != "submit"}
        self.start("submit", "submit", self.folder, "--out", out, *options)

    def worker(self, name: str, number: int = 1) -> int:
        """Wait until a node is at work for the n-th time since `begin`; the id of its process."""
        count = self.begun.get(name, 0) + number
        wait_until(lambda: self.said(name).count(_WORKING) >= count, lambda: self.said(name))
        return self.process_of(name, "flwr-clientapp")

    def process_of(self, name: str, program: str) -> int:
        """Wait until Flower's latest process of a program below one of ours has a task and loads torch; its id."""

        def latest() -> int | None:
            found = sorted(self.processes_of(name, program), key=lambda pid: int(_started(pid) or 0))
            return found[-1] if found and "libtorch_cpu" in _read(found[-1], "maps") else None

        return wait_until(latest, lambda: f"no {program} below {name}: {self.said(name)}")

    def processes_of(self, name: str, program: str) -> list[int]:
        """Flower's processes of a program below one of ours."""
        return [pid for pid in self._below(name) if program in _read(pid, "cmdline")]

    def change(self, section: str, **values: object) -> None:
        """Change settings of the runs to come."""
        path = self.folder / "caravan.toml"
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
        settings[section] |= values
        path.write_text(tomli_w.dumps(settings), encoding="utf-8")

    def stop(self, name: str) -> None:
        """End a process as an operator does, and all that it has started."""
        self._remember()
        process = self.processes.pop(name)
        if process.poll() is None:
            process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        self._kill_group(process)

    def kill(self, name: str) -> None:
        """End a process and all that it has started as a power cut does."""
        self._remember()
        below, process = self._below(name), self.processes.pop(name)
        self._kill_group(process)
        for pid in below:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """End everything, nodes before the server, and whatever of theirs is left."""
        for name in reversed(list(self.processes)):
            self.stop(name)
        for pid, started in self.seen:
            with suppress(ProcessLookupError):
                if _started(pid) == started:
                    os.kill(pid, signal.SIGKILL)

    def _kill_group(self, process: subprocess.Popen[bytes]) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _below(self, name: str) -> list[int]:
        """All that a process has started, and what these have."""
        parents = {pid: parent for pid in _all_processes() if (parent := _parent(pid))}
        found = [self.processes[name].pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        self.seen |= {(pid, started) for pid in found[1:] if (started := _started(pid))}
        return found[1:]

    def _remember(self) -> None:
        for name in self.processes:
            self._below(name)


def _all_processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
    except OSError:  # it has ended
        return ""


def _parent(pid: int) -> int:
    status = _read(pid, "stat").rpartition(") ")[2].split()
    return int(status[1]) if status else 0


def _started(pid: int) -> str:
    """When a process was started: with its id, its name for ever."""
    status = _read(pid, "stat").rpartition(") ")[2].split()
    return status[19] if status else ""


@contextmanager
def real_federation(folder: Path) -> Iterator[RealFederation]:
    """Have all processes stopped in the end, whatever happens."""
    logs = folder.parent / "logs"
    logs.mkdir()
    federation = RealFederation(folder, logs)
    try:
        yield federation
    finally:
        federation.close()
