"""Damaged models, disks that are full or read-only, and Ctrl-C: one line, and what was there before is still good."""

import itertools
import json
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from caravan.app import display
from caravan.training.progress import Progress
from command_line import Workshop, check_refused, listing, run
from disks import make_read_only, small_disk

QUERIES = ("a b c", "q r s t")
WIDE = ("--set", "head.hidden=768")  # a checkpoint of about 600 KiB, a saved retriever of about 200


def hits(model: Path | str) -> Any:
    outcome = run("search", model, *QUERIES, "--json")
    assert outcome.code == 0, outcome
    return json.loads(outcome.out)


def assert_finds_the_same(model: Path | str, other: Path | str) -> None:
    """The same documents with the same scores, but for the last bits: vectors depend on what shares their batch."""
    ours, theirs = ([hit for result in hits(each)["results"] for hit in result["hits"]] for each in (model, other))
    assert [hit["doc_id"] for hit in ours] == [hit["doc_id"] for hit in theirs]
    assert [hit["score"] for hit in ours] == pytest.approx([hit["score"] for hit in theirs], rel=1e-5)


def change_json(name: str, **changes: Any) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        values = json.loads((model / name).read_text(encoding="utf-8"))
        for key, value in changes.items():
            *sections, last = key.split("__")
            place = values
            for section in sections:
                place = place[section]
            place[last] = value
        (model / name).write_text(json.dumps(values), encoding="utf-8")

    return change


def nan_in_the_head(model: Path) -> None:
    state = load_file(model / "head.safetensors")
    state["rows"][1, 2] = torch.nan
    save_file(state, model / "head.safetensors")


def cut(name: str) -> Callable[[Path], object]:
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[:-7])


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN": (nan_in_the_head, "head.rows holds values that are not finite"),
    "truncated head": (cut("head.safetensors"), "head.safetensors: not a sound safetensors file"),
    "empty adapter": (
        lambda model: (model / "adapter.safetensors").write_bytes(b""),
        "adapter.safetensors: not a sound",
    ),
    "no head": (lambda model: (model / "head.safetensors").unlink(), "head.safetensors: missing"),
    "truncated settings": (cut("config.json"), "config.json: not valid JSON"),
    "later format": (change_json("config.json", format_version=2), "config.json: format version 2"),
    "other backbone": (change_json("config.json", backbone__hash="0" * 64), "another backbone"),
    "no backbone": (
        change_json("config.json", backbone__name="/nowhere/at/all"),
        "/nowhere/at/all, which is not there",
    ),
    "other documents": (
        lambda model: (model / "documents.jsonl").write_bytes(b'{"doc_id": "d0", "text": "a"}\n' * 5),
        "documents.jsonl",
    ),
    "record is a list": (lambda model: (model / "training.json").write_bytes(b"[]"), "training.json: a JSON list"),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("command", [("search", "damaged", "a b"), ("info", "damaged"), ("compare", "good", "damaged")])
def test_a_damaged_retriever_is_refused(damage: str, command: tuple[str, ...], workshop: Workshop, here: Path) -> None:
    for name in ("good", "damaged"):
        shutil.copytree(workshop.model, here / name)
    change, says = DAMAGED[damage]
    change(here / "damaged")
    before = listing(here)
    check_refused(run(*command), "damaged", says)
    assert listing(here) == before


@pytest.mark.parametrize(
    ("command", "changes"),
    [
        ("info", {"metrics": 3}),
        ("info", {"metrics": {"head": {}}}),
        ("info", {"federation": {"clients": ["north"]}}),
        ("evaluate", {"config": 3}),
        ("evaluate", {"config": {"data": None}}),
        ("evaluate", {"config__training__mode": "nonsense"}),
        ("evaluate", {"config__novelty": 1}),
    ],
)
def test_a_record_that_makes_no_sense_is_refused_where_it_is_needed(
    command: str, changes: dict[str, Any], workshop: Workshop, here: Path
) -> None:
    shutil.copytree(workshop.model, here / "odd")
    change_json("training.json", **changes)(here / "odd")
    check_refused(run(command, "odd"), "odd/training.json: ")
    assert_finds_the_same("odd", workshop.model)


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    without_weights(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without_weights, "no model.safetensors"),
        (pickled, "no model.safetensors (only pytorch_model.bin)"),
        (cut("model.safetensors"), "cannot be loaded as a transformers model"),
        (cut("config.json"), "cannot be loaded as a transformers model"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    ],
    ids=["no weights", "pickle", "truncated weights", "truncated settings", "no tokenizer", "no settings"],
)
def test_an_unusable_backbone_is_refused(
    change: Callable[[Path], object], says: str, workshop: Workshop, here: Path
) -> None:
    shutil.copytree(workshop.backbone, here / "broken")
    change(here / "broken")
    before = listing(here)
    check_refused(run("train", "-c", workshop.quick, "-o", "out", "--backbone", "broken"), "broken", says)
    assert listing(here) == before


