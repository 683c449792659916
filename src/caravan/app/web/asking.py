"""`POST /ask`: questions answered beside the searches, in threads of their own, and sent as they are written."""

import asyncio
import json
import logging
import os
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.sse import EventSourceResponse, format_sse_event

from caravan.app.answers.answering import Answer, Answering
from caravan.app.answers.evidence import calibrated
from caravan.app.answers.generators import Piece
from caravan.app.web.bodies import AskAnswer, AskBody
from caravan.app.web.gate import INTERNAL, NOTES, as_reply, frames_of
from caravan.app.web.limits import RefusedError, unavailable
from caravan.app.web.routing import ERRORS, Here, as_json, needs, refusals, while_connected
from caravan.app.web.serving import Served
from caravan.app.web.shelf import Shelf
from caravan.errors import BackboneError, CaravanError, GeneratorError
from caravan.model.encoder import check_texts
from caravan.model.retriever import Retriever

_BEHIND_SEARCHES = 10  # of 19: how far threads that write answers stand back where searches need the processor

log = logging.getLogger("caravan.service")


class Asking:
    """Answers questions about what the shelf serves.

    A generator on this machine writes one answer at a time, since PyTorch already uses all cores for one; an endpoint
    is asked for several at once. Neither the event loop nor the batches of searches wait for it.

    Attributes:
        generator: who writes.
    """

    def __init__(self, shelf: Shelf) -> None:
        """Load the generator.

        Raises:
            AnswerError: the endpoint cannot be used.
            BackboneError: there is no such model, or it is no decoder.
        """
        terms = shelf.terms
        self._shelf, self._limits, self._writing = shelf, terms.limits, terms.writing
        self._frozen = shelf.current.retriever.encoder.backbone.model
        self.generator = self._writing.make(shelf.current.retriever.encoder.backbone)
        # Its first use sets a tokenizer to its limit, which two threads must not do at once; later ones only read.
        shelf.current.retriever.encoder.tokenize(["a"])
        self._made: tuple[Served, Answering] | None = None
        self._making = threading.Lock()
        self._stops: set[threading.Event] = set()
        self._closing = threading.Event()
        at_once = self._limits.max_asking if self._writing.endpoint is not None else 1
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="answers", initializer=_stand_back)

    @property
    def calibrated(self) -> bool:
        """Whether probabilities were set on validation queries; not yet, while that is being done."""
        return self._made is not None and self._made[1].weigher.calibration.queries > 0

    def start(self) -> None:
        """Begin to prepare what the first question needs, which may take a minute."""
        self._threads.submit(self._prepare)

    async def close(self) -> None:
        """End what is being written."""
        self._closing.set()
        for stop in self._stops:
            stop.set()
        await asyncio.to_thread(self._threads.shutdown)

    async def parts(self, question: str) -> AsyncGenerator[Piece | Answer, None]:
        """Give an answer's pieces as they are written and, last, the answer; who stops listening stops the generator.

        Raises:
            RefusedError: too many are asking (429), it takes too long or nothing can be written now (503), or the
                generator fails (502).
            AnswerError: the question leaves no room for documents.
        """
        if len(self._stops) >= self._limits.max_asking:
            raise RefusedError(
                f"{len(self._stops)} questions are being answered or wait; ask again later",
                HTTPStatus.TOO_MANY_REQUESTS,
                "overloaded",
                retry_after=self._limits.retry_after,
            )
        loop, heard = asyncio.get_running_loop(), asyncio.Queue[Piece | Answer | Exception]()
        until, stop = loop.time() + self._limits.answer_timeout, threading.Event()
        self._stops.add(stop)
        work = loop.run_in_executor(
            self._threads, self._write, question, stop, lambda part: loop.call_soon_threadsafe(heard.put_nowait, part)
        )
        # Until the thread is free again, not until the client has gone: else the queue before it had no bound.
        work.add_done_callback(lambda _: self._stops.discard(stop))
        try:
            while True:
                part = await asyncio.wait_for(heard.get(), max(0.0, until - loop.time()))
                if isinstance(part, Exception):
                    raise _refusal(part)
                yield part
                if isinstance(part, Answer):
                    return
        except TimeoutError:
            raise unavailable(
                f"no answer within {self._limits.answer_timeout:g} s; ask again later",
                retry_after=self._limits.retry_after,
            ) from None
        finally:
            stop.set()

    def _write(self, question: str, stop: threading.Event, tell: Any) -> None:
        """Answer one question, in a thread; what goes wrong is told like a part."""
        try:
            if not stop.is_set():
                with closing(self._answering().stream(question)) as parts:
                    for part in parts:
                        if stop.is_set():
                            break
                        tell(part)
            if stop.is_set():  # by the service, if anybody still listens
                tell(_closing())
        except Exception as error:
            tell(error)

    def _answering(self) -> Answering:
        """What answers from what is served now; made anew after a reload or a change of documents."""
        served = self._shelf.current
        with self._making:
            if self._made is not None and self._made[0] is served:
                return self._made[1]
            retriever = served.retriever
            if retriever.encoder.backbone.model is not self._frozen:  # another model came with a reload
                self.generator = self._writing.make(retriever.encoder.backbone)
                self._frozen = retriever.encoder.backbone.model
            if self._made is not None and _training(self._made[0].retriever) == _training(retriever):
                calibration = self._made[1].weigher.calibration  # other documents, scored by the same training
            else:
                calibration = calibrated(self._shelf.folder, retriever, going=self._going)
            self._made = served, Answering(retriever, self.generator, calibration=calibration)
            return self._made[1]

    def _going(self) -> None:
        if self._closing.is_set():
            raise _closing()

    def _prepare(self) -> None:
        try:
            self._answering()
        except CaravanError as error:
            log.error("cannot answer questions", extra={"fields": {"error": str(error)}})


