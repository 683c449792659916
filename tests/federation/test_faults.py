"""Processes that die, hang or run out of room in the middle of a training, with real processes and sockets."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from caravan.app import learning
from caravan.app.learning import Experiment
from caravan.config import read_config
from caravan.storage import load
from command_line import write_table
from disks import small_disk
from loopback_network import write_queries
from real_federation import RealFederation, make_folder, real_federation, wait_until
from toy_experiments import DATASET, SITES, make_place

pytestmark = pytest.mark.slow


@dataclass
class Running:
    """A server with its three nodes.

    Attributes:
        federation: the processes.
        data: each node's file.
    """

    federation: RealFederation
    data: dict[str, Path]

    def join(self, site: str, **settings: str) -> None:
        """Start a node, again and again while the server takes it for another one that has died just now."""

        def joined() -> bool:
            process = self.federation.join(site, self.data[site], **settings)
            wait_until(
                lambda: process.poll() is not None or "SuperNode ID" in self.federation.said(site),
                lambda: self.federation.said(site),
            )
            return process.poll() is None

        wait_until(joined, lambda: self.federation.said(site))

    def all_present(self) -> None:
        for name in ("server", *sorted(SITES)):
            process = self.federation.processes.get(name)
            if process is not None and process.poll() is None:
                continue
            if name == "server":
                self.federation.serve()
            else:
                self.join(name)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("faults")
    place = make_place(root)
    config = place.config(mode="head", epochs=2, federation={"rounds": 2})
    folder = make_folder(root / "fed", place, config, sorted(SITES))
    with real_federation(folder) as federation:
        yield Running(federation, {site: write_queries(root / f"{site}.csv", DATASET, site) for site in SITES})


@pytest.fixture
def running(started: Running) -> Iterator[Running]:
    """All there at the start, whatever the test before has left."""
    started.all_present()
    settings = (started.federation.folder / "caravan.toml").read_text(encoding="utf-8")
    yield started
    (started.federation.folder / "caravan.toml").write_text(settings, encoding="utf-8")


def failures_of(out: Path) -> dict[tuple[int, str], str]:
    """Which clients were left out of which rounds, and why."""
    rounds = json.loads((out / "training.json").read_text(encoding="utf-8"))["federation"]["rounds"]
    assert [report["round"] for report in rounds] == list(range(1, len(rounds) + 1))
    return {
        (report["round"], failure["client"]): failure["reason"] for report in rounds for failure in report["failures"]
    }


def assert_model_of_the_simulation(running: Running, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a simulation comes to whose clients fail in the same rounds."""
    lost, train = failures_of(out), learning.train_client

    def train_or_fail(retriever, client, *arguments, part, **options):
        if (part.number, client) in lost:
            raise OSError("as in the deployment")
        return train(retriever, client, *arguments, part=part, **options)

    config = read_config(running.federation.folder / "caravan.toml")
    federation = replace(config.federation, partition="column", column="site", round_seconds=None)
    with monkeypatch.context() as patch:
        patch.setattr(learning, "train_client", train_or_fail)
        theirs = Experiment(DATASET, replace(config, federation=federation)).run().trainable_state()
    for name, tensor in load(out).trainable_state().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5, msg=name)


def test_a_client_process_that_is_killed_is_left_out_of_its_round_alone(running, tmp_path, monkeypatch):
    federation = running.federation
    federation.begin(tmp_path / "out")
    os.kill(federation.worker("north"), signal.SIGKILL)
    assert federation.end_of("submit") == 0, federation.said("submit")
    assert failures_of(tmp_path / "out").keys() == {(1, "north")}
    assert_model_of_the_simulation(running, tmp_path / "out", monkeypatch)


def test_a_node_that_is_killed_and_started_again_takes_part_again(running, tmp_path, monkeypatch):
    federation = running.federation
    federation.begin(tmp_path / "out")
    federation.worker("north")
    federation.kill("north")
    running.join("north")
    assert federation.end_of("submit") == 0, federation.said("submit")
    failures = failures_of(tmp_path / "out")
    assert (1, "north") in failures
    assert failures.keys() <= {(1, "north"), (2, "north")}  # back before the second round, or after it has begun
    assert_model_of_the_simulation(running, tmp_path / "out", monkeypatch)
    federation.change("federation", rounds=1)
    assert federation.submit(tmp_path / "next") == 0, federation.said("submit")
    assert failures_of(tmp_path / "next") == {}


def test_client_processes_that_hang_are_left_when_the_rounds_time_is_over(running, tmp_path, monkeypatch):
    """North waits for its file for ever and says that it lives; west is stopped and says nothing any more."""
    federation, kept = running.federation, running.data["north"].read_bytes()
    federation.change("federation", rounds=1)
    assert federation.submit(tmp_path / "usual") == 0, federation.said("submit")
    usual = float(federation.said("submit").partition(" nodes, ")[2].partition(" s")[0])
    federation.change("federation", rounds=2, round_seconds=max(30.0, 4 * usual))
    federation.begin(tmp_path / "out")
    federation.wait_for("submit", "round 1/2")
    running.data["north"].unlink()
    os.mkfifo(running.data["north"])
    hanging = [federation.worker("west", 2), federation.worker("north", 2)]
    os.kill(hanging[0], signal.SIGSTOP)
    try:
        assert federation.end_of("submit") == 0, federation.said("submit")
    finally:
        for process in hanging:
            os.kill(process, signal.SIGKILL)
        running.data["north"].unlink()
        running.data["north"].write_bytes(kept)
    failures = failures_of(tmp_path / "out")
    assert failures.keys() == {(2, "north"), (2, "west")}
    assert "it did not answer in round_seconds = " in failures[2, "north"]
    assert_model_of_the_simulation(running, tmp_path / "out", monkeypatch)


