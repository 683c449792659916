"""`caravan mcp`: the tools and documents by a real MCP client, in this process, over standard streams and over HTTP."""

import asyncio
import json
import os
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from socket import create_connection

import httpx2
import pytest
from mcp import Client, MCPError, StdioServerParameters

import caravan.app
from caravan.app.answers.answering import Answering
from caravan.app.toolbox import make_server
from caravan.data.records import Document
from caravan.model.retriever import Retriever
from caravan.storage import load
from caravan.training.calibration import Calibration
from command_line import PROGRAM, Workshop, check_refused, run, start_program
from real_federation import free_port
from saved_retrievers import DOCUMENTS, make_retriever

ODD = Document("../etc/passwd?x=1#y", "a document whose id looks like a path", "Odd")


@pytest.fixture(scope="module")
def retriever(bert) -> Retriever:
    return make_retriever(bert, (*DOCUMENTS, ODD))


def asking(retriever: Retriever, conversation, *, threshold: float = 0.0):
    """Let a client talk to a server in this process."""

    async def talk():
        server = make_server(retriever, lambda: Answering(retriever, calibration=Calibration(threshold=threshold)))
        async with Client(server) as client:
            return await conversation(client)

    return asyncio.run(talk())


def test_the_tools_say_what_they_take_and_that_they_change_nothing(retriever):
    async def conversation(client):
        return client.instructions, (await client.list_tools()).tools

    instructions, tools = asking(retriever, conversation)
    assert "4 documents of helpdesk" in instructions
    assert [tool.name for tool in tools] == ["search", "ask"]
    search, ask = tools
    assert all(tool.annotations.read_only_hint for tool in tools)
    assert search.input_schema["required"] == ["query"]
    assert search.input_schema["properties"]["k"]["maximum"] == 50
    assert ask.input_schema["required"] == ["question"]
    assert {"text", "citations", "confidence", "known", "found"} <= set(ask.output_schema["properties"])


def test_search_gives_the_retriever_s_hits(retriever):
    async def conversation(client):
        return await client.call_tool("search", {"query": "refund", "k": 2})

    result = asking(retriever, conversation)
    hits = retriever.search("refund", 2)
    assert not result.is_error
    assert [(hit["doc_id"], hit["rank"], hit["title"], hit["text"]) for hit in result.structured_content["result"]] == [
        (hit.doc_id, hit.rank, hit.title, hit.text) for hit in hits
    ]
    assert [hit["probability"] for hit in result.structured_content["result"]] == pytest.approx(
        [hit.probability for hit in hits]
    )
    assert hits[0].text in result.content[0].text  # for clients that read text alone


def test_ask_answers_with_citations_or_says_that_it_does_not_know(retriever):
    async def conversation(client):
        return (await client.call_tool("ask", {"question": "where is my parcel"})).structured_content

    known, silent = (asking(retriever, conversation, threshold=threshold) for threshold in (0.0, 1.0))
    expected = Answering(retriever, calibration=Calibration(threshold=0.0)).answer("where is my parcel")
    assert known["known"]
    assert known["text"] == expected.text
    assert [citation["doc_id"] for citation in known["citations"]] == [each.doc_id for each in expected.citations]
    assert silent["text"] == "I don't know."
    assert (silent["known"], silent["citations"]) == (False, [])


def test_many_questions_at_once_get_the_answers_that_single_ones_get(retriever):
    questions = [f"refund {number}" for number in range(20)]

    async def conversation(client):
        results = await asyncio.gather(*(client.call_tool("search", {"query": query}) for query in questions))
        return [result.structured_content["result"] for result in results]

    found = asking(retriever, conversation)
    assert [[hit["doc_id"] for hit in hits] for hits in found] == [
        [hit.doc_id for hit in retriever.search(question, 5)] for question in questions
    ]


def test_searches_are_answered_while_the_answers_are_being_prepared(retriever):
    searched = threading.Event()

    def prepare():
        assert searched.wait(60)
        return Answering(retriever, calibration=Calibration(threshold=0.0))

    async def talk():
        async with Client(make_server(retriever, prepare)) as client:
            asked = asyncio.create_task(client.call_tool("ask", {"question": "refund"}))
            found = await client.call_tool("search", {"query": "refund"})
            searched.set()
            return found, await asked

    found, answer = asyncio.run(talk())
    assert not found.is_error
    assert answer.structured_content["known"]


