"""What rooms with routes share: the service behind a request, rights, refusals in the description, JSON."""

import asyncio
import json
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request, Response

from caravan.app.web.access import Keys, Right
from caravan.app.web.bodies import ErrorAnswer
from caravan.app.web.gate import GoneError
from caravan.app.web.limits import RefusedError, too_large
from caravan.app.web.metrics import Metrics
from caravan.app.web.shelf import Shelf

Result = TypeVar("Result")


def refusals(**words: str) -> dict[int | str, dict[str, Any]]:
    """Refusals for the description of routes, by status: `refusals(s404="No such document")`."""
    return {int(name[1:]): {"model": ErrorAnswer, "description": text} for name, text in words.items()}


ERRORS = refusals(
    s400="A text or document cannot be used",
    s401="A key is needed, or is not known",
    s408="The body did not come in in time",
    s413="More than the limits allow",
    s422="Malformed JSON, or a field of another form",
    s429="Too many texts wait; see Retry-After",
    s503="Not now; see Retry-After",
)
WRITE_ERRORS = ERRORS | refusals(s403="This key, or nobody, may change anything")


@dataclass(frozen=True)
class Service:
    """What the routes share.

    Attributes:
        shelf: what is served.
        keys: who may ask and who may change.
        metrics: what is counted.
        closing: set once the service is told to stop: streams without an end are to end.
    """

    shelf: Shelf
    keys: Keys
    metrics: Metrics
    closing: asyncio.Event = field(default_factory=asyncio.Event)

    def may(self, right: Right, request: Request) -> bool:
        """Whether a request has a right."""
        try:
            self.keys.check(right, request.headers, request.client.host if request.client else None)
        except RefusedError:
            return False
        return True

    def check_length(self, text: str) -> None:
        """Refuse a text that is too long.

        Raises:
            RefusedError: it is (413).
        """
        most = self.shelf.terms.limits.max_characters
        if len(text) > most:
            raise too_large(f"a text of {len(text):,} characters, at most {most:,} are taken; cut it")


async def _service(request: Request) -> Service:
    return request.app.state.service


Here = Annotated[Service, Depends(_service)]


def needs(right: Right) -> Any:
    """A dependency of routes that lets only those pass who have a right."""

    async def check(request: Request, service: Here) -> None:
        service.keys.check(right, request.headers, request.client.host if request.client else None)

    return Depends(check)


async def while_connected(request: Request, work: Awaitable[Result]) -> Result:
    """Wait for work, and give it up where the client goes: nobody would read the answer.

    Args:
        request: one whose body was read.
        work: cancelled when the connection closes.

    Raises:
        GoneError: the client closed the connection.
    """
    doing, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((doing, gone), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise GoneError
        return doing.result()
    finally:
        doing.cancel()
        gone.cancel()
        await asyncio.gather(doing, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def as_json(value: Any) -> Response:
    """An answer of plain values.

    It is checked against the answer's model in tests; checking every float of every answer again would cost
    milliseconds.
    """
    return Response(json.dumps(value, ensure_ascii=True, allow_nan=False), media_type="application/json")
