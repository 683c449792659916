"""Many clients at once, slow ones, and a model that changes under them."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest

from caravan.app.web.serving import Served
from caravan.model.backbone import Backbone
from caravan.storage import load, save
from saved_retrievers import DOCUMENTS, make_retriever
from served import make


@asynccontextmanager
async def asking(app):
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://127.0.0.1") as client,
    ):
        yield client


def test_clients_at_once_share_batches_and_each_gets_its_own_answer(master: Path) -> None:
    texts = [f"{word} {number}" for number in range(20) for word in ("refund", "parcel lost somewhere far away")]
    wanted = load(master).search(texts, k=3)

    async def scene() -> tuple[list, str]:
        async with asking(make(master)) as client:
            bodies = [{"query": text, "k": 1 + number % 3} for number, text in enumerate(texts)]
            answers = await asyncio.gather(*(client.post("/search", json=body) for body in bodies))
            return [answer.json()["results"][0]["hits"] for answer in answers], (await client.get("/metrics")).text

    answers, counted = asyncio.run(scene())
    for number, (hits, own) in enumerate(zip(answers, wanted, strict=True)):
        assert len(hits) == 1 + number % 3
        assert [hit["doc_id"] for hit in hits] == [hit.doc_id for hit in own][: len(hits)]
        assert [hit["score"] for hit in hits] == pytest.approx([hit.score for hit in own][: len(hits)], rel=1e-4)
    batches = float(counted.partition("caravan_batch_size_count ")[2].split()[0])
    assert batches < len(texts) / 2


@pytest.fixture
def held(monkeypatch) -> threading.Event:
    """Answers wait until it is set."""
    go, answer = threading.Event(), Served.answer

    def hold(self, batch):
        assert go.wait(10)
        return answer(self, batch)

    monkeypatch.setattr(Served, "answer", hold)
    return go


def test_with_a_full_queue_clients_are_told_when_to_come_back_and_the_others_are_answered(
    master: Path, held: threading.Event
) -> None:
    async def scene() -> list[httpx2.Response]:
        async with asking(make(master, limits={"max_waiting": 4, "max_texts": 4, "max_batch": 2})) as client:
            tasks = [asyncio.create_task(client.post("/search", json={"query": "refund"})) for _ in range(12)]
            refused, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            assert all(task.result().status_code == 429 for task in refused)
            held.set()
            return await asyncio.gather(*tasks)

    answers = asyncio.run(scene())
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 4
    assert {answer.headers["retry-after"] for answer in answers if answer.status_code == 429} == {"1"}


def test_an_answer_that_takes_too_long_is_a_503(master: Path, held: threading.Event) -> None:
    async def scene() -> httpx2.Response:
        async with asking(make(master, limits={"timeout": 0.05})) as client:
            answer = await client.post("/search", json={"query": "refund"})
            assert (await client.get("/health/ready")).status_code == 503
            assert (await client.get("/health/live")).status_code == 200
            held.set()
            return answer

    answer = asyncio.run(scene())
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def test_a_body_that_does_not_come_in_is_a_408(master: Path) -> None:
    async def slow():
        yield b'{"query": '
        await asyncio.sleep(10)

    async def scene() -> httpx2.Response:
        async with asking(make(master, limits={"body_timeout": 0.05})) as client:
            return await client.post("/search", content=slow())

    assert asyncio.run(scene()).status_code == 408


async def keep_asking(client: httpx2.AsyncClient, work: Callable[[], Awaitable[None]]) -> list[httpx2.Response]:
    """Let eight clients ask one query after another while something is done; give all answers."""
    ended, answers = asyncio.Event(), []

    async def ask() -> None:
        while not ended.is_set():
            answers.append(await client.post("/search", json={"query": "refund"}))

    tasks = [asyncio.create_task(ask()) for _ in range(8)]
    try:
        await work()
    finally:
        ended.set()
        await asyncio.gather(*tasks)
    return answers


def test_no_request_is_dropped_while_models_are_reloaded_and_documents_change(folder: Path, bert: Backbone) -> None:
    known = {(document.doc_id, document.text) for document in DOCUMENTS}

    async def scene() -> list[httpx2.Response]:
        async with asking(make(folder)) as client:

            async def work() -> None:
                for number in range(3):
                    await asyncio.to_thread(
                        save, make_retriever(bert, DOCUMENTS[: 2 + number % 2], seed=number), folder
                    )
                    assert (await client.post("/reload")).status_code == 200
                    body = {"documents": [{"doc_id": "new", "text": "a new one"}]}
                    assert (await client.post("/documents", json=body)).status_code == 200
                    assert (await client.delete("/documents", params={"doc_id": "new"})).status_code == 200
                    (folder / "documents.jsonl").write_text("damaged")
                    assert (await client.post("/reload")).status_code == 409

            return await keep_asking(client, work)

    answers = asyncio.run(scene())
    assert {answer.status_code for answer in answers} == {200}
    for answer in answers:
        hits = answer.json()["results"][0]["hits"]
        assert sum(hit["probability"] for hit in hits) == pytest.approx(1, abs=1e-4)
        assert {(hit["doc_id"], hit["text"]) for hit in hits} <= known | {("new", "a new one")}


def test_changes_at_once_are_made_one_after_another_and_all_are_kept(folder: Path) -> None:
    names = [f"doc-{number}" for number in range(6)]

    async def scene() -> None:
        async with asking(make(folder)) as client:
            bodies = [{"documents": [{"doc_id": name, "text": f"text {name}"}]} for name in names]
            answers = await asyncio.gather(*(client.post("/documents", json=body) for body in bodies))
            assert {answer.status_code for answer in answers} == {200}

    asyncio.run(scene())
    assert set(load(folder).catalogue.ids) == {*names, *(document.doc_id for document in DOCUMENTS)}
