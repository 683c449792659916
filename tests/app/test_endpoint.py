"""An OpenAI-compatible endpoint: a small server of this test streams, drops its connection, refuses."""

import pytest

from caravan.app.answers.endpoint import KEY, Endpoint
from caravan.app.answers.evidence import Source
from caravan.app.answers.generators import Piece
from caravan.data.records import Document
from caravan.errors import AnswerError
from command_line import check_refused, run
from fake_endpoint import serving

openai = pytest.importorskip("openai", reason="the extra `ask` is not installed")

SOURCES = [
    Source(Document("parcel", "It shows where the parcel is. " * 3), 0.9, ("It shows where the parcel is.",), (1.0,))
]
SECRET = "sk-not-to-be-seen"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(KEY, raising=False)


def written(url):
    return list(Endpoint(url, "m").write("where is it", SOURCES))


def test_the_answer_streams_and_the_prompt_has_its_roles(monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    with serving((["It is ", "here [1]."], "whole")) as (server, url):
        assert written(url) == [Piece("It is "), Piece("here [1].")]
        ((body, key),) = server.requests
    assert key == f"Bearer {SECRET}"
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["messages"][1]["content"].endswith("Question: where is it")
    assert (body["model"], body["stream"], body["temperature"]) == ("m", True, 0)


@pytest.mark.parametrize("ending", ["torn", "cut", "no reply"])
def test_a_dropped_connection_is_tried_once_more_from_the_start(ending):
    with serving((["It is "], ending), (["It is ", "here."], "whole")) as (server, url):
        pieces = written(url)
        assert len(server.requests) == 2
    afresh = pieces.index(Piece("", afresh=True))
    assert pieces[afresh + 1 :] == [Piece("It is "), Piece("here.")]


def test_a_connection_that_drops_twice_is_one_error():
    with serving((["It is "], "torn"), (["It is "], "torn")) as (server, url):
        with pytest.raises(AnswerError, match=r"m at 127\.0\.0\.1: no answer in two attempts"):
            written(url)
        assert len(server.requests) == 2


def test_a_refusal_is_not_tried_again_and_does_not_show_the_key(monkeypatch, caplog):
    monkeypatch.setenv(KEY, SECRET)
    with caplog.at_level("DEBUG"), serving(([], 401)) as (server, url):
        with pytest.raises(AnswerError, match=r"refused: .*bad key Bearer \*\*\*") as caught:
            written(url)
        assert len(server.requests) == 1
    assert SECRET not in str(caught.value)
    assert SECRET not in caplog.text


def test_a_key_does_not_travel_unencrypted(monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    with pytest.raises(AnswerError, match=r"would go unencrypted to llm\.example\.org"):
        Endpoint("http://llm.example.org/v1", "m")
    assert Endpoint("https://llm.example.org/v1", "m").name == "m at llm.example.org"


@pytest.mark.parametrize("url", ["nowhere", "ftp://h/v1", "https://me:secret@h/v1", ""])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(AnswerError, match="no address like"):
        Endpoint(url, "m")


def test_documents_are_cut_to_the_room_that_is_left():
    long = [Source(Document("a", "word " * 9000), 0.9, ("word",), (1.0,))]
    with serving((["ok"], "whole")) as (server, url):
        list(Endpoint(url, "m", context_tokens=1000).write("why", long))
        ((body, _),) = server.requests
    sent = sum(len(message["content"]) for message in body["messages"])
    assert 1500 < sent <= 3 * (1000 - 256)


def test_the_command_asks_an_endpoint(workshop):
    ask = ("ask", workshop.model, "a b c", "--threshold", "0", "--endpoint-model", "m", "--endpoint")
    with serving((["It is ", "so [1]."], "whole"), ([], "no reply"), ([], "no reply")) as (_, url):
        outcome = run(*ask, url)
        assert outcome.code == 0, outcome.err
        assert outcome.out.startswith("It is so [1].\n\nConfidence ")
        check_refused(run(*ask, url), "GeneratorError: m at 127.0.0.1: no answer in two attempts")
