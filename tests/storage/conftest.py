from pathlib import Path

import pytest

from caravan.config import BackboneConfig
from caravan.model.backbone import Backbone, load_backbone
from caravan.storage import save
from saved_retrievers import make_retriever
from tiny_models import make_tiny_bert, make_tiny_llama


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Backbone]:
    folder = tmp_path_factory.mktemp("models")
    makers = {"bert": make_tiny_bert, "llama": make_tiny_llama}
    return {name: load_backbone(BackboneConfig(name=str(make(folder / name)))) for name, make in makers.items()}


@pytest.fixture
def saved(tmp_path, models) -> Path:
    return save(make_retriever(models["bert"]), tmp_path / "saved")
