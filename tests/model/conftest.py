"""One tiny model of each family for all tests of this floor, made at its first use."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from caravan.config import BackboneConfig
from caravan.model.backbone import Backbone, load_backbone
from tiny_models import FAMILIES


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def folder_of(family: str) -> Path:
        return root / family if (root / family).is_dir() else FAMILIES[family](root / family)

    return folder_of


@pytest.fixture(scope="session")
def backbone_of(folder_of: Callable[[str], Path]) -> Callable[..., Backbone]:
    """Backbones shared by all tests: frozen, so that a test which changes one has to load its own."""

    @cache
    def backbone_of(family: str, **settings: Any) -> Backbone:
        return load_backbone(BackboneConfig(name=str(folder_of(family)), **settings))

    return backbone_of
