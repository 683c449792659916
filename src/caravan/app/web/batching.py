"""Requests that share a forward pass: a bounded queue, and one thread that takes all that waits, up to a size.

No request waits for company: while a batch is computed the next one gathers by itself, so a lone client pays nothing
and a crowd shares. One thread computes, since PyTorch already uses all cores for one batch.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Generic, Protocol, TypeVar

from caravan.app.web.limits import Limits, RefusedError, unavailable

Answer = TypeVar("Answer")
Result = TypeVar("Result")


class Sized(Protocol):
    """A piece of work that says how many texts it has."""

    @property
    def texts(self) -> Sequence[str]:
        """What is to be encoded."""
        ...


Work = TypeVar("Work", bound=Sized)


@dataclass(frozen=True)
class Timing:
    """How a piece of work went.

    Attributes:
        queue_seconds: waited for the thread.
        inference_seconds: of the batch it was in.
        batch_size: texts in that batch.
    """

    queue_seconds: float
    inference_seconds: float
    batch_size: int


@dataclass
class _Waiting(Generic[Work, Answer]):
    work: Work
    since: float
    answer: "asyncio.Future[tuple[Answer, Timing]]" = field(repr=False)


class Batcher(Generic[Work, Answer]):
    """One queue, one thread.

    Args:
        compute: takes pieces of work, gives an answer for each in their order; called in the thread.
        limits: how many texts a batch, how many may wait, and for how long.
        observe: called with the timing of each batch, and the queue's length after it was taken.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Work]], Sequence[Answer]],
        limits: Limits,
        observe: Callable[[Sequence[Timing], int], None] = lambda timings, waiting: None,
    ) -> None:
        self._compute, self._limits, self._observe = compute, limits, observe
        self._queue: deque[_Waiting[Work, Answer]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._arrived = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._busy_since: float | None = None
        self._closing = False

    @property
    def waiting(self) -> int:
        """Texts in the queue."""
        return sum(len(entry.work.texts) for entry in self._queue)

    @property
    def ready(self) -> bool:
        """Whether work is taken and gets done: neither closing nor stuck in one batch for longer than a time limit."""
        running = self._loop is not None and not self._loop.done() and not self._closing
        stuck = self._busy_since is not None and time.monotonic() - self._busy_since > self._limits.timeout
        return running and not stuck

    def start(self) -> None:
        """Begin to take work; needs a running event loop."""
        self._loop = asyncio.create_task(self._serve())

    async def close(self) -> None:
        """Answer what waits, then stop; work that comes later is refused."""
        self._closing = True
        self._arrived.set()
        if self._loop is not None:
            await self._loop
        self._thread.shutdown()

    async def submit(self, work: Work) -> tuple[Answer, Timing]:
        """Wait for the answer to a piece of work.

        Raises:
            RefusedError: too many texts wait (429), the time is over, or the service is closing (503).
            Exception: what `compute` raised on this piece of work.
        """
        if self._closing:
            raise unavailable("the service is shutting down; ask another one")
        if self._queue and self.waiting + len(work.texts) > self._limits.max_waiting:
            raise RefusedError(
                f"{self.waiting:,} texts wait already; ask again later",
                HTTPStatus.TOO_MANY_REQUESTS,
                "overloaded",
                retry_after=self._limits.retry_after,
            )
        entry = _Waiting(work, time.monotonic(), asyncio.get_running_loop().create_future())
        self._queue.append(entry)
        self._arrived.set()
        try:
            return await asyncio.wait_for(entry.answer, self._limits.timeout)
        except TimeoutError:
            raise unavailable(
                f"no answer within {self._limits.timeout:g} s; ask again later", retry_after=self._limits.retry_after
            ) from None

    async def aside(self, function: Callable[[], Result]) -> Result:
        """Call a function in the thread between two batches: tokenizers are not made for two threads at a time."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch = self._take()
            if not batch:
                if self._closing:
                    return
                self._arrived.clear()
                continue
            self._busy_since = started = time.monotonic()
            answers = await loop.run_in_executor(self._thread, self._answers, [entry.work for entry in batch])
            self._busy_since, seconds = None, time.monotonic() - started
            size = sum(len(entry.work.texts) for entry in batch)
            timings = [Timing(started - entry.since, seconds, size) for entry in batch]
            self._observe(timings, self.waiting)
            for entry, answer, timing in zip(batch, answers, timings, strict=True):
                if entry.answer.done():  # nobody waits for it any more
                    continue
                if isinstance(answer, Exception):
                    entry.answer.set_exception(answer)
                else:
                    entry.answer.set_result((answer, timing))

    def _take(self) -> list[_Waiting[Work, Answer]]:
        batch: list[_Waiting[Work, Answer]] = []
        size = 0
        while self._queue:
            if self._queue[0].answer.done():  # its time is over: no work for nobody
                self._queue.popleft()
                continue
            size += len(self._queue[0].work.texts)
            if batch and size > self._limits.max_batch:
                break
            batch.append(self._queue.popleft())
        return batch

    def _answers(self, works: list[Work]) -> Sequence[Answer | Exception]:
        try:
            return self._compute(works)
        except Exception as error:
            if len(works) == 1:
                return [error]
        # One of them is at fault; the others must not suffer for it.
        return [answer for work in works for answer in self._answers([work])]
