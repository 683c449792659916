"""Nodes that train with privacy: their own ledger, cap and say, whatever the server asks."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w

from caravan.app.nodes.deployment import Deployment
from caravan.config import read_toml
from caravan.storage import load
from caravan.training.ledger import read_ledger
from loopback_network import Loopback, make_loopback
from toy_experiments import SITES

PRIVATE = {"mode": "dp-sgd", "batch": 4, "noise_multiplier": 1.0}


def with_privacy(deployment: Deployment, settings: dict[str, object]) -> Deployment:
    place = deployment.folder / "caravan.toml"
    values = read_toml(place)
    values["privacy"] = {**values.get("privacy", {}), **settings}
    place.write_text(tomli_w.dumps(values), encoding="utf-8")
    return Deployment.read(deployment.folder)


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ledger_folder: Path) -> Loopback:
    monkeypatch.setenv("CARAVAN_CACHE", str(tmp_path / "cache"))
    made = make_loopback(tmp_path, monkeypatch, mode="head", epochs=2, federation={"rounds": 2})
    return replace(made, deployment=with_privacy(made.deployment, PRIVATE))


def own_folder(network: Loopback, site: str, settings: dict[str, object]) -> None:
    """Give a node a copy of the folder with its own settings of privacy."""
    place = network.deployment.folder.parent / f"{site}-folder"
    shutil.copytree(network.deployment.folder, place)
    network.folders[site] = with_privacy(Deployment.read(place), settings)


def rounds_of(folder: Path) -> list[dict]:
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))["federation"]["rounds"]


def test_each_node_keeps_a_ledger_and_sends_neither_its_count_nor_its_epsilon(network, tmp_path, ledger_folder):
    network.run(tmp_path / "out")
    rounds = rounds_of(tmp_path / "out")
    assert all(report["examples"] == [1, 1, 1] for report in rounds)
    assert all(report["metrics"] == [{}, {}, {}] for report in rounds)
    spent = read_ledger(ledger_folder)
    assert len(spent) == len(SITES)
    assert all(len(entries) == 2 for _, entries in spent)  # an epoch a round
    record = load(tmp_path / "out").record
    assert "each node added its own noise" in record["privacy"]


def test_a_node_lets_its_epsilon_out_where_its_operator_says_so(network, tmp_path):
    network.lets_out["east"] = {"metrics": "epsilon"}
    network.run(tmp_path / "out")
    east = [report["metrics"][report["clients"].index("east")]["epsilon"] for report in rounds_of(tmp_path / "out")]
    assert 0 < east[0] < east[1]


def test_a_nodes_own_cap_stops_it_whatever_the_server_asks(network, tmp_path, ledger_folder):
    own_folder(network, "west", {"epsilon_cap": 0.01})
    network.run(tmp_path / "out")
    for report in rounds_of(tmp_path / "out"):
        assert report["clients"] == ["east", "north"]
        assert [failure["client"] for failure in report["failures"]] == ["west"]
        assert "privacy budget" in report["failures"][0]["reason"]
    assert len(read_ledger(ledger_folder)) == 2  # nothing of west's was used


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ({"noise_multiplier": 2.0}, "less noise than the node allows"),
        ({"mode": "dp-sgd-adaptive"}, "another kind of privacy"),
        ({"epsilon": 3.0, "noise_multiplier": 0.0}, "a larger epsilon than the node allows"),
    ],
)
def test_a_node_refuses_less_privacy_than_its_own_settings_ask_for(network, tmp_path, own, reason):
    own_folder(network, "west", own)
    network.run(tmp_path / "out")
    assert all(reason in report["failures"][0]["reason"] for report in rounds_of(tmp_path / "out"))
