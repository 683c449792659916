"""What was stopped, killed or failed goes on as if nothing had happened, and not with other data or settings."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from caravan.app.cli import main
from caravan.app.experiment import checkpoint_folder, run_experiment
from caravan.app.learning import Experiment
from caravan.app.traces import LINES
from caravan.config import StrategyName
from caravan.errors import ConfigError, FederationError, StorageError
from caravan.training.features import FeatureStore
from toy_experiments import DATASET, Raising, with_wrong_documents
from toy_training import Log, StoppedError, assert_same_bits, toy_backbone

pytestmark = pytest.mark.usefixtures("vectors_are_kept_here", "few_queries_are_timed")


@pytest.fixture(scope="module")
def uninterrupted(backbone):
    """What a training that nobody stops ends with."""
    return cache(lambda config: Experiment(DATASET, config, backbone=backbone, store=FeatureStore()).run())


def timeless(records):
    """Records as they are read back from a file, without the times in them."""

    def without(value):
        if isinstance(value, dict):
            return {name: without(inner) for name, inner in value.items() if name != "seconds"}
        return [without(inner) for inner in value] if isinstance(value, list) else value

    return without(json.loads(json.dumps(records)))


def tensors(folder):
    return {file: load_file(folder / file) for file in ("adapter.safetensors", "head.safetensors")}


def assert_same_tensors(ours, theirs):
    for file, state in tensors(theirs).items():
        assert_same_bits(tensors(ours)[file], state)


# Stopped by an error or from the keyboard


@pytest.mark.parametrize(("stage", "stop"), [("head", 2), ("head", 6), ("head", 7), ("adapter", 1), ("adapter", 9)])
def test_a_central_training_is_resumed_to_the_same_bits(settings, prepare, uninterrupted, tmp_path, stage, stop):
    config = settings(epochs=3, batch_size=20, checkpoint_seconds=1e-9)
    whole = uninterrupted(config)
    folder = tmp_path / "snapshots"
    with pytest.raises(StoppedError):
        prepare(config, checkpoint=folder, report=Raising(f"training the {stage}", StoppedError(), after=stop)).run()
    assert (folder / f"{stage}.safetensors").exists() == (stop > 1)
    log = Log()
    resumed = prepare(config, checkpoint=folder, resume=True, report=log)
    retriever = resumed.run()
    assert_same_bits(retriever.trainable_state(), whole.trainable_state())
    assert timeless(retriever.record["history"]) == timeless(whole.record["history"])
    trained = [progress for progress in log.steps if progress.loss is not None]
    assert len(trained) == 18 - (stop - 1) - (9 if stage == "adapter" else 0)  # a stop comes before its step is saved
    resumed.clear_checkpoint()
    assert not folder.exists()


@pytest.mark.parametrize(("stage", "round_"), [("head", 1), ("head", 3), ("adapter", 1), ("adapter", 2)])
def test_a_federated_training_is_resumed_to_the_same_bits(settings, prepare, uninterrupted, tmp_path, stage, round_):
    config = settings(epochs=3, federation={"partition": "column", "column": "site", "rounds": 3})
    whole = uninterrupted(config)
    folder = tmp_path / "snapshots"
    stop = Raising(f"round {round_}/3, north: training the {stage}", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        prepare(config, checkpoint=folder, report=stop).run()
    log = Log()
    retriever = prepare(config, checkpoint=folder, resume=True, report=log).run()
    assert_same_bits(retriever.trainable_state(), whole.trainable_state())
    assert timeless(retriever.record["federation"]["rounds"]) == timeless(whole.record["federation"]["rounds"])
    told = [progress.task for progress in log.told if "training the" in progress.task]
    assert told[0] == f"round {round_}/3, east: training the {stage}"


@pytest.mark.parametrize("strategy", get_args(StrategyName))
def test_a_resumed_federation_is_the_uninterrupted_one_with_every_strategy(settings, prepare, tmp_path, strategy):
    federation = {"clients": 8, "clients_per_round": 7, "rounds": 4, "strategy": strategy, "keep": "best"}
    config = settings(mode="head", epochs=4, rate=0.3, federation=federation)
    whole = prepare(config).run()
    stop = Raising("round 3/4, client-4: training the head", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        prepare(config, checkpoint=tmp_path, report=stop).run()
    names = load_file(tmp_path / "head.safetensors").keys()
    assert any(name.startswith("server.") for name in names) == (strategy in ("fedavgm", "fedadam", "fedyogi"))
    log = Log()
    resumed = prepare(config, checkpoint=tmp_path, resume=True, report=log).run()
    assert next(progress.task for progress in log.told if "training" in progress.task).startswith("round 3/4")
    assert_same_bits(resumed.trainable_state(), whole.trainable_state())
    ours, theirs = resumed.record["federation"], whole.record["federation"]
    assert timeless(ours["rounds"]) == timeless(theirs["rounds"])
    assert ours["kept_rounds"] == theirs["kept_rounds"]


def test_a_federated_training_that_fails_in_a_round_is_resumed_from_the_round_before(settings, prepare, tmp_path):
    config = settings(mode="head", epochs=3, federation={"clients": 2, "rounds": 3})
    whole = prepare(config).run()
    folder = tmp_path / "snapshots"
    with pytest.raises(FederationError, match="round 2: 0 of 2 clients"):
        prepare(config, checkpoint=folder, report=Raising("round 2/3", OSError("full"))).run()
    resumed = prepare(config, checkpoint=folder, resume=True).run()
    assert_same_bits(resumed.trainable_state(), whole.trainable_state())


@pytest.mark.parametrize("clients", [0, 2])
def test_a_finished_training_is_taken_up_without_work(settings, prepare, tmp_path, clients):
    config = settings(epochs=2, federation={"clients": clients, "rounds": 2})
    whole = prepare(config, checkpoint=tmp_path).run()
    log = Log()
    again = prepare(config, checkpoint=tmp_path, resume=True, report=log).run()
    assert_same_bits(again.trainable_state(), whole.trainable_state())
    assert all(progress.loss is None for progress in log.told)


def stopped(prepare, config, folder, dataset=DATASET):
    """Leave a snapshot of the head stage."""
    with pytest.raises(StoppedError):
        prepare(config, dataset, checkpoint=folder, report=Log(stop_after=4)).run()
    assert {path.name for path in folder.iterdir()} == {"head.safetensors", LINES}


@pytest.mark.parametrize(
    "changes",
    [{"seed": 14}, {"rate": 0.04}, {"mode": "head"}, {"head": {"scale": 6.0}}, {"dropout": 0.1}, {"patience": 1}],
)
def test_snapshots_of_other_settings_are_refused_and_kept(settings, prepare, tmp_path, changes):
    stopped(prepare, settings(checkpoint_seconds=1e-9), tmp_path)
    log = Log()
    with pytest.raises(StorageError, match="other data or settings"):
        prepare(settings(checkpoint_seconds=1e-9, **changes), checkpoint=tmp_path, resume=True, report=log)
    assert log.told == []
    assert (tmp_path / "head.safetensors").exists()


OTHER_DATA = {
    "text": replace(DATASET, train=[replace(DATASET.train[0], text="e d c b a"), *DATASET.train[1:]]),
    "label": replace(DATASET, train=[*DATASET.train[:-1], replace(DATASET.train[-1], doc_ids=("d4",))]),
    "order": replace(DATASET, train=DATASET.train[::-1]),
    "site": replace(DATASET, train=[replace(DATASET.train[0], columns={"site": "west"}), *DATASET.train[1:]]),
    "fewer": replace(DATASET, train=DATASET.train[:-1]),
    "validation": replace(DATASET, validation=DATASET.validation[:-1]),
    "moved to validation": replace(
        DATASET, train=DATASET.train[:-1], validation=[DATASET.train[-1], *DATASET.validation]
    ),
    "documents": with_wrong_documents(DATASET),
}


@pytest.mark.parametrize("what", OTHER_DATA)
def test_snapshots_of_other_data_are_refused(settings, prepare, tmp_path, what):
    config = settings(checkpoint_seconds=1e-9)
    stopped(prepare, config, tmp_path)
    with pytest.raises(StorageError, match="other data or settings"):
        prepare(config, OTHER_DATA[what], checkpoint=tmp_path, resume=True)


def test_snapshots_of_another_backbone_are_refused(settings, prepare, tmp_path, tmp_path_factory):
    config = settings(checkpoint_seconds=1e-9)
    stopped(prepare, config, tmp_path)
    other = toy_backbone(tmp_path_factory.mktemp("bert"), random_weights=True)
    with pytest.raises(StorageError, match="other data or settings"):
        prepare(config, checkpoint=tmp_path, resume=True, backbone=other)


def test_what_does_not_change_the_result_may_change_between_stop_and_resume(settings, prepare, tmp_path):
    config = settings(checkpoint_seconds=1e-9)
    stopped(prepare, config, tmp_path)
    other = settings(checkpoint_seconds=5.0, evaluation={"baselines": False, "bootstrap": 7})
    other = replace(other, data=replace(other.data, path="moved/elsewhere"))
    dataset = replace(DATASET, name="moved", test=DATASET.test[:3])
    log = Log()
    resumed = prepare(other, dataset, checkpoint=tmp_path, resume=True, report=log).run()
    assert log.steps[0].done == 4
    assert_same_bits(resumed.trainable_state(), prepare(config).run().trainable_state())


def test_without_resume_a_training_starts_anew_and_old_snapshots_go(settings, prepare, tmp_path):
    config = settings(checkpoint_seconds=1e-9)
    stopped(prepare, config, tmp_path)
    prepare(settings(seed=14), checkpoint=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_settings_that_are_refused_leave_old_snapshots_alone(settings, prepare, tmp_path):
    stopped(prepare, settings(checkpoint_seconds=1e-9), tmp_path)
    with pytest.raises(ConfigError):
        prepare(settings(federation={"clients": 2, "min_clients": 3}), checkpoint=tmp_path)
    assert (tmp_path / "head.safetensors").exists()


def test_resuming_where_there_is_no_snapshot_starts_from_the_beginning(settings, prepare, tmp_path):
    config = settings(mode="head", epochs=1)
    fresh = prepare(config, checkpoint=tmp_path / "none", resume=True).run()
    assert_same_bits(fresh.trainable_state(), prepare(config).run().trainable_state())


def test_clearing_leaves_what_is_not_ours(settings, prepare, tmp_path):
    folder = tmp_path / "snapshots"
    experiment = prepare(settings(mode="head", epochs=1), checkpoint=folder)
    experiment.run()
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    experiment.clear_checkpoint()
    experiment.clear_checkpoint()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


# Killed


def test_a_failed_training_leaves_its_snapshots_and_the_old_retriever(place, tmp_path):
    out = tmp_path / "out"
    config = place.config(checkpoint_seconds=1e-9)
    run_experiment(place.config(mode="head", epochs=1), out)
    before = tensors(out)
    with pytest.raises(StoppedError):
        run_experiment(config, out, report=Log(stop_after=15))
    kept = {path.name for path in checkpoint_folder(out).iterdir()}
    assert kept == {"adapter.safetensors", "head.safetensors", LINES}
    assert all(
        torch.equal(tensor, before[file][name]) for file in before for name, tensor in tensors(out)[file].items()
    )
    with pytest.raises(StorageError, match="other data or settings"):
        run_experiment(replace(config, seed=14), out, resume=True)
    run_experiment(config, out, resume=True)
    assert not checkpoint_folder(out).exists()
    run_experiment(config, tmp_path / "whole")
    assert_same_tensors(out, tmp_path / "whole")


# One process that has everything loaded makes a copy of itself for each run, which saves seconds of imports.
_KILLED_IN_A_SAVE = """
import json, os, signal, sys
import flwr.clientapp, flwr.serverapp
import caravan.app.experiment
from transformers import BertModel
from caravan.app.cli import main