def test_evaluating_without_held_out_queries_is_refused(workshop: Workshop, here: Path) -> None:
    options = ("--set", "data.validation_fraction=0", "--documents", workshop.data / "documents.csv")
    shutil.copy(workshop.data / "train.csv", here / "only.csv")
    outcome = run("train", "only.csv", "-c", workshop.quick, "-o", "out", *options)
    assert outcome.code == 0
    assert "Nothing was measured: the data has no held-out queries." in outcome.out
    check_refused(run("evaluate", "out"), "only: neither test nor validation queries")


@pytest.fixture
def disk(here: Path) -> Iterator[Path]:
    with small_disk(here / "disk", kib=700) as folder:
        yield folder


@pytest.mark.parametrize("options", [("-o", "disk/out"), ("-o", "out", "--report", "disk/report")])
def test_a_full_or_read_only_disk_is_known_before_the_training(
    options: tuple[str, ...], workshop: Workshop, here: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("caravan.app.experiment.Experiment", None)  # where the work begins
    with pytest.raises(OSError, match="No space left"), (disk / "filler").open("wb") as filler:
        filler.write(bytes(2**20))
    before = listing(here)
    check_refused(run("train", "-c", workshop.quick, *options), options[-1], "No space left on device")
    make_read_only(disk)
    check_refused(run("train", "-c", workshop.quick, *options), options[-1], "Read-only file system")
    assert listing(here) == before


def test_a_mounted_disk_itself_is_no_place_for_a_retriever(workshop: Workshop, disk: Path) -> None:
    check_refused(run("train", "-c", workshop.quick, "-o", "disk"), "disk: is the root of a disk", "a folder in it")


def test_a_disk_that_fills_up_at_a_checkpoint_leaves_the_old_retriever(workshop: Workshop, disk: Path) -> None:
    shutil.copytree(workshop.model, disk / "out")
    (disk / "filler").write_bytes(bytes(400 * 1024))
    before = listing(disk)
    outcome = run("train", "-c", workshop.quick, "-o", "disk/out", *WIDE)
    check_refused(outcome, "out.checkpoint/head.safetensors: cannot be written", "No space left")
    assert listing(disk) == before
    assert_finds_the_same("disk/out", workshop.model)


def test_a_disk_that_fills_up_at_the_end_costs_only_the_saving(workshop: Workshop, here: Path, disk: Path) -> None:
    train = ("train", "-c", workshop.quick, *WIDE)
    shutil.copytree(workshop.model, disk / "out")
    before = listing(disk)
    check_refused(run(*train, "-o", "disk/out"), "disk/out", "cannot be written", "No space left")
    assert listing(disk).keys() - before.keys() == {
        "out.checkpoint", "out.checkpoint/head.safetensors", "out.checkpoint/progress.jsonl"
    }  # fmt: skip
    assert_finds_the_same("disk/out", workshop.model)

    subprocess.run(["mount", "-o", "remount,size=4M", str(disk)], check=True)
    assert run(*train, "-o", "disk/out", "--resume").code == 0
    assert run(*train, "-o", "whole").code == 0
    assert (disk / "out/head.safetensors").read_bytes() == (here / "whole/head.safetensors").read_bytes()
    assert not (disk / "out.checkpoint").exists()


def test_a_report_that_cannot_be_written_costs_neither_the_table_nor_the_retriever(
    workshop: Workshop, here: Path, disk: Path
) -> None:
    (disk / "filler").write_bytes(bytes(680 * 1024))
    outcome = run("train", "-c", workshop.quick, "-o", "out", "--report", "disk/report")
    assert outcome.code == 1
    assert "No space left on device" in outcome.err
    assert outcome.err.count("\n") == 1
    assert "head" in outcome.out
    assert "Saved to out." in outcome.out
    assert_finds_the_same("out", workshop.model)
    written = {path.name: path.read_bytes() for path in (disk / "report").iterdir()}
    assert "results.json" not in written
    assert [name for name, content in written.items() if name.startswith(".") or not content] == []


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Send this process the signal of Ctrl-C at a step of the training, counted from 1; 0: never again."""

    def interrupted(step: int) -> None:
        steps = itertools.count(1)

        def press(self: display.Bars, progress: Progress) -> None:
            if "training the" in progress.task and next(steps) == step:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(display.Bars, "__call__", press)

    return interrupted


@pytest.mark.parametrize(
    ("options", "step"),
    [(("--mode", "adapter"), 4), (("--mode", "adapter"), 8), (("--clients", "2", "--rounds", "2"), 6)],
    ids=["head stage", "adapter stage", "second round"],
)
def test_ctrl_c_keeps_a_checkpoint_and_resume_ends_as_if_nothing_had_happened(
    options: tuple[str, ...], step: int, workshop: Workshop, here: Path, interrupted: Callable[[int], None]
) -> None:
    train = ("train", "-c", workshop.quick, *options, "--set", "training.checkpoint_seconds=1e-9")
    interrupted(step)
    outcome = run(*train, "-o", "out")
    assert outcome.code == 130
    assert outcome.out == ""
    assert outcome.err == "Interrupted. Repeat the command with --resume to go on.\n"
    assert {path.name for path in here.iterdir()} == {"out.checkpoint"}
    assert "out.checkpoint/head.safetensors" in listing(here)
    interrupted(0)
    assert run(*train, "-o", "out", "--resume").code == 0
    assert run(*train, "-o", "whole").code == 0
    for name in ("adapter.safetensors", "head.safetensors", "documents.jsonl"):
        assert (here / "out" / name).read_bytes() == (here / "whole" / name).read_bytes()
    assert not (here / "out.checkpoint").exists()


def test_ctrl_c_before_the_first_checkpoint_promises_nothing(
    workshop: Workshop, here: Path, interrupted: Callable[[int], None]
) -> None:
    interrupted(1)
    outcome = run("train", "-c", workshop.quick, "-o", "out")
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "Interrupted.\n")
    assert listing(here) == {}


@pytest.fixture
def stopped(workshop: Workshop, interrupted: Callable[[int], None]) -> tuple[str | Path, ...]:
    """A command that was interrupted and left a checkpoint."""
    command = ("train", "-c", workshop.quick, "-o", "out", "--set", "training.checkpoint_seconds=1e-9")
    interrupted(2)
    assert run(*command).code == 130
    interrupted(0)
    return command


@pytest.mark.parametrize(
    "change",
    [("--seed", "14"), ("--epochs", "3"), ("--label-column", "site"), ("--mode", "adapter"), ("--clients", "2")],
)
def test_resuming_with_other_settings_or_data_is_refused_and_keeps_the_checkpoint(
    change: tuple[str, ...], stopped: tuple[str, ...], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("caravan.app.experiment.start_comparison", None)  # known before the rivals are measured
    before = listing(here)
    documents = ("--documents", "sites.csv") if "site" in change else ()
    if documents:
        (here / "sites.csv").write_text("doc_id,text\nnorth,a b\nsouth,c d\nx,e\n", encoding="utf-8")
        before = listing(here)
    check_refused(
        run(*stopped, *change, *documents, "--resume"), "out.checkpoint/head.safetensors", "other data or settings"
    )
    assert listing(here) == before


@pytest.mark.parametrize(
    "damage", [lambda path: path.write_bytes(path.read_bytes()[:-9]), lambda path: path.write_bytes(b"")]
)
def test_a_damaged_checkpoint_is_refused_and_a_new_start_replaces_it(
    damage: Callable[[Path], object], stopped: tuple[str, ...], here: Path
) -> None:
    damage(here / "out.checkpoint/head.safetensors")
    check_refused(run(*stopped, "--resume"), "out.checkpoint/head.safetensors: the checkpoint is damaged", "--resume")
    assert run(*stopped).code == 0
    assert {path.name for path in here.iterdir()} == {"out"}


def test_a_bad_option_does_not_cost_the_checkpoint_of_a_stopped_run(
    stopped: tuple[str, ...], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("caravan.app.experiment.start_comparison", None)  # known before the rivals are measured
    before = listing(here)
    check_refused(run(*stopped, "--partition-by", "nowhere"), "'nowhere'")
    check_refused(run(*stopped, "--device", "nonsense"), "nonsense")
    assert listing(here) == before
