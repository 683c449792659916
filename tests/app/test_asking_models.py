"""`POST /ask` with real generators: the model that encodes, another one, one that comes with a reload."""

import os
from pathlib import Path
from threading import Barrier, Thread

import pytest
from starlette.testclient import TestClient

import fake_endpoint
from caravan.app.answers.generators import Piece
from caravan.app.answers.writing import Writing
from caravan.app.web.asking import Asking
from caravan.config import BackboneConfig
from caravan.model.backbone import load_backbone
from caravan.storage import save
from caravan.training.calibration import Calibration
from saved_retrievers import make_retriever
from served import BELL, make, refusal, serving, streamed
from tiny_models import make_tiny_bert, make_tiny_llama

QUESTION = {"query": "where is my parcel"}
MODELS = Path(os.environ.get("CARAVAN_MODELS", Path(__file__).parents[3] / "shared" / "models"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = make_tiny_llama(tmp_path_factory.mktemp("llama"), max_position_embeddings=2048)
    return load_backbone(BackboneConfig(name=str(folder), max_tokens=64))


@pytest.fixture(autouse=True)
def any_confidence_will_do(monkeypatch) -> None:
    monkeypatch.setattr("caravan.app.web.asking.calibrated", lambda *_, **__: Calibration(threshold=0.0))


def test_the_model_that_encodes_writes_too_from_one_copy_of_its_weights(tmp_path, decoder, monkeypatch):
    folder = save(make_retriever(decoder), tmp_path / "saved")
    app = make(folder, writing=Writing(generator="self"))
    asking: Asking = app.state.asking
    served = app.state.service.shelf.current.retriever.encoder.backbone
    of_generator = {parameter.data_ptr() for parameter in asking.generator.model.parameters()}
    assert {parameter.data_ptr() for parameter in served.model.parameters()} <= of_generator

    with TestClient(app, client=("127.0.0.1", 1), base_url="http://127.0.0.1:8000") as client:
        first = client.post("/ask", json=QUESTION)
        assert first.status_code == 200, first.text
        generator = asking.generator
        client.post("/documents", json={"documents": [BELL]})
        assert client.post("/reload").status_code == 200
        assert client.post("/ask", json=QUESTION).status_code == 200
        assert asking.generator is generator  # the reload brought the same frozen model, which is shared


def test_another_frozen_model_that_comes_with_a_reload_gets_its_own_generator_or_is_told(
    tmp_path, decoder, monkeypatch
):
    folder = save(make_retriever(decoder), tmp_path / "saved")
    encoder = load_backbone(BackboneConfig(name=str(make_tiny_bert(tmp_path / "bert"))))
    with serving(folder, writing=Writing(generator="self")) as client:
        assert client.post("/ask", json=QUESTION).status_code == 200
        save(make_retriever(encoder), folder)
        assert client.post("/reload").status_code == 200
        assert client.post("/search", json=QUESTION).status_code == 200
        assert "cannot write" in refusal(client.post("/ask", json=QUESTION), 503)


def test_searches_and_answers_of_one_model_at_once_disturb_nobody(tmp_path, decoder, monkeypatch):
    folder = save(make_retriever(decoder), tmp_path / "saved")
    with serving(folder, writing=Writing(generator="self")) as client:
        wanted = client.post("/search", json=QUESTION).json()
        written = client.post("/ask", json=QUESTION).json()
        found, answers = [], []

        def search():
            found.extend(client.post("/search", json=QUESTION).json() for _ in range(30))

        def ask():
            answers.extend(client.post("/ask", json=QUESTION).json() for _ in range(3))

        threads = [Thread(target=work) for work in (search, search, ask)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 60
    assert answers == [written] * 3
    (before,) = wanted["results"]
    for (result,) in (one["results"] for one in found):
        assert [hit["doc_id"] for hit in result["hits"]] == [hit["doc_id"] for hit in before["hits"]]
        for hit, same in zip(result["hits"], before["hits"], strict=True):
            assert hit["score"] == pytest.approx(same["score"], rel=1e-4)  # batches differ in their last bits


@pytest.mark.skipif(not (MODELS / "stories260K").is_dir(), reason="no ../shared/models")
def test_a_real_decoder_writes_and_streams(master: Path, monkeypatch) -> None:
    options = Writing(generator=str(MODELS / "stories260K"), context_tokens=512)
    with serving(master, writing=options) as client:
        events = streamed(client, QUESTION)
    assert events[-1][0] == "answer"
    assert sum(name == "piece" for name, _ in events) > 1


class TestEndpoint:
    @pytest.fixture(autouse=True)
    def no_proxy(self, monkeypatch) -> None:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def test_it_streams_through_and_begins_again_where_its_connection_drops(self, master: Path) -> None:
        with (
            fake_endpoint.serving((["wrong"], "torn"), (["It is ", "here [1]."], "whole")) as (server, url),
            serving(master, writing=Writing(endpoint=url, endpoint_model="m")) as client,
        ):
            events = streamed(client, QUESTION)
            assert client.get("/info").json()["generator"] == "m at 127.0.0.1"
        assert [(name, data["text"]) for name, data in events] == [
            ("piece", "wrong"),
            ("piece", ""),
            ("piece", "It is "),
            ("piece", "here [1]."),
            ("answer", "It is here [1]."),
        ]
        assert events[1][1]["afresh"] is True
        assert QUESTION["query"] in server.requests[0][0]["messages"][1]["content"]

    @pytest.mark.parametrize("ending", ["no reply", 401, 500])
    @pytest.mark.parametrize("stream", [False, True])
    def test_one_that_refuses_or_is_gone_is_a_502(self, master: Path, ending, stream: bool) -> None:
        with (
            fake_endpoint.serving(([], ending), ([], ending)) as (_, url),
            serving(master, writing=Writing(endpoint=url, endpoint_model="m")) as client,
        ):
            response = client.post("/ask", json={**QUESTION, "stream": stream})
            assert "m at 127.0.0.1" in refusal(response, 502)
            assert response.json()["error_type"] == "generator"
            assert client.post("/search", json=QUESTION).status_code == 200

    def test_several_questions_are_asked_at_once(self, master: Path, monkeypatch) -> None:
        together = Barrier(3)

        class Meeting:
            name = "meeting"

            def write(self, question, sources):
                together.wait(20)
                yield Piece("here [1]")

        monkeypatch.setattr(Writing, "make", lambda self, backbone: Meeting())
        with serving(master, writing=Writing(endpoint="http://127.0.0.1:9/v1", endpoint_model="m")) as client:
            answers: list[int] = []
            ask = lambda: answers.append(client.post("/ask", json=QUESTION).status_code)  # noqa: E731
            threads = [Thread(target=ask) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert answers == [200, 200, 200]
