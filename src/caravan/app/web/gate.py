"""What every request passes: its size, its time, the counters, one line of the log, and errors as answers (plain ASGI).

The line names the route's template, never the path, the query string or the body that a client sent.
"""

import asyncio
import json
import logging
import secrets
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from caravan.app.web.limits import Limits, RefusedError, too_large
from caravan.app.web.metrics import Metrics
from caravan.errors import CaravanError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

NOTES = "caravan.notes"  # in a request's scope: what its route adds to the line in the log

log = logging.getLogger("caravan.service")


@dataclass(frozen=True)
class ErrorReply:
    """An error as HTTP."""

    status: int
    headers: dict[str, str]
    body: bytes


def as_reply(error: CaravanError) -> ErrorReply:
    """The one place where an error that a client can act on becomes a status and one line of JSON."""
    refused = (
        error if isinstance(error, RefusedError) else RefusedError(str(error), HTTPStatus.BAD_REQUEST, "validation")
    )
    headers = {"content-type": "application/json"}
    if refused.retry_after is not None:
        headers["retry-after"] = str(refused.retry_after)
    if refused.status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    value = {"error": " ".join(str(refused).split()), "error_type": refused.kind}
    return ErrorReply(int(refused.status), headers, json.dumps(value).encode("ascii"))


class Gate:
    """Middleware around the whole application."""

    def __init__(
        self, app: Callable[[Scope, Receive, Send], Awaitable[None]], limits: Limits, metrics: Metrics
    ) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        scope[NOTES] = {"request": secrets.token_hex(8)}

        async def counted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", scope[NOTES]["request"].encode())]
            await send(message)

        try:
            await self.app(scope, await self._whole_body(scope, receive), counted)
        except GoneError:
            status = 499  # as nginx has it: the client did not wait; nobody reads an answer
        except CaravanError as error:
            await _send(as_reply(error), counted)
        except Exception as error:
            scope[NOTES] |= frames_of(error)
            if status == 0:
                await _send(INTERNAL, counted)
        finally:
            self._note(scope, status, time.perf_counter() - started)

    async def _whole_body(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body within its limits, and give a `receive` that tells it again."""
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced[:20]) > self.limits.max_body_bytes:
            raise self._too_large()
        parts: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(self.limits.body_timeout):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise GoneError
                    parts.append(message.get("body", b""))
                    size, more = size + len(parts[-1]), message.get("more_body", False)
                    if size > self.limits.max_body_bytes:
                        raise self._too_large()
        except TimeoutError:
            raise RefusedError(
                f"the body did not come in within {self.limits.body_timeout:g} s; send it faster, or send less",
                HTTPStatus.REQUEST_TIMEOUT,
                "timeout",
            ) from None
        told = False

        async def again() -> MutableMapping[str, Any]:
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": b"".join(parts), "more_body": False}

        return again

    def _too_large(self) -> RefusedError:
        return too_large(f"a body of more than {self.limits.max_body_bytes:,} bytes; send fewer texts a request")

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or "unmatched"
        # A method is any word that a client likes to send; the counters know those of the routes.
        method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "HEAD", "OPTIONS") else "other"
        self.metrics.requests.labels(route, method, str(status)).inc()
        self.metrics.request_seconds.labels(route).observe(seconds)
        fields = {"route": route, "method": method, "status": status, "ms": round(seconds * 1000, 2), **scope[NOTES]}
        fault = status == 500 or "frames" in scope[NOTES]
        level = logging.ERROR if fault else logging.INFO
        log.log(level, "request", extra={"fields": fields})


class JsonLines(logging.Formatter):
    """A record of the log as one JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Give time, level, message and the fields that the record brings."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        fields = getattr(record, "fields", {})
        return json.dumps({"time": at, "level": record.levelname.lower(), "event": record.getMessage(), **fields})


class GoneError(Exception):
    """The client closed the connection before its request was whole."""


INTERNAL = ErrorReply(
    500,
    {"content-type": "application/json"},
    b'{"error": "the service has a fault; its log says where", "error_type": "internal"}',
)


def frames_of(error: Exception) -> dict[str, Any]:
    """Where an error of ours came from, without its message: that may hold what a client sent."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    return {
        "error": type(error).__name__,
        "frames": [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames],
    }


async def _send(reply: ErrorReply, send: Send) -> None:
    headers = [(name.encode(), value.encode()) for name, value in reply.headers.items()]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body})
