"""The Haystack component, by the real haystack-ai: pipelines, YAML, warm-up."""

import pytest
from haystack import Document, Pipeline
from haystack.components.builders import PromptBuilder
from haystack.core.errors import DeserializationError

from caravan.errors import DataError, StorageError
from caravan.integrations import haystack
from caravan.integrations.haystack import CaravanRetriever

TRUSTED = ["caravan.integrations.haystack"]


def pipeline_of(component: CaravanRetriever) -> Pipeline:
    pipeline = Pipeline()
    pipeline.add_component("retriever", component)
    template = "{% for document in documents %}{{ document.content }}|{% endfor %}"
    pipeline.add_component("prompt", PromptBuilder(template=template, required_variables="*"))
    pipeline.connect("retriever.documents", "prompt.documents")
    return pipeline


def test_run_gives_the_hits_as_documents_whose_score_is_the_probability(folder, retriever):
    found, hits = CaravanRetriever(folder, top_k=3).run("refund")["documents"], retriever.search("refund", 3)
    assert all(isinstance(document, Document) for document in found)
    assert [(document.id, document.score, document.meta["score"]) for document in found] == [
        (hit.doc_id, hit.probability, hit.score) for hit in hits
    ]
    (parcel,) = [
        document for document in CaravanRetriever(retriever).run("refund")["documents"] if document.id == "parcel"
    ]
    assert parcel.content == "Tracking. track a parcel"
    assert parcel.meta["url"] == "https://example.org/1"


def test_a_run_may_ask_for_another_number(folder):
    component = CaravanRetriever(folder, top_k=3)
    assert len(component.run("refund", top_k=1)["documents"]) == 1
    assert len(component.run("refund")["documents"]) == 3
    with pytest.raises(DataError, match="k = 0"):
        component.run("refund", top_k=0)


def test_the_folder_is_read_at_the_warm_up_and_once(folder, monkeypatch, tmp_path):
    loads = []
    monkeypatch.setattr(haystack, "opened", lambda source, **rest: loads.append(source))
    component = CaravanRetriever(folder)
    assert loads == []
    component.warm_up()
    assert loads == [folder]
    monkeypatch.undo()
    component = CaravanRetriever(folder)
    component.warm_up()
    loaded = component._retriever
    component.warm_up()
    assert component._retriever is loaded
    with pytest.raises(StorageError, match="nowhere"):
        CaravanRetriever(tmp_path / "nowhere").warm_up()


def test_a_pipeline_is_written_to_yaml_and_finds_the_same_when_read_back(folder):
    pipeline = pipeline_of(CaravanRetriever(folder, top_k=2))
    written = pipeline.dumps()
    with pytest.raises(DeserializationError, match="caravan"):
        Pipeline.loads(written)  # Haystack trusts its own modules alone
    again = Pipeline.loads(written, allowed_modules=TRUSTED)
    asked = {"retriever": {"query": "where is my parcel"}}
    assert again.run(asked) == pipeline.run(asked)
    assert again.dumps() == written


def test_to_dict_and_from_dict_keep_every_setting(folder):
    values = CaravanRetriever(folder, top_k=7, device="cpu").to_dict()
    assert values == {
        "type": "caravan.integrations.haystack.CaravanRetriever",
        "init_parameters": {"source": str(folder), "top_k": 7, "device": "cpu"},
    }
    again = CaravanRetriever.from_dict(values)
    assert (again.source, again.top_k, again.device) == (str(folder), 7, "cpu")


def test_a_retriever_in_memory_runs_but_cannot_be_written_down(retriever):
    component = CaravanRetriever(retriever, top_k=1)
    assert component.run("refund")["documents"][0].id == retriever.search("refund", 1)[0].doc_id
    with pytest.raises(StorageError, match="give the folder"):
        pipeline_of(component).dumps()
