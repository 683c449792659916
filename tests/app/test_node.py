import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from caravan.app.learning import Experiment
from caravan.app.nodes import coordinator
from caravan.app.nodes.deployment import Deployment
from caravan.app.web.following import Following
from caravan.errors import FederationError
from caravan.model.encoder import Encoder
from caravan.storage import load
from command_line import write_table
from loopback_network import Loopback, make_loopback, simulated
from toy_experiments import SITES


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loopback:
    monkeypatch.setenv("CARAVAN_CACHE", str(tmp_path / "cache"))
    return make_loopback(tmp_path, monkeypatch, mode="head")


def failures(folder: Path) -> dict[str, str]:
    """Why nodes were left out, in the rounds of a saved retriever."""
    rounds = json.loads((folder / "training.json").read_text(encoding="utf-8"))["federation"]["rounds"]
    return {failure["client"]: failure["reason"] for report in rounds for failure in report["failures"]}


def copied_folder(network: Loopback, site: str, change: tuple[str, str], file: str = "caravan.toml") -> Deployment:
    """A node's own copy of the folder, in which one word of a file is another."""
    place = network.deployment.folder.parent / f"{site}-folder"
    shutil.copytree(network.deployment.folder, place)
    text = (place / file).read_text(encoding="utf-8")
    assert change[0] in text
    (place / file).write_text(text.replace(*change), encoding="utf-8")
    network.folders[site] = Deployment.read(place)
    return network.folders[site]


@pytest.mark.parametrize("mode", ["head", "adapter"])
def test_nodes_with_their_own_files_come_to_the_model_of_the_simulation(mode, tmp_path, monkeypatch):
    monkeypatch.setenv("CARAVAN_CACHE", str(tmp_path / "cache"))
    network = make_loopback(tmp_path, monkeypatch, mode=mode, epochs=3, federation={"rounds": 3})
    network.run(tmp_path / "out")
    deployed = load(tmp_path / "out")
    theirs = simulated(network.deployment.config, store=None).trainable_state()
    for name, tensor in deployed.trainable_state().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5, msg=name)
    rounds = deployed.record["federation"]["rounds"]
    assert [report["stage"] for report in rounds] == ["head"] * 3 + (["adapter"] * 3 if mode == "adapter" else [])
    assert deployed.record["federation"]["clients"] == [
        {"name": site, "examples": len(network.files[site].read_text().splitlines()) - 1} for site in sorted(SITES)
    ]
    assert all(0 <= report["validation_recall"] <= 1 for report in rounds)
    assert not (network.deployment.folder / "checkpoint").exists()


@pytest.mark.parametrize("sparse", [False, True])
def test_nodes_that_send_and_get_packed_changes_come_to_the_model_of_the_simulation(sparse, tmp_path, monkeypatch):
    """Both stages on nodes that remember, as Flower's do: what one stage leaves must not enter the other."""
    monkeypatch.setenv("CARAVAN_CACHE", str(tmp_path / "cache"))
    federation = {"rounds": 3, "codec": "int8", "sparse_rows": sparse}
    network = make_loopback(tmp_path, monkeypatch, mode="adapter", epochs=3, federation=federation)
    network.run(tmp_path / "out")
    deployed = load(tmp_path / "out")
    simulation = simulated(network.deployment.config, store=None)
    for name, tensor in deployed.trainable_state().items():
        torch.testing.assert_close(tensor, simulation.trainable_state()[name], rtol=0, atol=1e-5, msg=name)
    ours, theirs = (each.record["federation"]["rounds"] for each in (deployed, simulation))
    for report, other in zip(ours, theirs, strict=True):
        # Digits of lengths and places; and a node's metrics stay there, where simulated clients' come along.
        metrics = sum(len(name) + 20 for told in other["metrics"] for name in told)
        assert report["metrics"] == [{}, {}, {}]
        assert other["bytes_up"] - metrics - 100 < report["bytes_up"] < other["bytes_up"]
        assert report["failures"] == []
    assert network.forms == [*["arrays"] * 3, *["change"] * 6] * 2  # each stage is a run of its own


def test_nodes_that_are_restarted_get_whole_tensors_in_the_same_round(tmp_path, monkeypatch):
    monkeypatch.setenv("CARAVAN_CACHE", str(tmp_path / "cache"))
    network = make_loopback(tmp_path, monkeypatch, mode="head", epochs=3, federation={"rounds": 3, "codec": "float32"})
    network.run(tmp_path / "kept")
    with monkeypatch.context() as patch:
        patch.setattr(network, "states", _Forgetful())
        network.run(tmp_path / "lost")
    kept, lost = (load(tmp_path / name) for name in ("kept", "lost"))
    for name, tensor in kept.trainable_state().items():
        torch.testing.assert_close(lost.trainable_state()[name], tensor, rtol=0, atol=1e-6)
    assert network.forms[9:] == [*["arrays"] * 3, *[*["change"] * 3, *["arrays"] * 3] * 2]
    assert failures(tmp_path / "lost") == {}


class _Forgetful(dict):
    """The states of nodes that are restarted before every message."""

    def setdefault(self, key, default=None):
        return default


