"""The command line as a user meets it: called in this process for speed, or as the installed program."""

import csv
import hashlib
import io
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import environ
from pathlib import Path
from typing import IO, Any
from unittest import mock

from caravan import errors
from caravan.app.cli import main

ERRORS = tuple(f"{name}: " for name, value in vars(errors).items() if isinstance(value, type))
PROGRAM = Path(sys.executable).with_name("caravan")


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it wrote."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Workshop:
    """Things to run commands with; no test changes them.

    Attributes:
        backbone: a model folder.
        data: a folder with `train.csv` (36 + 4 queries of two sites), `test.csv` and `documents.csv`.
        quick: a TOML file that names both and trains in milliseconds.
        model: a retriever trained with it.
    """

    backbone: Path
    data: Path
    quick: Path
    model: Path


def run(*arguments: object, stdin: bytes = b"", encoding: str = "utf-8") -> Outcome:
    """Run a command in this process, on streams of its own: pipes of a terminal with this encoding."""
    out, err = io.BytesIO(), io.BytesIO()
    streams: dict[str, Any] = {
        "argv": ["caravan", *map(str, arguments)],
        "stdin": io.TextIOWrapper(io.BytesIO(stdin), encoding=encoding),
        "stdout": io.TextIOWrapper(out, encoding=encoding),
        "stderr": io.TextIOWrapper(err, encoding=encoding),
    }
    code = 0
    with mock.patch.multiple(sys, **streams):
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        sys.stdout.flush()
        sys.stderr.flush()
    return Outcome(code, out.getvalue().decode(encoding), err.getvalue().decode(encoding))


def start_program(
    *arguments: str | bytes, stdout: int | IO[bytes] = subprocess.PIPE, settings: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start the installed program, its standard error a pipe, with further environment variables."""
    return subprocess.Popen(
        [PROGRAM, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**environ, "OMP_NUM_THREADS": "1", **(settings or {})},
    )


def run_program(*arguments: str | bytes, **settings: Any) -> Outcome:
    """Run the installed program to its end; see `start_program`."""
    process = start_program(*arguments, **settings)
    out, err = process.communicate()
    return Outcome(process.returncode, (out or b"").decode("utf-8"), err.decode("utf-8"))


def check_refused(outcome: Outcome, *says: str, code: int = 1) -> None:
    """Assert that an error is told as it should be: on one line, by its kind, naming the culprit; or as wrong usage."""
    assert outcome.code == code, outcome
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    told = outcome.err if code == 1 else " ".join(outcome.err.replace("│", " ").split())  # Typer draws a box
    for word in says:
        assert word in told
    if code == 1:
        assert outcome.err.startswith(ERRORS)
        assert outcome.err.endswith("\n")
        assert outcome.err.count("\n") == 1
        assert len(outcome.err) < 700


def listing(folder: Path) -> dict[str, str]:
    """All that lies in a folder, hidden files too: path to content hash, or to "folder"."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Path:
    """Write a CSV file, and the folder it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path
