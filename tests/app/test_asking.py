"""`POST /ask` as its clients meet it: whole or streamed, in a queue with an end, with a client that goes."""

import asyncio
import json
import logging
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from threading import Thread

import httpx2
import pytest

from caravan.app.answers.answering import Answering
from caravan.app.answers.evidence import STORED, Weigher
from caravan.app.answers.generators import Piece
from caravan.app.answers.writing import Writing
from caravan.app.web import bodies
from caravan.config import HeadConfig
from caravan.errors import AnswerError, BackboneError, GeneratorError
from caravan.model.backbone import Backbone
from caravan.storage import load, save
from caravan.training.calibration import Calibration
from saved_retrievers import DOCUMENTS, make_retriever
from served import BELL, KEYS, READER, events_of, listening, make, refusal, serving, streamed
from toy_experiments import DATASET

QUESTION = {"query": "where is my parcel"}
MODELS = Path(os.environ.get("CARAVAN_MODELS", Path(__file__).parents[3] / "shared" / "models"))


class Scripted:
    """A generator of this test: gives pieces, raises errors, waits where it is told to."""

    name = "scripted"

    def __init__(self, *script) -> None:
        self.script, self.questions = script, []
        self.stopped = threading.Event()

    def write(self, question, sources):
        self.questions.append(question)
        try:
            for part in self.script:
                if isinstance(part, Exception):
                    raise part
                if isinstance(part, threading.Event):
                    assert part.wait(20)
                else:
                    yield part if isinstance(part, Piece) else Piece(part)
        finally:
            self.stopped.set()


@pytest.fixture
def writing(monkeypatch):
    """Let a scripted generator take the place of the one that the options name, and answer at any confidence."""

    def put(*script) -> Scripted:
        generator = Scripted(*script)
        monkeypatch.setattr(Writing, "make", lambda self, backbone: generator)
        monkeypatch.setattr("caravan.app.web.asking.calibrated", lambda *_, **__: Calibration(threshold=0.0))
        return generator

    return put


class TestAnswer:
    def test_it_is_that_of_the_library_with_its_citations(self, master: Path) -> None:
        wanted = Answering(load(master), calibration=Calibration()).answer(QUESTION["query"])
        with serving(master) as client:
            answer = bodies.AskAnswer.model_validate_json(client.post("/ask", json=QUESTION).text, strict=True)
            info = client.get("/info").json()
        assert (answer.text, answer.known, answer.generator) == (wanted.text, wanted.known, "extractive")
        assert [one.doc_id for one in answer.found] == [one.doc_id for one in wanted.found]
        assert answer.confidence == pytest.approx(wanted.confidence, rel=1e-4)
        assert (info["generator"], info["calibrated"]) == ("extractive", False)

    def test_streamed_the_pieces_make_the_answer_and_the_last_event_is_the_answer(self, master: Path, writing) -> None:
        writing("It is ", "here [1].")
        with serving(master) as client:
            whole = client.post("/ask", json=QUESTION).json()
            events = streamed(client, QUESTION)
            asked_by_header = client.post("/ask", json=QUESTION, headers={"accept": "text/event-stream"})
        assert [name for name, _ in events] == ["piece", "piece", "answer"]
        pieces = [bodies.PieceEvent.model_validate(data) for name, data in events if name == "piece"]
        assert "".join(piece.text for piece in pieces) == "It is here [1]." == whole["text"]
        assert events[-1][1] == whole
        assert [citation["number"] for citation in whole["citations"]] == [1]
        assert list(events_of(asked_by_header.text.splitlines())) == events

    def test_what_began_again_is_told(self, master: Path, writing) -> None:
        writing("wro", Piece("", afresh=True), "right [1]")
        with serving(master) as client:
            events = streamed(client, QUESTION)
        assert [data["afresh"] for name, data in events if name == "piece"] == [False, True, False]
        assert events[-1][1]["text"] == "right [1]"

    def test_below_the_threshold_nothing_is_known_and_nobody_writes(self, master: Path, monkeypatch) -> None:
        never = Calibration(threshold=1.0)
        monkeypatch.setattr("caravan.app.web.asking.calibrated", lambda *_, **__: never)
        with serving(master) as client:
            answer = client.post("/ask", json=QUESTION).json()
            assert [name for name, _ in streamed(client, QUESTION)] == ["answer"]
        assert (answer["known"], answer["text"], answer["citations"]) == (False, "I don't know.", [])
        assert answer["found"]

    def test_an_added_document_is_answered_from_and_a_reloaded_model_too(self, folder: Path, bert: Backbone) -> None:
        with serving(folder) as client:
            client.post("/ask", json=QUESTION)
            client.post("/documents", json={"documents": [BELL]})
            found = client.post("/ask", json={"query": f"{BELL['title']}. {BELL['text']}"}).json()["found"]
            wanted = Answering(load(folder)).answer(f"{BELL['title']}. {BELL['text']}").found
            assert [one["doc_id"] for one in found] == [one.doc_id for one in wanted]
            save(make_retriever(bert, DOCUMENTS[:1], head=HeadConfig(hidden=8)), folder)
            client.post("/reload")
            found = client.post("/ask", json=QUESTION).json()["found"]
        assert [one["doc_id"] for one in found] == [DOCUMENTS[0].doc_id]

    def test_a_key_is_needed_where_there_are_keys(self, master: Path) -> None:
        with serving(master, keys=KEYS) as client:
            refusal(client.post("/ask", json=QUESTION), 401)
            assert client.post("/ask", json=QUESTION, headers=READER).status_code == 200