def test_nodes_that_mask_what_they_send_come_to_the_model_of_nodes_that_do_not(tmp_path, monkeypatch):
    monkeypatch.setenv("CARAVAN_CACHE", str(tmp_path / "cache"))
    federation = {"rounds": 3, "secure_aggregation": True, "max_examples": 30}
    network = make_loopback(tmp_path, monkeypatch, mode="adapter", epochs=3, federation=federation)
    network.run(tmp_path / "out")
    plain = replace(network.deployment.config.federation, secure_aggregation=False)
    theirs = simulated(replace(network.deployment.config, federation=plain), store=None).trainable_state()
    for name, tensor in load(tmp_path / "out").trainable_state().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=2e-4, msg=name)
    for reply in network.replies:
        assert all(not record for record in reply.content.array_records.values())


def test_nothing_leaves_a_node_but_the_trained_tensors_and_a_count(network, tmp_path):
    network.lets_out = {"east": {"weight": 7}, "west": {"max-examples": 3}}
    network.run(tmp_path / "out")
    sent = {}
    for reply in network.replies[:3]:
        content = reply.content
        assert set(content) == {"arrays", "metrics"}
        assert set(content.array_records["arrays"]) == {"head.rows", "head.bias", "head.log_scale"}
        sent[reply.metadata.src_node_id] = dict(content.metric_records["metrics"])
    assert sent == {100: {"num-examples": 7}, 101: {"num-examples": 16}, 102: {"num-examples": 3}}


def test_a_node_whose_file_cannot_be_used_says_so_without_a_word_of_the_file(network, tmp_path, caplog):
    write_table(network.files["east"], ("text", "label"), [("secret words", "no-such-document")])
    write_table(network.files["north"], ("text", "label"), [])
    network.files["west"].unlink()
    with pytest.raises(FederationError, match=r"round 1: 0 of 3 clients sent a usable update") as caught:
        network.run(tmp_path / "out")
    assert "east, north, west: FederationError: its data cannot be used; the node's own log says why" in str(
        caught.value
    )
    assert "secret" not in str(caught.value)
    assert "no-such-document" not in str(caught.value)
    assert "no-such-document" in caplog.text  # the node's own log
    assert not (tmp_path / "out").exists()


def test_a_node_with_another_catalogue_or_another_frozen_model_is_left_out_with_the_reason(network, tmp_path):
    copied_folder(network, "east", ("a b c d e", "a b c d f"), "documents.jsonl")
    copied_folder(network, "west", ("max_tokens = 24", "max_tokens = 23"))
    network.run(tmp_path / "out")
    reasons = failures(tmp_path / "out")
    assert set(reasons) == {"east", "west"}
    assert "another catalogue: " in reasons["east"]
    assert "another frozen model: " in reasons["west"]


def test_a_node_that_is_away_is_left_out_and_the_round_goes_on(network, tmp_path):
    network.offline = {"north"}
    network.run(tmp_path / "out")
    assert failures(tmp_path / "out") == {"north": "it is not connected"}


def test_a_run_without_nodes_is_an_error_that_names_them(network, tmp_path):
    network.offline = set(SITES)
    with pytest.raises(FederationError, match=r"0 of 3 nodes are connected .*missing: east, north, west"):
        network.run(tmp_path / "out")


def test_a_run_that_failed_in_the_middle_is_resumed_to_the_same_model(network, tmp_path, monkeypatch):
    network.run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        tell = coordinator.Coordination._tell

        def die(self, report, rounds):
            tell(self, report, rounds)
            raise OSError("killed")

        patch.setattr(coordinator.Coordination, "_tell", die)
        with pytest.raises(OSError, match="killed"):
            network.run(tmp_path / "resumed")
    assert (network.deployment.folder / "checkpoint" / "head.safetensors").exists()
    seen = Following(network.deployment.folder).read()
    assert (seen["state"], len(seen["points"])) == ("stopped", 1)
    assert seen["points"][0]["bytes_up"] > 0
    network.replies.clear()
    network.run(tmp_path / "resumed", resume=True)
    assert len(network.replies) == 3  # the second round alone
    assert (tmp_path / "resumed/head.safetensors").read_bytes() == (tmp_path / "whole/head.safetensors").read_bytes()


def test_a_node_trains_with_the_servers_settings_and_its_own_frozen_model(network, tmp_path):
    copied_folder(network, "east", ("learning_rate = 0.05", "learning_rate = 0.5"))
    network.run(tmp_path / "out")
    theirs = simulated(network.deployment.config).trainable_state()
    torch.testing.assert_close(load(tmp_path / "out").trainable_state()["head.rows"], theirs["head.rows"])


def test_vectors_are_kept_on_the_nodes_disk(network, tmp_path, monkeypatch):
    network.run(tmp_path / "out")
    monkeypatch.setattr(Encoder, "forward", None)  # whatever is encoded anew fails
    monkeypatch.setattr(Experiment, "_validation_recall", lambda self: None)
    network.run(tmp_path / "again")
    assert failures(tmp_path / "again") == {}
