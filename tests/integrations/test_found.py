"""A missing framework is told in one line; a folder is opened; a hit's metadata."""

import importlib
import sys

import pytest

import caravan
from caravan.errors import IntegrationError
from caravan.integrations.found import document_of, opened

FRAMEWORKS = {
    "langchain": ("langchain_core", "langchain"),
    "llama_index": ("llama_index", "llama-index"),
    "haystack": ("haystack", "haystack"),
    "mteb": ("mteb", "mteb"),
    "mteb_task": ("mteb", "mteb"),
    "sklearn": ("sklearn", "sklearn"),
}


@pytest.mark.parametrize("module", FRAMEWORKS)
def test_without_its_framework_an_integration_says_which_extra_installs_it(module, monkeypatch):
    package, extra = FRAMEWORKS[module]
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"caravan.integrations.{module}", raising=False)
    with pytest.raises(IntegrationError) as raised:
        importlib.import_module(f"caravan.integrations.{module}")
    assert str(raised.value) == f"this needs {package}; install it: pip install 'caravan[{extra}]'"
    assert isinstance(raised.value, ImportError)
    assert isinstance(raised.value, caravan.CaravanError)
    assert raised.value.name == package


def test_a_retriever_is_taken_as_it_is_and_a_folder_is_loaded(retriever, folder):
    assert opened(retriever) is retriever
    for place in (folder, str(folder)):
        assert opened(place).search("refund") == retriever.search("refund")


def test_what_is_known_of_a_hit_wins_over_the_document_s_own_metadata(retriever):
    hit = next(hit for hit in retriever.search("scores", 4) if hit.doc_id == "scored")
    document, metadata = document_of(retriever, hit)
    assert document.metadata == {"score": "its own", "topic": "help"}
    assert metadata == {
        "topic": "help",
        "doc_id": "scored",
        "title": "Scores",
        "rank": hit.rank,
        "score": hit.score,
        "probability": hit.probability,
    }
