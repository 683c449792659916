"""The command line as a user meets it: called in this process for speed, or as a program of its own."""

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from caravan.app.cli import main

Program = Callable[..., subprocess.Popen[bytes]]


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it wrote."""

    code: int
    out: str
    err: str


def caravan(*arguments: object, stdin: bytes = b"") -> Outcome:
    """Run a command in this process, on streams of its own."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for name in ("stdout", "stderr")}
    source = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    argv = ["caravan", *map(str, arguments)]
    with mock.patch.multiple(sys, argv=argv, stdin=source, **streams):
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    written = []
    for stream in streams.values():
        stream.flush()
        written.append(stream.buffer.getvalue().decode("utf-8"))  # type: ignore[attr-defined]
    return Outcome(code, *written)


def program(*arguments: str | bytes, environment: Mapping[str, str] | None = None, **settings: Any) -> list[Any]:
    return []
