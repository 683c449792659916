"""The queue in front of the encoder, with work that the test itself lets go on."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from caravan.app.web.batching import Batcher
from caravan.app.web.limits import Limits, RefusedError


@dataclass(frozen=True)
class Words:
    """Work of some texts."""

    texts: Sequence[str]


class Gated:
    """Joins texts, once it is let."""

    def __init__(self) -> None:
        self.batches: list[list[Words]] = []
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, batch: Sequence[Words]) -> list[str]:
        self.batches.append(list(batch))
        self.begun.set()
        assert self.go.wait(10)
        if any("bad" in work.texts for work in batch):
            raise ValueError("bad")
        return ["+".join(work.texts) for work in batch]

    @property
    def sizes(self) -> list[int]:
        return [sum(len(work.texts) for work in batch) for batch in self.batches]


def play(scene: Callable, **limits) -> Gated:
    """Run a scene with a batcher whose first batch holds the one text "first" and waits."""

    async def run() -> None:
        batcher = Batcher(gated, Limits(**limits))
        batcher.start()
        first = asyncio.create_task(batcher.submit(Words(["first"])))
        await asyncio.to_thread(gated.begun.wait, 10)
        try:
            await scene(batcher)
        finally:
            gated.go.set()
            await asyncio.gather(first, return_exceptions=True)
            await batcher.close()

    gated = Gated()
    asyncio.run(run())
    return gated


async def later(batcher: Batcher, *works: Sequence[str]) -> list[asyncio.Task]:
    """Submit works and let them get into the queue."""
    tasks = [asyncio.create_task(batcher.submit(Words(list(work)))) for work in works]
    await asyncio.sleep(0)
    return tasks


def test_what_waits_is_computed_together_up_to_the_batch_size_and_answered_in_place():
    async def scene(batcher):
        tasks = await later(batcher, ["a"], ["b", "c"], ["d"], ["e"])
        assert batcher.waiting == 5
        batcher._compute.go.set()
        answers = await asyncio.gather(*tasks)
        assert [answer for answer, _ in answers] == ["a", "b+c", "d", "e"]
        assert [timing.batch_size for _, timing in answers] == [4, 4, 4, 1]
        assert answers[0][1].queue_seconds > 0

    assert play(scene, max_batch=4).sizes == [1, 4, 1]


def test_work_larger_than_a_batch_is_taken_alone():
    async def scene(batcher):
        tasks = await later(batcher, ["a"], ["b"] * 5, ["c"])
        batcher._compute.go.set()
        await asyncio.gather(*tasks)

    assert play(scene, max_batch=4).sizes == [1, 1, 5, 1]


def test_a_full_queue_refuses_with_429_and_says_when_to_come_back():
    async def scene(batcher):
        (waiting,) = await later(batcher, ["a", "b"])
        with pytest.raises(RefusedError, match="2 texts wait already") as refusal:
            await batcher.submit(Words(["c", "d"]))
        assert (refusal.value.status, refusal.value.retry_after) == (429, 1)
        (fits,) = await later(batcher, ["c"])
        batcher._compute.go.set()
        await asyncio.gather(waiting, fits)

    assert play(scene, max_waiting=3).sizes == [1, 3]


def test_work_whose_time_is_over_is_refused_with_503_and_not_computed():
    async def scene(batcher):
        with pytest.raises(RefusedError, match="no answer within") as refusal:
            await batcher.submit(Words(["late"]))
        assert (refusal.value.status, refusal.value.retry_after) == (503, 1)

    gated = play(scene, timeout=0.05)
    assert [work.texts for batch in gated.batches for work in batch] == [["first"]]


def test_work_that_fails_does_not_fail_the_others_of_its_batch():
    async def scene(batcher):
        good, bad, fine = await later(batcher, ["good"], ["bad"], ["fine"])
        batcher._compute.go.set()
        assert (await good)[0] == "good"
        assert (await fine)[0] == "fine"
        with pytest.raises(ValueError, match="bad"):
            await bad

    play(scene)


def test_closing_answers_what_waits_and_refuses_what_comes_later():
    async def scene(batcher):
        (waiting,) = await later(batcher, ["a"])
        assert batcher.ready
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        assert not batcher.ready
        with pytest.raises(RefusedError, match="shutting down") as refusal:
            await batcher.submit(Words(["b"]))
        assert refusal.value.status == 503
        batcher._compute.go.set()
        assert (await waiting)[0] == "a"
        await closing

    play(scene)


def test_a_batch_that_never_ends_makes_the_service_unready():
    async def scene(batcher):
        await asyncio.sleep(0.05)
        assert not batcher.ready

    play(scene, timeout=0.01)


def test_other_work_gets_its_turn_between_two_batches_in_the_same_thread():
    async def scene(batcher):
        aside = asyncio.create_task(batcher.aside(lambda: threading.current_thread().name))
        await asyncio.sleep(0)
        assert not aside.done()
        batcher._compute.go.set()
        assert (await aside).startswith("encoder")

    play(scene)
