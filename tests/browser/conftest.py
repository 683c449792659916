"""Browsers, a small served retriever of random numbers, and one trained on the help desk; made once for all tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from browsing import browser, hosted, program_serving
from caravan.config import BackboneConfig
from caravan.data.records import Document
from caravan.model.backbone import load_backbone
from caravan.storage import save
from command_line import run
from saved_retrievers import DOCUMENTS, make_retriever
from served import make
from tiny_models import make_tiny_bert

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def chromium() -> Iterator["object"]:
    """A browser for a module: its loop of events would be in the way of tests elsewhere that have their own."""
    with browser() as started:
        yield started


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved retriever of random numbers, one of whose documents is a trap; no test changes it."""
    backbone = load_backbone(BackboneConfig(name=str(make_tiny_bert(tmp_path_factory.mktemp("bert")))))
    trap = Document("evil", f"a refund {EVIL} <script>alert(2)</script>", EVIL, {EVIL: EVIL})
    return save(make_retriever(backbone, (*DOCUMENTS, trap)), tmp_path_factory.mktemp("small") / "small")


@pytest.fixture(scope="module")
def at_small(small: Path) -> Iterator[str]:
    """The address of it, served in this process."""
    with hosted(make(small, mips=True)) as address:
        yield address


@pytest.fixture(scope="session")
def helpdesk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A retriever that knows the help desk, trained by the real command for a few epochs; no test changes it."""
    folder = tmp_path_factory.mktemp("helpdesk") / "helpdesk"
    settings = ("training.mode=head", "training.head.epochs=5", "evaluation.baselines=false", "evaluation.bootstrap=20")
    options = [word for setting in settings for word in ("--set", setting)]
    outcome = run("train", "helpdesk", "--out", folder, *options)
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture(scope="module")
def at_helpdesk(helpdesk: Path) -> Iterator[str]:
    """The address of a real `caravan serve` of it, which nobody may change."""
    with program_serving(helpdesk, "--mips") as address:
        yield address
