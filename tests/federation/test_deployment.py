"""Server and nodes as separate processes over TLS; `tests/app/test_node.py` has the same without sockets."""

import csv
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from caravan.app.learning import Experiment
from caravan.config import read_config
from caravan.data.dataset import Dataset
from caravan.storage import load
from command_line import write_table
from loopback_network import write_queries
from real_federation import make_folder, real_federation
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


def assert_model_of_the_simulation(folder: Path, dataset: Dataset, deployment: Path) -> None:
    """Each parameter within 1e-5 of what the same settings come to in one process."""
    config = read_config(deployment / "caravan.toml")
    config = replace(config, federation=replace(config.federation, partition="column", column="site"))
    theirs, ours = Experiment(dataset, config).run().trainable_state(), load(folder).trainable_state()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5, msg=name)


def test_a_node_with_a_key_trains_one_round_over_tls_to_the_model_of_the_simulation(place, tmp_path):
    dataset = replace(DATASET, train=[example for example in DATASET.train if example.columns["site"] == "east"])
    folder = make_folder(tmp_path / "fed", place, place.config(mode="head", federation={"rounds": 1}), ["east"])
    with real_federation(folder) as federation:
        federation.serve()
        federation.join("east", write_queries(tmp_path / "east.csv", DATASET, "east"))
        assert federation.submit(tmp_path / "out") == 0, federation.said("submit")
    assert "head stage, round 1/1: 1 of 1 nodes" in federation.said("submit")
    assert_model_of_the_simulation(tmp_path / "out", dataset, folder)


@pytest.mark.slow
def test_three_nodes_train_three_rounds_of_banking77_to_the_model_of_the_simulation(place, tmp_path):
    if not BANKING.is_dir():
        pytest.skip("banking77 is not there")
    with (BANKING / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = [(row["text"], row["label"], SITES[number % 3]) for number, row in enumerate(csv.DictReader(file))]
    rows = rows[::10]  # all 77 intents; the backbone is tiny, and so is what it learns
    write_table(tmp_path / "all/train.csv", ("text", "label", "site"), rows)
    labels = sorted({label for _, label, _ in rows})
    write_table(
        tmp_path / "all/documents.csv", ("doc_id", "text"), [(label, label.replace("_", " ")) for label in labels]
    )
    config = place.config(mode="head", epochs=3, federation={"rounds": 3})
    folder = make_folder(tmp_path / "fed", Place(tmp_path / "all", place.config), config, SITES)
    dataset = Dataset.read(tmp_path / "all", validation_fraction=0.0)
    with real_federation(folder) as federation:
        federation.serve()
        for site in SITES:
            own = [(text, label) for text, label, owner in rows if owner == site]
            federation.join(site, write_table(tmp_path / f"{site}.csv", ("text", "label"), own))
        for mode in ("head", "adapter"):
            federation.change("training", mode=mode)
            assert federation.submit(tmp_path / mode) == 0, federation.said("submit")
            assert f"{mode} stage, round 3/3: 3 of 3 nodes" in federation.said("submit")
            assert_model_of_the_simulation(tmp_path / mode, dataset, folder)
