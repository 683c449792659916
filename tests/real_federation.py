"""A federation of real processes on this machine: server, nodes and runs, as an operator starts them."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from command_line import PROGRAM

_PROGRAM = f"import sys; sys.argv[0] = {str(PROGRAM)!r}; from caravan.app.cli import main; main()"
_START_SECONDS = 300.0  # on a machine that has other work


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class RealFederation:
    """A federation's folder, and the processes that were started around it.

    Attributes:
        folder: made by `caravan federate init`.
        logs: where each process writes.
    """

    folder: Path
    logs: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *arguments: object) -> subprocess.Popen[bytes]:
        """Start `caravan federate ...` as a process with a log."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"}
        with (self.logs / f"{name}.log").open("wb") as log:
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

    def serve(self) -> None:
        """Start the server and wait until it is ready."""
        process, deadline = self.start("server", "server", self.folder), time.monotonic() + _START_SECONDS
        while "ready: nodes connect to" not in self.said("server"):
            assert process.poll() is None, self.said("server")
            assert time.monotonic() < deadline, self.said("server")
            time.sleep(0.1)

    def join(self, node: str, data: Path, *options: object, folder: Path | None = None) -> subprocess.Popen[bytes]:
        """Start a node."""
        return self.start(node, "client", folder or self.folder, "--name", node, "--data", data, *options)

    def submit(self, out: Path, *options: object) -> int:
        """Run a training to its end; the exit code."""
        return self.start("submit", "submit", self.folder, "--out", out, *options).wait()

    def stop(self, name: str) -> None:
        process = self.processes.pop(name)
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def real_federation(folder: Path) -> Iterator[RealFederation]:
    """Have all processes stopped in the end, nodes before the server."""
    logs = folder.parent / "logs"
    logs.mkdir()
    federation = RealFederation(folder, logs)
    try:
        yield federation
    finally:
        for name in reversed(list(federation.processes)):
            federation.stop(name)