@pytest.mark.parametrize(
    ("tool", "given", "told"),
    [
        ("search", {"query": "  "}, "is empty; give at least one word"),
        ("search", {"query": ""}, "at least 1 character"),
        ("search", {"query": "x" * 20_001}, "at most 20000 characters"),
        ("search", {"query": "refund", "k": 51}, "less than or equal to 50"),
        ("search", {"query": 3}, "valid string"),
        ("search", {}, "required"),
        ("ask", {"question": " "}, "is empty; give at least one word"),
    ],
)
def test_a_wrong_call_is_told_to_the_assistant_so_that_it_can_call_again(retriever, tool, given, told):
    async def conversation(client):
        return await client.call_tool(tool, given), await client.call_tool("search", {"query": "refund"})

    refused, after = asking(retriever, conversation)
    assert refused.is_error
    assert told in refused.content[0].text
    assert not after.is_error


def test_documents_are_listed_and_read_by_id(retriever):
    async def conversation(client):
        listed = await client.read_resource("caravan://documents")
        (template,) = (await client.list_resource_templates()).resource_templates
        read = await client.read_resource("caravan://documents/parcel")
        odd = await client.read_resource("caravan://documents/..%2Fetc%2Fpasswd%3Fx%3D1%23y")
        with pytest.raises(MCPError, match="no document 'nothing'"):
            await client.read_resource("caravan://documents/nothing")
        return json.loads(listed.contents[0].text), template.uri_template, read.contents[0].text, odd.contents[0].text

    listed, template, read, odd = asking(retriever, conversation)
    assert listed["total"] == 4
    assert listed["documents"][0] == {"doc_id": "parcel", "title": "Tracking"}
    assert template == "caravan://documents/{doc_id}"
    assert read == "Tracking. track a parcel"
    assert odd == "Odd. a document whose id looks like a path"


def test_a_client_starts_the_program_and_talks_over_standard_streams(workshop: Workshop):
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    parameters = StdioServerParameters(command=str(PROGRAM), args=["mcp", str(workshop.model)], env=settings)

    async def talk():
        async with Client(parameters) as client:
            found = await client.call_tool("search", {"query": "a b c", "k": 2})
            answer = await client.call_tool("ask", {"question": "a b c"})
            document = await client.read_resource("caravan://documents/d0")
            return client.server_info.version, found.structured_content["result"], answer, document.contents[0].text

    version, found, answer, document = asyncio.run(talk())
    assert version == caravan.__version__
    expected = load(workshop.model).search("a b c", 2)
    assert [hit["doc_id"] for hit in found] == [hit.doc_id for hit in expected]
    assert [hit["score"] for hit in found] == pytest.approx([hit.score for hit in expected], rel=1e-4)
    assert set(answer.structured_content) == {"text", "citations", "confidence", "known", "found"}
    assert document == "Letters d0. a b c d e"


@pytest.mark.slow
def test_a_client_talks_over_http(workshop: Workshop):
    port = free_port()
    with start_program("mcp", str(workshop.model), "--http", str(port)) as process:
        try:
            deadline = time.monotonic() + 120
            while True:
                try:
                    with closing(create_connection(("127.0.0.1", port), timeout=1)):
                        break
                except OSError:
                    assert process.poll() is None, process.stderr.read()
                    assert time.monotonic() < deadline
                    time.sleep(0.2)

            async def talk():
                async with Client(f"http://127.0.0.1:{port}/mcp") as client:
                    return (await client.call_tool("search", {"query": "a b c", "k": 1})).structured_content["result"]

            (hit,) = asyncio.run(talk())
            message = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
            for headers, status in (
                ({"Origin": "https://elsewhere.example"}, 403),
                ({"Host": "elsewhere.example"}, 421),
            ):
                refused = httpx2.post(f"http://127.0.0.1:{port}/mcp", json=message, headers=headers)
                assert refused.status_code == status
        finally:
            process.terminate()
            process.communicate()
    assert hit["doc_id"] == load(workshop.model).search("a b c", 1)[0].doc_id


def test_the_tools_can_be_listed_as_json(workshop: Workshop):
    outcome = run("mcp", workshop.model, "--json")
    assert outcome.code == 0, outcome.err
    assert [tool["name"] for tool in json.loads(outcome.out)["tools"]] == ["search", "ask"]


def test_what_cannot_be_given_is_refused_in_one_line(workshop: Workshop, tmp_path: Path):
    check_refused(run("mcp", tmp_path / "none"), "no such folder")
    check_refused(run("mcp", workshop.model, "--http", "0"), "--http", code=2)
    check_refused(run("mcp", workshop.model, "--endpoint", "http://localhost:1/v1"), "--endpoint-model", code=2)
    check_refused(run("mcp", workshop.model, "--generator", "self"), "decoder")


def test_without_the_extra_it_is_named_in_one_line(workshop: Workshop, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "mcp" or name == "caravan.app.toolbox"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(caravan.app, "toolbox", raising=False)
    monkeypatch.setitem(sys.modules, "mcp", None)
    check_refused(run("mcp", workshop.model), "pip install 'caravan[mcp]'")
