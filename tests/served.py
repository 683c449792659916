"""A service on a saved retriever of random numbers, asked in this process: no socket, no model of any size."""

import json
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

from fastapi import FastAPI
from starlette.testclient import TestClient

from caravan.app.web import bodies
from caravan.app.web.access import Keys, read_keys
from caravan.app.web.limits import Limits, Terms
from caravan.app.web.metrics import Metrics
from caravan.app.web.service import make_app
from caravan.app.web.shelf import Shelf

READ, WRITE = "read-key-of-16-characters", "write-key-of-16-characters"
READER, WRITER = {"Authorization": f"Bearer {READ}"}, {"Authorization": f"Bearer {WRITE}"}
KEYS = read_keys(None, {"CARAVAN_READ_KEYS": READ, "CARAVAN_WRITE_KEYS": WRITE}, local_changes=False)
HERE = Keys(local_changes=True)
BELL = {"doc_id": "bell", "title": "The bell", "text": "turn the ring to the left", "metadata": {"topic": "parts"}}


def make(folder: Path, *, keys: Keys = HERE, limits: dict[str, Any] | None = None, **terms: Any) -> FastAPI:
    """An application; `app.state.service` has its shelf."""
    metrics = Metrics()
    shelf = Shelf(Terms(folder=str(folder), limits=Limits(**limits or {}), **terms), metrics)
    return make_app(shelf, keys, metrics)


@contextmanager
def client_of(app: FastAPI, *, peer: str = "127.0.0.1", host: str = "127.0.0.1") -> Iterator[TestClient]:
    """A client on an application that was started and is ended; what fails inside is answered, not raised."""
    with TestClient(app, base_url=f"http://{host}:8000", client=(peer, 50000), raise_server_exceptions=False) as client:
        yield client


@contextmanager
def serving(folder: Path, **options: Any) -> Iterator[TestClient]:
    """`make` and `client_of` at once."""
    with client_of(make(folder, **options)) as client:
        yield client


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The application behind a real socket, in a thread; gives its address and ends it as SIGTERM would."""
    from caravan.app.web.hosting import Server, _config

    server = Server(_config(app))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def events_of(lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Server-sent events as (name, data), as they come in."""
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def streamed(client: TestClient, body: dict[str, Any]) -> list[tuple[str, Any]]:
    """The events of an answer as it is written."""
    response = client.post("/ask", json={**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return list(events_of(response.text.splitlines()))


def refusal(response, status: int) -> str:
    """The one line of an answer that refuses."""
    assert response.status_code == status, response.text
    value = bodies.ErrorAnswer.model_validate_json(response.text)
    assert "\n" not in value.error
    return value.error
