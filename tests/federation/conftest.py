"""A tiny frozen model, made once for all tests here; none changes it."""

import pytest

from caravan.model.backbone import Backbone
from toy_training import toy_backbone


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return toy_backbone(tmp_path_factory.mktemp("bert"))
