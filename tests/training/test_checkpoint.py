import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from caravan.errors import StorageError
from caravan.training import checkpoint as checkpoint_module
from caravan.training.checkpoint import Checkpoint, Snapshot
from caravan.training.trainer import fit
from toy_training import Log, StoppedError, assert_same_bits, toy_config, toy_examples, toy_retriever

EXAMPLES = toy_examples(44)
VALIDATION = toy_examples(20, seed=1)
STEPS = 9  # 3 epochs of 44 queries in steps of 2 x 8: 16, 16 and 12
both_stages = pytest.mark.parametrize("stage", ["head", "adapter"])


def resumable_config(**changes):
    """Everything on that has a state or moves it: AdamW, decay, warm-up, accumulation, patience, held rows."""
    settings = {"gradient_accumulation": 2, "patience": 2, "weight_decay": 0.05, "checkpoint_seconds": 1e-9}
    return toy_config(**{**settings, **changes})


def train(backbone, stage, config, *, checkpoint=None, report=None, shift=0.0, **options):
    """The state and history (without times) of a training that may take up a snapshot."""
    retriever = toy_retriever(backbone)
    with torch.no_grad():
        retriever.head.rows.add_(shift)
    history = fit(
        retriever,
        EXAMPLES,
        stage,
        config,
        **{"seed": 0, "validation": VALIDATION, **options},
        checkpoint=checkpoint,
        report=report,
    )
    return retriever.trainable_state(), [replace(record, seconds=0.0) for record in history]


def assert_same_training(ours, theirs):
    assert_same_bits(ours[0], theirs[0])
    assert ours[1] == theirs[1]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "head.safetensors"


# The file


def full_snapshot():
    tensors = {
        "rows": torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "step": torch.tensor(17.0),
        "count": torch.tensor([1, 2**40]),
        "narrow": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
        "none": torch.empty(0, 5),
        "odd": torch.tensor([float("nan"), float("inf"), 1e-45]),
    }
    values = {"epoch": 3, "best": None, "loss": 0.1 + 0.2, "tiny": 5e-324, "history": [{"name": "ü\n", "x": [1, 2.5]}]}
    return Snapshot(tensors, values)


def test_a_snapshot_comes_back_exactly(path):
    Checkpoint(path, "print").save(full_snapshot())
    loaded = Checkpoint(path, "print").load()
    assert loaded is not None
    assert loaded.values == full_snapshot().values
    assert set(loaded.tensors) == set(full_snapshot().tensors)
    for name, tensor in full_snapshot().tensors.items():
        ours = loaded.tensors[name]
        assert (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape)
        assert ours.contiguous().reshape(-1).view(torch.uint8).equal(tensor.contiguous().reshape(-1).view(torch.uint8))


def test_what_was_loaded_does_not_change_with_the_file(path):
    checkpoint = Checkpoint(path, "print")
    checkpoint.save(Snapshot({"a": torch.ones(3)}, {}))
    loaded = checkpoint.load()
    with path.open("r+b") as file:
        file.seek(-12, os.SEEK_END)
        file.write(bytes(12))
    assert loaded is not None
    assert loaded.tensors["a"].tolist() == [1, 1, 1]


def test_no_file_is_no_snapshot_and_clearing_is_repeatable(path):
    checkpoint = Checkpoint(path, "print")
    assert checkpoint.load() is None
    checkpoint.save(full_snapshot())
    checkpoint.clear()
    checkpoint.clear()
    assert checkpoint.load() is None


def test_the_latest_snapshot_replaces_the_one_before(path):
    checkpoint = Checkpoint(path, "print")
    for number in range(3):
        checkpoint.save(Snapshot({"a": torch.tensor(float(number))}, {"n": number}))
    loaded = checkpoint.load()
    assert loaded is not None
    assert (loaded.values, float(loaded.tensors["a"])) == ({"n": 2}, 2.0)
    assert list(path.parent.iterdir()) == [path]


def test_a_snapshot_of_other_data_or_settings_is_refused(path):
    Checkpoint(path, "print").save(full_snapshot())
    with pytest.raises(StorageError, match=r"other data or settings.*without --resume") as caught:
        Checkpoint(path, "another").load()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9, 0.999])
def test_a_truncated_snapshot_is_refused(path, share):
    Checkpoint(path, "print").save(full_snapshot())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(StorageError, match=r"damaged or cannot be read.*without --resume") as caught:
        Checkpoint(path, "print").load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"garbage\nin lines\n" * 50, bytes(500), b"\xff" * 500, b"{}" * 100])
