"""The service as processes: a socket, a log, one worker or several (the only uvicorn importer)."""

import dataclasses
import json
import logging
import os
import shutil
import socket
import sys
from tempfile import mkdtemp
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.supervisors import Multiprocess

from caravan.app.answers.writing import Writing
from caravan.app.web.access import read_keys
from caravan.app.web.asking import Asking
from caravan.app.web.gate import JsonLines
from caravan.app.web.limits import Limits, Terms
from caravan.app.web.metrics import FOLDER_VARIABLE, Metrics
from caravan.app.web.service import make_app
from caravan.app.web.shelf import Shelf
from caravan.errors import CaravanError, ConfigError

_TERMS = "CARAVAN_SERVE_TERMS"  # how a worker process learns what it serves
_GRACE = 30  # seconds that requests may take to end once the service is told to stop
# Compiled steps that oneDNN keeps, by the batch's shape. Shapes are many and compiling is quick; up to its own limit of
# 1,024 the memory of a busy service would grow for hours.
_KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
_SILENCE = 30  # seconds without a sign after which a worker is taken for hung: 5 are too few while one imports torch


def host(terms: Terms, address: str, port: int, *, workers: int) -> None:
    """Serve until told to stop.

    Raises:
        CaravanError: the folder, the keys, the generator or the port cannot be used.
    """
    os.environ.setdefault(*_KERNELS)
    app = application(terms) if workers == 1 else None
    if app is None:
        Asking(Shelf(dataclasses.replace(terms, mips=False), Metrics()))  # a damaged folder is told once, here
        read_keys(terms.keys, local_changes=terms.local_changes)
    with _listening(address, port) as listener:
        shown = f"[{address}]" if ":" in address else address
        print(f"Serving {terms.folder} at http://{shown}:{listener.getsockname()[1]}", file=sys.stderr, flush=True)  # noqa: T201
        if app is not None:
            Server(_config(app)).run(sockets=[listener])
            return
        counters = mkdtemp(prefix="caravan-metrics-")
        os.environ |= {_TERMS: json.dumps(dataclasses.asdict(terms)), FOLDER_VARIABLE: counters}
        try:
            config = _config(f"{__name__}:worker", factory=True, workers=workers)
            Multiprocess(config, target=Server(config).run, sockets=[listener]).run()
        finally:
            shutil.rmtree(counters, ignore_errors=True)


def application(terms: Terms) -> FastAPI:
    """Load what is to be served, with the log set up.

    Raises:
        CaravanError: the folder, the keys or the generator cannot be used.
    """
    _set_up_log()
    metrics = Metrics()
    keys = read_keys(terms.keys, local_changes=terms.local_changes)
    return make_app(Shelf(terms, metrics), keys, metrics)


def worker() -> FastAPI:
    """The application of one of several processes, which are told by the environment what to serve."""
    values = json.loads(os.environ[_TERMS])
    values |= {"limits": Limits(**values["limits"]), "origins": tuple(values["origins"])}
    values["writing"] = Writing(**values["writing"])
    try:
        return application(Terms(**values))
    except CaravanError as error:  # the folder was damaged since the first process looked
        logging.getLogger("caravan.service").error("cannot start", extra={"fields": {"error": str(error)}})
        sys.exit(1)


class Server(uvicorn.Server):
    """A server that tells its application when it begins to stop: else streams without an end would hold it up."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop, once every request was answered."""
        application: Any = self.config.loaded_app
        application.state.service.closing.set()
        await super().shutdown(sockets)


def _config(app: "FastAPI | str", **options: object) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,  # it would hold what stands in a path
        timeout_graceful_shutdown=_GRACE,
        timeout_worker_healthcheck=_SILENCE,
        ws="none",  # there is nothing to speak it with
        proxy_headers=False,  # else anybody could say to come from loopback
        server_header=False,
        **options,  # pyright: ignore[reportArgumentType]
    )


def _set_up_log() -> None:
    log = logging.getLogger("caravan.service")
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def _listening(address: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, port), family=family, backlog=2048)
        listener.set_inheritable(True)
        return listener
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{address}, port {port}: cannot listen there: {reason}; choose another --port") from None