def run(saves, cache, command):
    os.environ["CARAVAN_CACHE"] = cache
    fsync = os.fsync
    def killed(descriptor):
        nonlocal saves
        saves -= 1
        if not saves:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)
    os.fsync = killed
    sys.argv = ["caravan", *command]
    main()

for saves, cache, command in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        run(saves, cache, command)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)  # else the next child has it to print, too
"""

# Two epochs of six steps a stage, each step and each stage's end saved: the 8th save is in the head's second epoch, the
# 18th in the adapter's first. Two rounds a stage, each saved: the 4th save is that of the adapter's second round.
KILLED = {
    "head": ({"mode": "head"}, 8, ["head"]),
    "adapter": ({"mode": "adapter"}, 18, ["adapter", "head"]),
    "federated": ({"mode": "adapter", "federation": {"clients": 3, "rounds": 2}}, 4, ["adapter", "head"]),
}


def command(config, out):
    settings = out.with_suffix(".toml")
    settings.write_text(config.to_toml(), encoding="utf-8")
    return ["train", "--config", str(settings), "--out", str(out)]


def resume(config, out, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["caravan", *command(config, out), "--resume"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0


@pytest.fixture(scope="module")
def killed(place, tmp_path_factory):
    """Runs of the command line that were killed while they saved: settings and the place of the result by name."""
    root = tmp_path_factory.mktemp("killed")
    runs = {
        name: (place.config(checkpoint_seconds=1e-9, **parts), root / name) for name, (parts, _, _) in KILLED.items()
    }
    # Vectors depend in their last bits on batch mates, so each run starts from an empty cache, as the whole one does.
    commands = [
        (KILLED[name][1], str(root / f"{name} cache"), command(config, out)) for name, (config, out) in runs.items()
    ]
    program = subprocess.run(
        [sys.executable, "-c", _KILLED_IN_A_SAVE, json.dumps(commands)],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert program.stdout.split() == [str(-signal.SIGKILL)] * len(KILLED), program.stderr
    return runs


@pytest.mark.parametrize("name", KILLED)
def test_what_is_killed_in_the_middle_of_a_save_is_resumed_to_the_same_bits(killed, tmp_path, monkeypatch, name):
    config, out = killed[name]
    assert not out.exists()
    found = sorted(path.name for path in checkpoint_folder(out).iterdir())
    stages = KILLED[name][2]
    assert [file for file in found if not file.startswith(".")] == [
        *(f"{stage}.safetensors" for stage in stages),
        LINES,
    ]
    assert len(found) == len(stages) + 2  # and the file it was writing
    resume(config, out, monkeypatch)
    assert not checkpoint_folder(out).exists()
    run_experiment(config, tmp_path / "whole")
    assert_same_tensors(out, tmp_path / "whole")


@pytest.mark.slow
def test_what_is_killed_at_any_moment_is_resumed_to_the_same_bits(place, tmp_path, monkeypatch):
    config, out = place.config(mode="adapter", epochs=40, checkpoint_seconds=1e-9), tmp_path / "out"
    snapshot = checkpoint_folder(out) / "adapter.safetensors"
    program = subprocess.Popen(
        [sys.executable, "-c", "from caravan.app.cli import main; main()", *command(config, out)],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(60_000):  # ten minutes
        if snapshot.exists():
            break
        try:
            program.wait(timeout=0.01)
        except subprocess.TimeoutExpired:
            continue
        break
    program.kill()
    assert program.wait() == -signal.SIGKILL
    assert snapshot.exists()
    assert not out.exists()
    resume(config, out, monkeypatch)
    run_experiment(config, tmp_path / "whole")
    assert_same_tensors(out, tmp_path / "whole")
