"""The LlamaIndex retriever, by the real llama-index-core: nodes, post-processors, query engine, fusion."""

import asyncio

import pytest
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import MetadataMode, QueryBundle

from caravan.errors import DataError, StorageError
from caravan.integrations.llama_index import CaravanRetriever


@pytest.fixture(scope="module")
def ours(folder) -> CaravanRetriever:
    return CaravanRetriever(folder, similarity_top_k=3)


def test_retrieve_gives_the_hits_as_nodes_whose_score_is_the_probability(ours, retriever):
    assert isinstance(ours, BaseRetriever)
    found, hits = ours.retrieve("refund"), retriever.search("refund", 3)
    assert [node.node_id for node in found] == [hit.doc_id for hit in hits]
    assert [node.score for node in found] == [hit.probability for hit in hits]
    assert [node.metadata["score"] for node in found] == [hit.score for hit in hits]
    assert [node.metadata["rank"] for node in found] == [1, 2, 3]


def test_a_bundle_and_the_async_way_give_the_same(ours):
    singly = [node.node_id for node in ours.retrieve("refund")]
    assert [node.node_id for node in ours.retrieve(QueryBundle("refund"))] == singly
    assert [node.node_id for node in asyncio.run(ours.aretrieve("refund"))] == singly


def test_a_language_model_reads_words_not_numbers(retriever):
    found = {node.node_id: node.node for node in CaravanRetriever(retriever, similarity_top_k=4).retrieve("refund")}
    read = found["parcel"].get_content(MetadataMode.LLM)
    assert "Tracking. track a parcel" in read
    assert "url: https://example.org/1" in read
    assert "probability" not in read
    assert "score" not in read
    assert found["parcel"].get_content(MetadataMode.EMBED) == read


def test_a_cut_off_on_the_score_cuts_by_probability(ours, retriever):
    second = retriever.search("refund", 2)[1].probability
    kept = SimilarityPostprocessor(similarity_cutoff=second).postprocess_nodes(ours.retrieve("refund"))
    assert [node.node_id for node in kept] == [hit.doc_id for hit in retriever.search("refund", 2)]


def test_a_query_engine_answers_from_what_was_found(ours):
    engine = RetrieverQueryEngine.from_args(ours, llm=MockLLM())
    answer = engine.query("where is my parcel")
    assert [node.node_id for node in answer.source_nodes] == [
        node.node_id for node in ours.retrieve("where is my parcel")
    ]
    assert "where is my parcel" in str(answer)  # the mock repeats its prompt
    for node in answer.source_nodes:
        assert node.node.text in str(answer)


def test_wrong_use_is_refused(tmp_path, folder, ours):
    with pytest.raises(StorageError, match="nowhere"):
        CaravanRetriever(tmp_path / "nowhere")
    with pytest.raises(DataError, match="k = 0"):
        CaravanRetriever(folder, similarity_top_k=0).retrieve("refund")
    with pytest.raises(DataError, match="empty"):
        ours.retrieve(" ")