class TestCalibration:
    def test_it_is_chosen_once_for_a_training_and_kept_for_other_documents(self, folder: Path, monkeypatch) -> None:
        chosen = []

        def calibrated(place, retriever, going):
            chosen.append(len(retriever.catalogue))
            return Calibration(threshold=0.0, queries=7)

        monkeypatch.setattr("caravan.app.web.asking.calibrated", calibrated)
        with serving(folder) as client:
            client.post("/ask", json=QUESTION)
            assert client.get("/info").json()["calibrated"] is True
            client.post("/documents", json={"documents": [BELL]})
            client.post("/ask", json=QUESTION)
            assert chosen == [3]
            retriever = load(folder)
            retriever.record = {**retriever.record, "seconds": 99.0}
            save(retriever, folder)
            client.post("/reload")
            client.post("/ask", json=QUESTION)
        assert chosen == [3, 4]

    def test_the_service_ends_while_it_is_chosen_and_then_nothing_is_kept(
        self, workshop, tmp_path, monkeypatch
    ) -> None:
        folder = Path(shutil.copytree(workshop.model, tmp_path / "model"))
        began, ended = threading.Event(), threading.Event()

        def encode_all(self, rows, going):
            began.set()
            try:
                until(lambda: going() is not None)
            finally:
                ended.set()

        monkeypatch.setattr(Weigher, "_encode_all", encode_all)
        monkeypatch.setattr("caravan.app.answers.evidence.Dataset.from_config", lambda *_, **__: DATASET)
        with serving(folder) as client:
            assert began.wait(20)
            assert client.get("/info").json()["calibrated"] is False
            assert client.post("/search", json=QUESTION).status_code == 200
        assert ended.is_set()
        assert not (folder / STORED).exists()

    def test_a_file_that_is_no_part_of_the_retriever_makes_no_new_version(self, folder: Path) -> None:
        from caravan.app.web.shelf import stamp

        before = stamp(folder)
        (folder / STORED).write_text("{}")
        (folder / "marks.jsonl").write_text("")
        assert stamp(folder) == before
        os.utime(folder / "head.safetensors", ns=(1, 1))
        assert stamp(folder) != before


class TestRefusals:
    @pytest.mark.parametrize(
        ("body", "status", "word"),
        [
            ({"query": ""}, 422, "at least 1 character"),
            ({"query": "  "}, 400, "is empty"),
            ({"query": "a" * 101}, 413, "at most 100"),
            ({"query": ["a"]}, 422, "valid string"),
            ({"query": "a", "stream": 1}, 422, "valid boolean"),
            ({}, 422, "Field required"),
        ],
    )
    @pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
    def test_a_question_that_cannot_be_answered_is_refused(self, master: Path, body, status, word, accept) -> None:
        with serving(master, limits={"max_characters": 100}) as client:
            assert word in refusal(client.post("/ask", json=body, headers={"accept": accept}), status)

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("error", "status", "kind"),
        [
            (GeneratorError("m at h refused: no such model"), 502, "generator"),
            (AnswerError("the prompt has room for 3 tokens"), 400, "validation"),
            (RuntimeError("a secret"), 500, "internal"),
        ],
    )
    def test_a_generator_that_fails_at_once_is_told_by_a_status(
        self, master: Path, writing, error, status, kind, stream
    ) -> None:
        writing(error)
        with serving(master) as client:
            response = client.post("/ask", json={**QUESTION, "stream": stream})
            assert "secret" not in refusal(response, status)
        assert response.json()["error_type"] == kind

    @pytest.mark.parametrize(
        ("error", "kind"), [(GeneratorError("gone"), "generator"), (RuntimeError("a secret"), "internal")]
    )
    def test_one_that_fails_later_is_told_by_an_event(self, master: Path, writing, error, kind, caplog) -> None:
        writing("It is", error)
        with serving(master) as client:
            events = streamed(client, QUESTION)
            assert client.post("/search", json=QUESTION).status_code == 200
        assert [name for name, _ in events] == ["piece", "error"]
        assert bodies.ErrorAnswer.model_validate(events[1][1]).error_type == kind
        assert "secret" not in json.dumps(events)
        faults = [record.fields for record in caplog.records if record.levelno >= logging.ERROR]
        assert [fault["error"] for fault in faults] == (["RuntimeError"] if kind == "internal" else [])

    def test_a_generator_that_cannot_write_is_refused_before_anything_is_served(self, master: Path) -> None:
        with pytest.raises(BackboneError, match="own model cannot write"):
            make(master, writing=Writing(generator="self"))
        with pytest.raises(AnswerError, match="no address"):
            make(master, writing=Writing(endpoint="ftp://x", endpoint_model="m"))

    def test_what_was_asked_is_logged_on_demand_alone(self, master: Path, caplog) -> None:
        caplog.set_level(logging.DEBUG)
        secret = "xyzzy-nobody-may-read-this"
        with serving(master) as client:
            client.post("/ask", json={"query": secret})
            client.post("/ask", json={"query": secret, "stream": True})
        own = [r for r in caplog.records if not r.name.startswith("httpx")]
        assert secret not in json.dumps([[r.getMessage(), getattr(r, "fields", {})] for r in own])
        with serving(master, log_texts=True) as client:
            client.post("/ask", json={"query": secret})
        assert secret in json.dumps([getattr(r, "fields", {}) for r in caplog.records])


