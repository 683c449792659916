"""The whole loop with real processes: serve, mark over HTTP, improve, swap under load, and back."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from caravan.app.feedback.marks import Marks
from caravan.app.feedback.versions import Versions
from caravan.storage import load
from command_line import Workshop, run, run_program, start_program
from served import serving
from toy_training import assert_same_bits, toy_examples

pytestmark = pytest.mark.usefixtures("few_queries_are_timed")


@pytest.fixture
def model(tmp_path: Path, workshop: Workshop) -> Path:
    return Path(shutil.copytree(workshop.model, tmp_path / "model"))


def test_from_a_mark_to_a_new_version_that_is_served_and_back(model: Path) -> None:
    with serving(model) as client:
        for example in toy_examples(20, seed=5):
            mark = {"query": example.text, "doc_id": example.doc_ids[0], "right": True}
            assert client.post("/marks", json=mark).status_code == 200

        def scores() -> list[float]:
            hits = client.post("/search", json={"query": "a b c", "k": 5}).json()["results"][0]["hits"]
            return [hit["score"] for hit in hits]

        first = scores()
        assert run("improve", model, "--force", "--json").code == 0
        assert scores() == first  # nobody told it, and it does not watch
        assert client.post("/reload").status_code == 200
        assert scores() != first
        document = {"doc_id": "bell", "text": "z z z"}
        assert client.post("/documents", json={"documents": [document]}).status_code == 200
        assert run("rollback", model).code == 0
        assert client.post("/reload").status_code == 200
        assert "bell" in [document["doc_id"] for document in client.get("/documents").json()["documents"]]
        assert client.delete("/documents", params={"doc_id": "bell"}).status_code == 200
        assert scores() == pytest.approx(first, abs=1e-4)
        assert client.get("/info").json()["marks"] == 20


@contextmanager
def _served(model: Path, *options: str) -> Iterator[str]:
    with start_program("serve", str(model), "--port", "0", *options) as process:
        errors = process.stderr
        assert errors is not None
        address = errors.readline().decode().rpartition(" ")[2].strip()
        reader = threading.Thread(target=errors.read)
        reader.start()
        try:
            _until(lambda: httpx2.get(f"{address}/health", timeout=60).status_code == 200)
            yield address
        finally:
            process.terminate()
            process.wait(60)
            reader.join()


def _until(condition: Callable[[], bool], *, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError("it never came")


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_running_service_takes_up_each_version_without_an_error(model: Path, workers: str) -> None:
    before = load(model).trainable_state()
    with _served(model, "--local-changes", "--watch", "0.1", "--workers", workers) as address:
        statuses: list[int] = []
        answers: set[str] = set()
        stop = threading.Event()

        def ask() -> None:
            with httpx2.Client(base_url=address, timeout=60) as client:
                while not stop.is_set():
                    response = client.post("/search", json={"query": "a b c", "k": 5})
                    statuses.append(response.status_code)
                    answers.add(json.dumps([hit["score"] for hit in response.json()["results"][0]["hits"]]))

        asking = [threading.Thread(target=ask) for _ in range(3)]
        for thread in asking:
            thread.start()
        try:
            with httpx2.Client(base_url=address, timeout=60) as client:
                for example in toy_examples(30, seed=5):
                    mark = {"query": example.text, "doc_id": example.doc_ids[0], "right": True}
                    assert client.post("/marks", json=mark).status_code == 200
            for command in (("improve", "--force"), ("rollback",), ("rollback", "--to", "2"), ("rollback",)):
                known, count = set(answers), len(statuses)
                outcome = run_program(command[0], str(model), *command[1:])
                assert outcome.code == 0, outcome.err
                _until(lambda count=count: len(statuses) > count + 50)
                if command[0] == "improve":
                    _until(lambda known=known: bool(answers - known))
        finally:
            stop.set()
            for thread in asking:
                thread.join()
        assert set(statuses) == {200}
        assert len(answers) >= 2

        expected = [hit.score for hit in load(model).search("a b c", 5)]

        def all_back() -> bool:  # each on a connection, and so perhaps a worker, of its own
            body = {"query": "a b c", "k": 5}
            found = [httpx2.post(f"{address}/search", json=body, timeout=60).json()["results"][0] for _ in range(8)]
            return all([hit["score"] for hit in one["hits"]] == pytest.approx(expected, abs=1e-4) for one in found)

        _until(all_back)
        assert httpx2.get(f"{address}/info", timeout=60).json()["marks"] == 30
    assert_same_bits(load(model).trainable_state(), before)
    assert [version.number for version in Versions(model).listed()] == [2, 1]
    assert len(Marks(model).read().marks) == 30


@pytest.mark.slow
def test_workers_that_are_killed_while_marks_come_in_lose_none_that_was_answered(model: Path) -> None:
    kept: list[str] = []
    for attempt in range(3):
        with start_program("serve", str(model), "--port", "0", "--local-changes") as process:
            errors = process.stderr
            assert errors is not None
            address = errors.readline().decode().rpartition(" ")[2].strip()
            reader = threading.Thread(target=errors.read)
            reader.start()
            _until(lambda address=address: httpx2.get(f"{address}/health", timeout=60).status_code == 200)
            killer = threading.Timer(0.3, process.kill)
            killer.start()
            for number in range(10_000):
                query = f"{attempt} {number}"
                try:
                    answer = httpx2.post(
                        f"{address}/marks", json={"query": query, "doc_id": "d0", "right": True}, timeout=60
                    )
                except httpx2.TransportError:
                    break
                assert answer.status_code == 200
                kept.append(query)
            killer.join()
            process.wait(60)
            reader.join()
        found = Marks(model).read()
        assert set(kept) <= {mark.query for mark in found.marks} <= {*kept, query}
    assert kept
