"""The LangChain retriever, by the real langchain-core: invoke, ainvoke, batch, callbacks, chains."""

import asyncio

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ValidationError

from caravan.errors import DataError, StorageError
from caravan.integrations.langchain import CaravanRetriever
from saved_retrievers import QUERIES


@pytest.fixture(scope="module")
def ours(folder) -> CaravanRetriever:
    return CaravanRetriever(source=folder, k=2)


def test_invoke_gives_the_hits_as_documents(ours, retriever):
    assert isinstance(ours, BaseRetriever)
    found = ours.invoke(QUERIES[0])
    hits = retriever.search(QUERIES[0], 2)
    assert len(found) == 2
    for document, hit in zip(found, hits, strict=True):
        assert isinstance(document, Document)
        assert document.id == hit.doc_id
        assert document.page_content == retriever.catalogue.document(retriever.catalogue.row(hit.doc_id)).content
        ours_of_it = {name: document.metadata[name] for name in ("doc_id", "title", "rank", "score", "probability")}
        assert ours_of_it == {
            "doc_id": hit.doc_id,
            "title": hit.title,
            "rank": hit.rank,
            "score": hit.score,
            "probability": hit.probability,
        }


def test_the_text_is_title_and_text_and_the_document_s_metadata_is_there(folder):
    found = {document.id: document for document in CaravanRetriever(source=folder, k=4).invoke("refund")}
    assert found["parcel"].page_content == "Tracking. track a parcel"
    assert found["parcel"].metadata["url"] == "https://example.org/1"
    assert found["scored"].metadata["topic"] == "help"


def test_async_and_batches_give_what_single_calls_give(ours):
    questions = [f"{query} {number}" for number in range(12) for query in QUERIES]
    singly = [[document.id for document in ours.invoke(question)] for question in questions]

    async def asked():
        return [await ours.ainvoke(question) for question in questions], await ours.abatch(questions)

    one_by_one, at_once = asyncio.run(asked())
    for results in (ours.batch(questions), one_by_one, at_once):
        assert [[document.id for document in documents] for documents in results] == singly


def test_a_retriever_in_memory_is_taken_and_k_has_langchain_s_default(retriever):
    in_memory = CaravanRetriever(source=retriever)
    assert in_memory.k == 4
    assert [document.id for document in in_memory.invoke("refund")] == [
        hit.doc_id for hit in retriever.search("refund", 4)
    ]


def test_callbacks_hear_of_the_question_and_of_what_was_found(ours):
    heard = []

    class Ear(BaseCallbackHandler):
        def on_retriever_start(self, serialized, query, **rest):
            heard.append(query)

        def on_retriever_end(self, documents, **rest):
            heard.append([document.id for document in documents])

    found = ours.invoke("refund", config={"callbacks": [Ear()]})
    assert heard == ["refund", [document.id for document in found]]


def test_it_is_a_link_of_a_chain(ours):
    chain = ours | (lambda documents: ", ".join(document.metadata["doc_id"] for document in documents))
    assert chain.invoke("refund") == ", ".join(document.id for document in ours.invoke("refund"))


def test_wrong_use_is_refused_at_once(folder, tmp_path, ours):
    with pytest.raises(StorageError, match="nowhere"):
        CaravanRetriever(source=tmp_path / "nowhere")
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        CaravanRetriever(source=folder, k=0)
    with pytest.raises(DataError, match="empty"):
        ours.invoke("  ")