class TestQueue:
    def test_searches_are_answered_while_answers_are_written_and_more_questions_are_told_to_wait(
        self, master: Path, writing
    ) -> None:
        go = threading.Event()
        writing(go, "here [1]")

        async def scene() -> list[httpx2.Response]:
            app = make(master, limits={"max_asking": 2})
            transport = httpx2.ASGITransport(app)
            async with (
                app.router.lifespan_context(app),
                httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client,
            ):
                tasks = [asyncio.create_task(client.post("/ask", json=QUESTION)) for _ in range(2)]
                while len(app.state.asking._stops) < 2:
                    await asyncio.sleep(0)
                refused = await client.post("/ask", json=QUESTION)
                found = await client.post("/search", json=QUESTION)
                go.set()
                return [refused, found, *await asyncio.gather(*tasks)]

        refused, found, *answers = asyncio.run(scene())
        assert "2 questions" in refusal(refused, 429)
        assert refused.headers["retry-after"] == "1"
        assert [found.status_code, *(answer.status_code for answer in answers)] == [200, 200, 200]

    @pytest.mark.parametrize("script", [(), ("It is",)])
    def test_an_answer_that_takes_too_long_ends_and_its_generator_is_stopped(self, master: Path, writing, script):
        go = threading.Event()
        generator = writing(*script, go, "late", "later")
        with serving(master, limits={"answer_timeout": 0.3}) as client:
            response = client.post("/ask", json={**QUESTION, "stream": True})
            go.set()
            assert generator.stopped.wait(20)
        if script:
            events = list(events_of(response.text.splitlines()))
            assert [name for name, _ in events] == ["piece", "error"]
            assert events[1][1]["error_type"] == "unavailable"
        else:
            assert "0.3 s" in refusal(response, 503)

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_client_that_goes_stops_the_generator_and_frees_its_place(self, master: Path, writing, stream) -> None:
        more = [part for _ in range(200) for part in ("on ", threading.Event())]
        for event in more[1::2][:20]:
            event.set()
        generator = writing(*more)
        app = make(master, limits={"max_asking": 1})
        with listening(app) as address:
            with httpx2.Client(base_url=address, timeout=20) as client:
                if stream:
                    with client.stream("POST", "/ask", json={**QUESTION, "stream": True}) as response:
                        assert next(events_of(response.iter_lines()))[0] == "piece"
                else:
                    with pytest.raises(httpx2.ReadTimeout):
                        client.post("/ask", json=QUESTION, timeout=0.5)
            until(lambda: all(stop.is_set() for stop in app.state.asking._stops))
            for event in more[1::2]:
                event.set()
            assert generator.stopped.wait(20)
            until(lambda: not app.state.asking._stops)
            assert httpx2.post(f"{address}/search", json=QUESTION, timeout=20).status_code == 200

    def test_the_service_ends_while_an_answer_is_written(self, master: Path, writing) -> None:
        generator = writing(*["on "] * 100_000)
        answers: list[httpx2.Response] = []
        with serving(master) as client:
            threads = [Thread(target=lambda: answers.append(client.post("/ask", json=QUESTION))) for _ in range(2)]
            for thread in threads:
                thread.start()
            until(lambda: generator.questions)
        for thread in threads:
            thread.join(20)
        assert generator.stopped.is_set()
        assert ["shutting down" in refusal(answer, 503) for answer in answers] == [True, True]

    @pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux")
    def test_threads_that_write_stand_back_and_the_others_do_not(self, master: Path, writing) -> None:
        niceness = []

        def look(question, sources):
            niceness.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            yield Piece("here [1]")

        writing().write = look
        with serving(master) as client:
            client.post("/ask", json=QUESTION)
        assert niceness[0] > os.getpriority(os.PRIO_PROCESS, 0)


def until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)