def _closing() -> RefusedError:
    return unavailable("the service is shutting down; ask another one")


def _training(retriever: Retriever) -> dict[str, Any]:
    """The record without what changed since the training."""
    return {name: value for name, value in retriever.record.items() if name != "changes"}


def _refusal(error: Exception) -> Exception:
    if isinstance(error, GeneratorError):
        return RefusedError(str(error), HTTPStatus.BAD_GATEWAY, "generator")
    if isinstance(error, BackboneError):  # of a model that came with a reload
        return unavailable(f"nothing can be written now: {error}")
    return error


def _stand_back() -> None:
    """Let searches go first; the threads that a generator starts inherit it."""
    if sys.platform == "linux":  # elsewhere priorities are those of whole processes
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _BEHIND_SEARCHES)


async def _asking(request: Request) -> Asking:
    return request.app.state.asking


_EVENT = {  # data: `PieceEvent`, `AskAnswer` or `ErrorAnswer` as JSON
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": ["piece", "answer", "error"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}

router = APIRouter(
    dependencies=[needs("read")],
    responses=ERRORS | refusals(s502="The generator failed or could not be reached"),
    tags=["answers"],
)


@router.post(
    "/ask",
    response_model=AskAnswer,
    responses={200: {"content": {"text/event-stream": {"itemSchema": _EVENT}}}},
)
async def ask(body: AskBody, request: Request, service: Here, asking: Annotated[Asking, Depends(_asking)]) -> Response:
    """Answer a question from the documents, with citations, or say that nothing is known.

    Streamed, the events are `piece`s, then `answer`, which alone is final, or `error`.
    """
    service.check_length(body.query)
    check_texts([body.query])
    if service.shelf.terms.log_texts:
        request.scope[NOTES]["asked"] = [body.query]
    parts = asking.parts(body.query)
    if not (body.stream or "text/event-stream" in request.headers.get("accept", "")):
        return as_json(_plain(await while_connected(request, _last(parts)), asking))
    first = await while_connected(request, _first(parts))  # what is refused at once is refused with its status
    return EventSourceResponse(
        _events(first, parts, asking, request.scope[NOTES]), headers={"cache-control": "no-store"}
    )


async def _first(parts: AsyncIterator[Piece | Answer]) -> Piece | Answer:
    """The first part with a text: that an answer begins again before it began is of no interest."""
    while isinstance(part := await anext(parts), Piece) and not part.text:
        pass
    return part


async def _last(parts: AsyncIterator[Piece | Answer]) -> Answer:
    last = None
    async for part in parts:
        last = part
    assert isinstance(last, Answer)
    return last


async def _events(
    first: Piece | Answer, parts: AsyncGenerator[Piece | Answer, None], asking: Asking, notes: dict[str, Any]
) -> AsyncIterator[bytes]:
    yield _event(first, asking)
    try:
        async for part in parts:
            yield _event(part, asking)
    except CaravanError as error:
        yield format_sse_event(event="error", data_str=as_reply(error).body.decode())
    except Exception as error:  # too late for a status
        notes |= frames_of(error)
        yield format_sse_event(event="error", data_str=INTERNAL.body.decode())
    finally:
        await parts.aclose()


def _event(part: Piece | Answer, asking: Asking) -> bytes:
    if isinstance(part, Answer):
        return format_sse_event(event="answer", data_str=json.dumps(_plain(part, asking)))
    return format_sse_event(event="piece", data_str=json.dumps(asdict(part)))


def _plain(answer: Answer, asking: Asking) -> dict[str, Any]:
    return {**asdict(answer), "generator": asking.generator.name}
