"""Server and nodes as separate processes over TLS; `tests/app/test_node.py` has the same without sockets."""

import csv
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from caravan.app.deployment import init_deployment
from caravan.app.learning import Experiment
from caravan.config import Config, read_config
from caravan.data.dataset import Dataset
from caravan.storage import load
from command_line import write_table
from loopback_network import write_queries
from real_federation import RealFederation, free_port, real_federation
from toy_experiments import DATASET, Place, make_place

SHARED = Path(os.environ.get("CARAVAN_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data")
BANKING = SHARED / "banking77"
SITES = ("east", "north", "west")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(autouse=True)
def vectors_are_kept_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARAVAN_CACHE", str(tmp_path / "cache"))


def make(folder: Path, place: Place, config: Config, nodes: tuple[str, ...] = SITES) -> Path:
    deployment = replace(config.deployment, port=free_port(), connect_seconds=300.0)
    settings = replace(config, deployment=deployment)
    return init_deployment(folder, str(place.data / "documents.csv"), nodes, settings).folder


def assert_same_model(folder: Path, theirs: dict[str, torch.Tensor]) -> None:
    ours = load(folder).trainable_state()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow  # a second process of Flower's where the machine is too busy for the first: see docs/federation.md
def test_two_nodes_with_keys_train_one_round_over_tls_to_the_model_of_the_simulation(place, tmp_path):
    dataset = replace(DATASET, train=[example for example in DATASET.train if example.columns["site"] != "north"])
    folder = make(tmp_path / "fed", place, place.config(mode="head", federation={"rounds": 1}), ("east", "west"))
    with real_federation(folder) as federation:
        federation.serve()
        for site in ("east", "west"):
            federation.join(site, write_queries(tmp_path / f"{site}.csv", DATASET, site))
        assert federation.submit(tmp_path / "out") == 0, federation.said("submit")
    assert "head stage, round 1/1: 2 of 2 nodes" in federation.said("submit")
    config = read_config(folder / "caravan.toml")
    config = replace(config, federation=replace(config.federation, partition="column", column="site"))
    assert_same_model(tmp_path / "out", Experiment(dataset, config).run().trainable_state())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["head", "adapter"])
def test_three_nodes_train_three_rounds_of_banking77_to_the_model_of_the_simulation(place, tmp_path, mode):
    if not BANKING.is_dir():
        pytest.skip("banking77 is not there")
    with (BANKING / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = [(row["text"], row["label"], SITES[number % 3]) for number, row in enumerate(csv.DictReader(file))]
    rows = rows[::10]  # all 77 intents; the backbone is tiny, and so is what it learns
    write_table(tmp_path / "all/train.csv", ("text", "label", "site"), rows)
    labels = sorted({label for _, label, _ in rows})
    documents = [(label, label.replace("_", " ")) for label in labels]
    write_table(tmp_path / "all/documents.csv", ("doc_id", "text"), documents)
    config = place.config(mode=mode, epochs=3, federation={"rounds": 3})
    folder = make(tmp_path / "fed", Place(tmp_path / "all", place.config), config)
    with real_federation(folder) as federation:
        federation.serve()
        for site in SITES:
            own = [(text, label) for text, label, owner in rows if owner == site]
            federation.join(site, write_table(tmp_path / f"{site}.csv", ("text", "label"), own))
        assert federation.submit(tmp_path / "out") == 0, federation.said("submit")
    dataset = Dataset.read(tmp_path / "all", validation_fraction=0.0)
    config = read_config(folder / "caravan.toml")
    config = replace(config, federation=replace(config.federation, partition="column", column="site"))
    assert_same_model(tmp_path / "out", Experiment(dataset, config).run().trainable_state())


@pytest.fixture
def running(place: Place, tmp_path: Path):
    """A server with a node that works, for three registered names; the other nodes are up to the test."""
    folder = make(tmp_path / "fed", place, place.config(mode="head", federation={"rounds": 2}))
    with real_federation(folder) as federation:
        federation.serve()
        federation.join("east", write_queries(tmp_path / "east.csv", DATASET, "east"))
        yield federation


def other_folder(federation: RealFederation, name: str) -> Path:
    return Path(shutil.copytree(federation.folder, federation.folder.parent / name))


@pytest.mark.slow
def test_a_wrong_catalogue_and_an_empty_file_leave_their_nodes_out_with_a_reason(running, tmp_path):
    folder = other_folder(running, "north-folder")
    documents = folder / "documents.jsonl"
    documents.write_text(documents.read_text(encoding="utf-8").replace("a b c", "c b a"), encoding="utf-8")
    running.join("north", write_queries(tmp_path / "north.csv", DATASET, "north"), folder=folder)
    running.join("west", write_table(tmp_path / "west.csv", ("text", "label"), []))
    assert running.submit(tmp_path / "out") == 0, running.said("submit")
    assert "without north: FederationError: another catalogue" in running.said("submit")
    assert "without west: FederationError: its data cannot be used" in running.said("submit")
    assert load(tmp_path / "out").record["federation"]["clients"][0]["name"] == "east"


@pytest.mark.slow
def test_an_unregistered_key_and_a_server_of_another_authority_are_refused(running, place, tmp_path):
    stranger = make(tmp_path / "stranger", place, place.config())
    data = write_queries(tmp_path / "north.csv", DATASET, "north")
    unregistered, wrong_authority = other_folder(running, "unregistered"), other_folder(running, "wrong-authority")
    shutil.copy(stranger / "nodes/north.key", unregistered / "nodes/north.key")
    shutil.copy(stranger / "certificates/ca.crt", wrong_authority / "certificates/ca.crt")
    for folder in (unregistered, wrong_authority):
        assert running.join("north", data, folder=folder).wait() == 1, folder
        assert "node north ended with exit code" in running.said("north")


@pytest.mark.slow
def test_plaintext_is_refused(running, tmp_path):
    folder = other_folder(running, "plain")
    settings = folder / "caravan.toml"
    text = settings.read_text(encoding="utf-8").replace("insecure = false", "insecure = true")
    settings.write_text(text, encoding="utf-8")
    process = running.join("north", write_queries(tmp_path / "north.csv", DATASET, "north"), folder=folder)
    assert process.wait() == 1


@pytest.mark.slow
def test_a_run_whose_nodes_all_fail_exits_with_1_and_the_reason_and_can_be_resumed(running, tmp_path):
    data = tmp_path / "east.csv"
    shutil.move(data, tmp_path / "elsewhere.csv")
    for site in ("north", "west"):
        running.join(site, tmp_path / f"{site}.csv")
    assert running.submit(tmp_path / "out") == 1
    assert "0 of 3 clients sent a usable update" in running.said("submit")
    assert "Traceback" not in running.said("submit")
    assert not (tmp_path / "out").exists()
    shutil.move(tmp_path / "elsewhere.csv", data)
    assert running.submit(tmp_path / "out", "--resume") == 0, running.said("submit")


@pytest.mark.slow
def test_a_server_that_is_started_again_knows_its_nodes_and_runs(running, tmp_path):
    for site in ("north", "west"):
        running.join(site, write_queries(tmp_path / f"{site}.csv", DATASET, site))
    assert running.submit(tmp_path / "first") == 0, running.said("submit")
    running.stop("server")
    running.serve()
    assert running.submit(tmp_path / "second") == 0, running.said("submit")
    assert_same_model(tmp_path / "second", load(tmp_path / "first").trainable_state())
