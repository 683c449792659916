"""A tiny frozen model and a saved retriever of random numbers, made once for all tests here; none changes them."""

import os
from pathlib import Path

import pytest

from caravan.config import AdapterConfig, HeadConfig
from caravan.data.records import Document
from caravan.model.backbone import Backbone
from caravan.model.retriever import Retriever
from caravan.storage import save
from saved_retrievers import DOCUMENTS, make_retriever
from toy_training import toy_backbone

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # read when Haystack is imported

# Metadata of a document's own that has a name of ours: ours must win.
SCORED = Document("scored", "how scores are made", "Scores", {"score": "its own", "topic": "help"})


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return toy_backbone(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def retriever(backbone: Backbone) -> Retriever:
    return make_retriever(backbone, (*DOCUMENTS, SCORED), adapter=AdapterConfig(), head=HeadConfig(hidden=8))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, retriever: Retriever) -> Path:
    return save(retriever, tmp_path_factory.mktemp("saved") / "retriever")
