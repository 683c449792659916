"""A tiny frozen model, a small data set, quick settings and a saved retriever, made once for all tests here."""

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from caravan.app.learning import Experiment
from caravan.config import AdapterConfig, BackboneConfig, Config, HeadConfig
from caravan.model.backbone import Backbone, load_backbone
from caravan.storage import save
from caravan.training.features import FeatureStore
from command_line import Workshop, run, write_table
from saved_retrievers import make_retriever
from tiny_models import make_tiny_bert
from toy_experiments import DATASET, Place, make_place, toy_settings
from toy_training import CATALOGUE, toy_backbone, toy_examples

_QUICK = """
[data]
path = '{data}'
[backbone]
name = '{backbone}'
max_tokens = 24
[head]
hidden = 0
[training]
mode = "head"
precision = "float32"
[training.head]
epochs = 2
batch_size = 16
learning_rate = 0.002
[training.adapter]
epochs = 1
[evaluation]
baselines = false
random_backbone = false
bootstrap = 20
"""


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """A shell starts its background jobs deaf to Ctrl-C, and CI may be one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    root = tmp_path_factory.mktemp("workshop")
    backbone, data, quick = make_tiny_bert(root / "backbone"), root / "letters", root / "quick.toml"
    for name, count, seed in (("train", 40, 0), ("test", 12, 1)):
        rows = [
            (example.text, example.doc_ids[0], "south" if number % 4 == 0 else "north")
            for number, example in enumerate(toy_examples(count, seed=seed))
        ]
        write_table(data / f"{name}.csv", ("text", "label", "site"), rows)
    documents = [(document.doc_id, document.text, f"Letters {document.doc_id}") for document in CATALOGUE]
    write_table(data / "documents.csv", ("doc_id", "text", "title"), documents)
    quick.write_text(_QUICK.format(data=data, backbone=backbone), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARAVAN_CACHE", str(root / "cache"))
        outcome = run("train", "-c", quick, "-o", root / "model")
    assert outcome.code == 0, outcome.err
    return Workshop(backbone, data, quick, root / "model")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which the commands of a test run; vectors are kept elsewhere, and shared by all tests."""
    monkeypatch.setenv("CARAVAN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def vectors_are_kept_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors depend in their last bits on batch mates: who compares bits starts from an empty cache."""
    monkeypatch.setenv("CARAVAN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def few_queries_are_timed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("caravan.app.comparison._LATENCY_QUERIES", 2)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return toy_backbone(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def settings(backbone: Backbone) -> Callable[..., Config]:
    return lambda **parts: toy_settings(backbone.config, **parts)


@pytest.fixture
def prepare(backbone: Backbone) -> Callable[..., Experiment]:
    """An experiment without files of its own: vectors are computed anew, the backbone is shared."""

    def prepare(config, dataset=DATASET, **options):
        return Experiment(dataset, config, **{"backbone": backbone, "store": FeatureStore(), **options})

    return prepare


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_backbone(BackboneConfig(name=str(make_tiny_bert(tmp_path_factory.mktemp("bert")))))


@pytest.fixture(scope="session")
def master(tmp_path_factory: pytest.TempPathFactory, bert: Backbone) -> Path:
    """A saved retriever of random numbers that is served; no test changes it."""
    retriever = make_retriever(bert, adapter=AdapterConfig(), head=HeadConfig(hidden=8))
    return save(retriever, tmp_path_factory.mktemp("master") / "saved")


@pytest.fixture
def folder(tmp_path: Path, master: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(master, tmp_path / "saved"))
