"""The routes of marks: a document that was found is called right or wrong for a query, and this is kept."""

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, TypeVar

from fastapi import APIRouter, Depends, Query, Request, Response

from caravan.app.feedback.marks import Mark, Marks, now, weights_name
from caravan.app.web.bodies import MarkBody, MarksAnswer, MarksCountAnswer
from caravan.app.web.limits import unavailable, unknown
from caravan.app.web.routing import ERRORS, WRITE_ERRORS, Here, as_json, needs, refusals
from caravan.app.web.serving import Served
from caravan.app.web.shelf import Shelf
from caravan.errors import StorageError
from caravan.model.encoder import check_texts

Result = TypeVar("Result")


class Marking:
    """The marks of what is served.

    Attributes:
        marks: where they are kept.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self.marks = Marks(shelf.folder)
        self._named: tuple[Served | None, str] = None, ""

    @property
    def count(self) -> int:
        """How many there are; 0 where they cannot be read, which `GET /marks` says."""
        try:
            return len(self.marks.read().marks)
        except StorageError:
            return 0

    def add(self, query: str, doc_id: str, *, right: bool) -> int:
        """Keep a mark on what is served now."""
        served = self._shelf.current
        if self._named[0] is not served:
            self._named = served, weights_name(served.retriever)
        return self.marks.add(Mark(query, doc_id, right, now(), self._named[1]))


async def _marking(request: Request) -> Marking:
    return request.app.state.marking


There = Annotated[Marking, Depends(_marking)]
reading = APIRouter(prefix="/marks", dependencies=[needs("read")], responses=ERRORS, tags=["marks"])
writing = APIRouter(prefix="/marks", dependencies=[needs("write")], responses=WRITE_ERRORS, tags=["marks"])


@writing.post("", response_model=MarksCountAnswer, responses=refusals(s404="No such document"))
async def mark(body: MarkBody, service: Here, marking: There) -> Response:
    """Mark a document right or wrong for a query; this is on the disk before it is answered."""
    service.check_length(body.query)
    check_texts([body.query])
    if body.doc_id not in service.shelf.current.retriever.catalogue.ids:
        raise unknown(f"no document {body.doc_id[:60]!r}; check the id")
    count = await _on_disk(lambda: marking.add(body.query, body.doc_id, right=body.right))
    return as_json({"marks": count})


@writing.delete("", response_model=MarksCountAnswer, responses=refusals(s404="No such mark"))
async def take_back(
    marking: There,
    query: Annotated[str, Query(min_length=1, description="As it was marked.")],
    doc_id: Annotated[str, Query(min_length=1)],
) -> Response:
    """Take a mark back; it is removed from the disk."""
    count = await _on_disk(lambda: marking.marks.take_back(query, doc_id))
    if count is None:
        raise unknown("no mark of this query and document; GET /marks lists what there is")
    return as_json({"marks": count})


@reading.get("", response_model=MarksAnswer)
async def marks(marking: There, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> Response:
    """Give the newest marks, newest first. Whoever may search may read them, and they hold queries."""
    found = (await _on_disk(marking.marks.read)).marks
    return as_json({"marks": [asdict(each) for each in reversed(found[-limit:])], "total": len(found)})


async def _on_disk(work: Callable[[], Result]) -> Result:
    """Do work that waits for the disk and its lock beside the loop; a full disk is no fault of the service."""
    try:
        return await asyncio.to_thread(work)
    except StorageError as error:
        raise unavailable(f"nothing was changed: {error}", retry_after=60) from None
