import importlib
import importlib.machinery
import subprocess
import sys
import threading
import types
import warnings

import pytest

from caravan.config import FederationConfig
from caravan.errors import FederationError
from caravan.federation.flower import Failure, run_federation
from toy_federation import SITES, assert_same_bits, reports_of, start_tensors, toy_train


def test_a_run_says_nothing_and_importing_the_module_loads_and_sets_nothing():
    program = """
import os, sys, threading
for name in ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK"):
    os.environ.pop(name, None)
before = dict(os.environ)
from caravan.federation.flower import Failure, run_federation
from caravan.federation.rounds import Update
import torch
assert dict(os.environ) == before and "flwr" not in sys.modules
def local_train(client, tensors, number):
    if client == "b":
        raise ValueError("no data")
    return Update(client, tensors, 1)
run_federation({"head": torch.ones(2)}, ["a", "b"], local_train, rounds=2)
assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0" and os.environ["FLWR_DISABLE_UPDATE_CHECK"] == "1"
assert sys.modules["flwr.supercore.telemetry"].FLWR_TELEMETRY_ENABLED == "0"
assert threading.active_count() == 1
assert "flwr.simulation" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def simulation(monkeypatch, tmp_path):
    """Flower's own simulation runtime with threads in place of Ray; `broken` lets it die, `tamper` spoils replies."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # typer about click, where Flower is the first to load it
        backend = importlib.import_module("flwr.server.superlink.fleet.vce.backend.backend")
        importlib.import_module("flwr.simulation")
    state = types.SimpleNamespace(broken=False, tamper=lambda reply, partition: reply)

    class TwoThreads(backend.Backend):
        def __init__(self, backend_config):
            pass

        def build(self, app_fn):
            if state.broken:
                raise OSError("no shared memory")
            self.client_app = app_fn()

        num_workers = 2

        def is_worker_idle(self):
            return True

        def terminate(self):
            pass

        def process_message(self, message, context):
            reply = self.client_app(message, context)
            return state.tamper(reply, context.node_config["partition-id"]), context

    stand_in = types.ModuleType("raybackend")
    stand_in.RayBackend = TwoThreads
    monkeypatch.setitem(sys.modules, "flwr.server.superlink.fleet.vce.backend.raybackend", stand_in)
    ray = types.ModuleType("ray")
    ray.__spec__ = importlib.machinery.ModuleSpec("ray", None)
    monkeypatch.setitem(sys.modules, "ray", ray)
    return state


def test_flowers_simulation_runtime_gives_the_same_tensors_and_the_same_reports(simulation, capfd):
    def lima_fails_once(client, tensors, round_number):
        if client == "lima" and round_number == 1:
            raise ValueError("no data")
        return toy_train(client, tensors, round_number)

    ours, theirs = [], []
    here = run_federation(start_tensors(), SITES, lima_fails_once, rounds=2, on_round=lambda r, _: ours.append(r))
    there = run_federation(
        start_tensors(),
        SITES,
        lima_fails_once,
        rounds=2,
        settings=FederationConfig(backend="ray"),
        on_round=lambda r, _: theirs.append(r),
    )
    assert_same_bits(there, here)
    assert [{**vars(report), "seconds": 0} for report in theirs] == [{**vars(report), "seconds": 0} for report in ours]
    assert capfd.readouterr() == ("", "")


def test_too_few_usable_updates_end_a_run_on_the_simulation_runtime_too(simulation):
    def fail(client, tensors, round_number):
        raise ValueError("no data")

    with pytest.raises(FederationError, match=r"round 1: 0 of 3 .*oslo, lima, pune: ValueError: no data"):
        run_federation(start_tensors(), SITES, fail, rounds=2, settings=FederationConfig(backend="ray"))


def test_a_client_that_dies_and_a_reply_that_cannot_be_read_are_failures_of_their_client_alone(simulation):
    from flwr.app import Array, ArrayRecord

    def tamper(reply, partition):
        if reply.metadata.message_type == "train" and partition == 0:
            raise OSError("worker killed")
        if reply.metadata.message_type == "train" and partition == 1:
            reply.content["arrays"] = ArrayRecord({"scale": Array("float32", (1,), "numpy.ndarray", b"no such format")})
        return reply

    simulation.tamper = tamper
    (report,) = reports_of(toy_train, settings=FederationConfig(backend="ray"))
    assert report.clients == ("pune",)
    assert [failure.client for failure in report.failures] == ["oslo", "lima"]
    assert "worker killed" in report.failures[0].reason
    assert report.failures[1].reason.startswith("tensor 'scale' is no plain tensor in NumPy's .npy format")


def test_a_simulation_runtime_that_dies_is_an_error_and_never_a_hang(simulation):
    simulation.broken = True
    before = set(threading.enumerate())
    with pytest.raises(FederationError, match="simulation on Ray failed"):
        run_federation(start_tensors(), SITES, toy_train, rounds=2, settings=FederationConfig(backend="ray"))
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=5)
    assert set(threading.enumerate()) <= before


def test_clients_that_do_not_answer_in_time_are_left_out_and_asked_again_for_a_quorum(simulation):
    asked_again = threading.Event()
    asked = []

    def pune_hangs_once(client, tensors, round_number):
        if client == "pune":
            asked.append(client)
            if len(asked) > 1:
                asked_again.set()
            asked_again.wait(timeout=60)
        return toy_train(client, tensors, round_number)

    # On a busy machine the others may need a second attempt too.
    settings = FederationConfig(backend="ray", round_seconds=1.0, min_clients=3, round_retries=50)
    (report,) = reports_of(pune_hangs_once, settings=settings)
    assert report.clients == tuple(SITES)
    assert report.failures == ()
    assert Failure("pune", "it did not answer in round_seconds = 1") in report.retried