def test_garbage_is_refused(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(StorageError, match="damaged or cannot be read") as caught:
        Checkpoint(path, "print").load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("header", [{"fingerprint": "print"}, {"fingerprint": "print", "values": "{"}])
def test_a_tensor_file_without_its_values_is_refused(path, header):
    path.parent.mkdir()
    save_file({"a": torch.ones(1)}, path, header)
    with pytest.raises(StorageError, match="damaged"):
        Checkpoint(path, "print").load()


def test_a_tensor_file_of_another_program_is_refused(path):
    path.parent.mkdir()
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(StorageError, match="other data or settings"):
        Checkpoint(path, "print").load()


def test_a_folder_in_the_place_of_the_file_is_refused(path):
    path.mkdir(parents=True)
    checkpoint = Checkpoint(path, "print")
    for use in (checkpoint.load, checkpoint.clear, lambda: checkpoint.save(full_snapshot())):
        with pytest.raises(StorageError) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(StorageError, match="run"):
        Checkpoint(tmp_path / "run" / "head.safetensors", "print").save(full_snapshot())


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (OSError(28, "No space left on device"), StorageError),
        (SafetensorError("I/O error: no space left"), StorageError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_an_interrupted_save_leaves_the_old_snapshot(path, monkeypatch, fault, told):
    checkpoint = Checkpoint(path, "print")
    checkpoint.save(full_snapshot())

    def break_off(tensors, target, header):
        Path(target).write_bytes(b"half a file")
        raise fault

    monkeypatch.setattr(checkpoint_module, "save_file", break_off)
    with pytest.raises(told):
        checkpoint.save(Snapshot({"a": torch.ones(1)}, {"epoch": 4}))
    loaded = checkpoint.load()
    assert loaded is not None
    assert loaded.values == full_snapshot().values
    assert list(path.parent.iterdir()) == [path]


# The training


class StopAfterSave(Checkpoint):
    """Breaks off as soon as so many snapshots are on disk: between a save and the step after it."""

    def __init__(self, path, fingerprint, saves):
        super().__init__(path, fingerprint)
        self.saves = saves

    def save(self, snapshot):
        super().save(snapshot)
        self.saves -= 1
        if self.saves == 0:
            raise StoppedError


@pytest.mark.parametrize(
    ("stage", "patience", "stops"),  # 0 is before the first snapshot; 3, 6 and 9 end an epoch
    [("head", 2, range(STEPS + 1)), ("head", 0, (3, 9)), ("adapter", 2, (0, 1, 3, 4, 9)), ("adapter", 0, (6,))],
)
def test_a_training_killed_after_any_step_ends_as_the_uninterrupted_one(backbone, stage, tmp_path, patience, stops):
    config = resumable_config(patience=patience)
    whole = train(backbone, stage, config)
    for stop_after in stops:
        checkpoint = Checkpoint(tmp_path / f"{stop_after}.safetensors", "print")
        with pytest.raises(StoppedError):
            train(backbone, stage, config, checkpoint=checkpoint, report=Log(stop_after))
        log = Log()
        assert_same_training(train(backbone, stage, config, checkpoint=checkpoint, report=log), whole)
        # What was reported before the kill and not yet saved is one step, and is done again.
        assert [progress.done for progress in log.steps] == list(range(max(1, stop_after), STEPS + 1))


@pytest.mark.parametrize(("stage", "stops"), [("head", (1, 3, 5, 9, 10)), ("adapter", (3, 10))])
def test_a_training_killed_after_any_save_ends_as_the_uninterrupted_one(backbone, stage, tmp_path, stops):
    config = resumable_config()
    whole = train(backbone, stage, config)
    for saves in stops:  # the third ends an epoch, the tenth is that of the finished training
        path = tmp_path / f"{saves}.safetensors"
        with pytest.raises(StoppedError):
            train(backbone, stage, config, checkpoint=StopAfterSave(path, "print", saves))
        log = Log()
        assert_same_training(train(backbone, stage, config, checkpoint=Checkpoint(path, "print"), report=log), whole)
        assert len(log.steps) == max(0, STEPS - saves)


def test_a_training_killed_again_and_again_ends_as_the_uninterrupted_one(backbone, path):
    config = resumable_config()
    whole = train(backbone, "adapter", config)
    checkpoint = Checkpoint(path, "print")
    for _ in range(4):
        with pytest.raises(StoppedError):
            train(backbone, "adapter", config, checkpoint=checkpoint, report=Log(2))
    assert_same_training(train(backbone, "adapter", config, checkpoint=checkpoint), whole)


@both_stages
def test_the_snapshot_decides_and_not_the_weights_it_is_loaded_into(backbone, stage, path):
    config = resumable_config()
    with pytest.raises(StoppedError):
        train(backbone, stage, config, checkpoint=Checkpoint(path, "print"), report=Log(5))
    resumed = train(backbone, stage, config, checkpoint=Checkpoint(path, "print"), shift=0.1)
    assert_same_training(resumed, train(backbone, stage, config))  # the held rows too


@both_stages
def test_saving_does_not_change_the_result(backbone, stage, path):
    config = resumable_config()
    assert_same_training(
        train(backbone, stage, config, checkpoint=Checkpoint(path, "print")), train(backbone, stage, config)
    )


@both_stages
@pytest.mark.parametrize("early", [False, True])
def test_a_finished_training_is_taken_up_without_training(backbone, stage, path, early):
    wrong = [
        replace(example, doc_ids=("d4",)) for example in VALIDATION
    ]  # never found: no epoch is better than the first
    config = resumable_config(epochs=6, patience=1 if early else 0)
    options = {"validation": wrong}
    whole = train(backbone, stage, config, checkpoint=Checkpoint(path, "print"), **options)
    assert len(whole[1]) == (2 if early else 6)
    log = Log()
    again = train(backbone, stage, config, checkpoint=Checkpoint(path, "print"), report=log, **options)
    assert_same_training(again, whole)
    assert all(progress.done == progress.total and progress.loss is None for progress in log.steps)


def test_a_round_is_taken_up_in_its_middle(backbone, path):
    config = resumable_config(patience=0)
    whole = train(backbone, "head", config, epochs=range(1, 3))
    with pytest.raises(StoppedError):
        train(backbone, "head", config, epochs=range(1, 3), checkpoint=Checkpoint(path, "print"), report=Log(4))
    resumed = train(backbone, "head", config, epochs=range(1, 3), checkpoint=Checkpoint(path, "print"))
    assert_same_training(resumed, whole)


@pytest.mark.parametrize(
    ("stage", "epochs", "told"),
    [
        ("adapter", range(2), "epochs 0 to 2 of the head stage, asked for are 0 to 2 of the adapter stage"),
        ("head", range(2, 3), "epochs 0 to 2 of the head stage, asked for are 2 to 3 of the head stage"),
    ],
)
def test_a_snapshot_of_another_stage_or_round_is_refused(backbone, path, stage, epochs, told):
    config = resumable_config()
    train(backbone, "head", config, epochs=range(2), checkpoint=Checkpoint(path, "print"))
    with pytest.raises(StorageError, match=told):
        train(backbone, stage, config, epochs=epochs, checkpoint=Checkpoint(path, "print"))


def test_a_damaged_snapshot_is_refused_before_any_work(backbone, path):
    path.parent.mkdir()
    path.write_bytes(b"garbage")
    log = Log()
    with pytest.raises(StorageError, match="damaged"):
        train(backbone, "head", resumable_config(), checkpoint=Checkpoint(path, "print"), report=log)
    assert log.told == []


def test_snapshots_are_saved_no_more_often_than_asked(backbone, path):
    class Counting(Checkpoint):
        saves = 0

        def save(self, snapshot):
            self.saves += 1
            super().save(snapshot)

    for seconds, expected in ((1e9, 1), (1e-9, STEPS + 1)):
        checkpoint = Counting(path, "print")
        train(backbone, "head", resumable_config(checkpoint_seconds=seconds), checkpoint=checkpoint)
        assert checkpoint.saves == expected
        checkpoint.clear()


_CHILD = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(int(sys.argv[3]))
from caravan.config import BackboneConfig
from caravan.model.backbone import load_backbone
from caravan.training import checkpoint as module
from test_checkpoint import resumable_config, train
saves, save_file = [], module.save_file
def killed_in_the_sixth(tensors, path, header):
    save_file(tensors, path, header)
    saves.append(path)
    if len(saves) == 6:
        os.truncate(path, Path(path).stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
module.save_file = killed_in_the_sixth
backbone = load_backbone(BackboneConfig(name=sys.argv[1], max_tokens=24))
train(backbone, "adapter", resumable_config(), checkpoint=module.Checkpoint(sys.argv[2], "print"))
"""


@pytest.mark.slow
def test_a_process_killed_in_the_middle_of_a_save_is_resumed_to_the_same_bits(backbone, path):
    here = Path(__file__).parent
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, backbone.config.name, str(path), str(torch.get_num_threads())],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    log = Log()
    resumed = train(backbone, "adapter", resumable_config(), checkpoint=Checkpoint(path, "print"), report=log)
    assert [progress.done for progress in log.steps] == list(range(6, STEPS + 1))  # the fifth save counts
    assert_same_training(resumed, train(backbone, "adapter", resumable_config()))