def test_a_run_whose_process_is_killed_is_resumed_after_its_last_round(running, tmp_path, monkeypatch):
    federation = running.federation
    federation.begin(tmp_path / "out")
    federation.wait_for("submit", "round 1/2")
    os.kill(federation.process_of("server", "flwr-serverapp"), signal.SIGKILL)
    assert federation.end_of("submit") == 1
    told = federation.said("submit").splitlines()[-1]
    assert told.startswith("FederationError: run ")
    assert "No heartbeat received from the task" in told
    assert not (tmp_path / "out").exists()
    assert federation.submit(tmp_path / "out", "--resume") == 0, federation.said("submit")
    assert "head stage: resumed after round " in federation.said("submit")
    assert failures_of(tmp_path / "out") == {}
    assert_model_of_the_simulation(running, tmp_path / "out", monkeypatch)


def test_a_server_that_is_killed_and_started_again_loses_no_round(running, tmp_path, monkeypatch):
    federation = running.federation
    federation.begin(tmp_path / "out")
    federation.wait_for("submit", "round 1/2")
    federation.kill("server")
    federation.serve()
    assert federation.end_of("submit") == 1
    assert federation.said("submit").splitlines()[-1].startswith("FederationError: ")
    assert federation.submit(tmp_path / "out", "--resume") == 0, federation.said("submit")
    assert "head stage: resumed after round " in federation.said("submit")
    assert failures_of(tmp_path / "out") == {}
    assert_model_of_the_simulation(running, tmp_path / "out", monkeypatch)


def test_a_full_disk_under_a_nodes_cache_costs_time_and_nothing_else(running, tmp_path, monkeypatch):
    federation = running.federation
    federation.change("federation", rounds=1)
    federation.stop("north")
    with small_disk(tmp_path / "disk", kib=16) as disk:
        (disk / "ballast").write_bytes(bytes(12 * 1024))
        running.join("north", CARAVAN_CACHE=str(disk))
        try:
            assert federation.submit(tmp_path / "out") == 0, federation.said("submit")
            assert "the feature cache cannot be written" in federation.said("north")
        finally:
            federation.stop("north")
    assert failures_of(tmp_path / "out") == {}
    assert_model_of_the_simulation(running, tmp_path / "out", monkeypatch)


def test_nodes_that_cannot_train_are_left_out_with_a_reason_and_the_last_one_trains_on(running, tmp_path):
    federation = running.federation
    federation.change("federation", rounds=1)
    documents = federation.folder / "documents.jsonl"
    shared = federation.folder.parent
    for site, file, before, after in (
        ("north", "documents.jsonl", "a b c", "c b a"),
        ("west", "caravan.toml", "max_tokens = 24", "max_tokens = 23"),
    ):
        folder = shared / f"{site}-folder"
        for part in ("certificates/ca.crt", f"nodes/{site}.key", "caravan.toml", documents.name):
            (folder / part).parent.mkdir(parents=True, exist_ok=True)
            (folder / part).write_bytes((federation.folder / part).read_bytes())
        (folder / f"nodes/{site}.key").chmod(0o600)
        text = (folder / file).read_text(encoding="utf-8")
        assert before in text
        (folder / file).write_text(text.replace(before, after), encoding="utf-8")
        federation.stop(site)
        federation.join(site, running.data[site], folder=folder)
        federation.wait_for(site, "SuperNode ID")
    assert federation.submit(tmp_path / "out") == 0, federation.said("submit")
    failures = failures_of(tmp_path / "out")
    assert failures.keys() == {(1, "north"), (1, "west")}
    assert "FederationError: another catalogue" in failures[1, "north"]
    assert "FederationError: another frozen model" in failures[1, "west"]
    for site in ("north", "west"):
        federation.stop(site)


def test_a_run_whose_nodes_all_fail_ends_with_the_reasons_and_can_be_resumed(running, tmp_path, monkeypatch):
    federation = running.federation
    federation.change("federation", rounds=1)
    kept = {site: path.read_bytes() for site, path in running.data.items()}
    running.data["east"].unlink()
    for site in ("north", "west"):
        write_table(running.data[site], ("text", "label"), [])
    assert federation.submit(tmp_path / "out") == 1
    assert "0 of 3 clients sent a usable update" in federation.said("submit")
    assert "its data cannot be used; the node's own log says why" in federation.said("submit")
    assert "Traceback" not in federation.said("submit")
    assert not (tmp_path / "out").exists()
    for site, content in kept.items():
        running.data[site].write_bytes(content)
    assert federation.submit(tmp_path / "out", "--resume") == 0, federation.said("submit")
    assert_model_of_the_simulation(running, tmp_path / "out", monkeypatch)


def test_a_server_that_is_stopped_and_started_again_knows_its_nodes(running, tmp_path):
    federation = running.federation
    federation.change("federation", rounds=1)
    federation.stop("server")
    federation.serve()
    assert federation.submit(tmp_path / "out") == 0, federation.said("submit")
    assert failures_of(tmp_path / "out") == {}
