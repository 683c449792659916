import errno
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from caravan import storage
from caravan.config import AdapterConfig, HeadConfig
from caravan.data.catalogue import Catalogue
from caravan.data.records import Document
from caravan.errors import StorageError
from caravan.model.backbone import Backbone
from caravan.model.head import OutputAdapterHead
from caravan.storage import check_destination, load, save
from disks import make_read_only, small_disk
from saved_retrievers import DOCUMENTS, FILES, QUERIES, RECORD, files_of, make_retriever

ADAPTERS = [
    AdapterConfig(kind="full"),
    AdapterConfig(kind="full", bias=True),
    AdapterConfig(kind="lowrank", rank=4, seed=3),
    AdapterConfig(kind="core", rank=4, seed=3, bias=True),
    AdapterConfig(kind="core", rank=1000),
    AdapterConfig(kind="none"),
]


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("hidden", [0, 5])
@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: f"{adapter.kind}-{adapter.rank}-{adapter.bias}")
def test_a_loaded_retriever_gives_bit_identical_hits(tmp_path, models, family, hidden, adapter):
    backbone = models[family]
    retriever = make_retriever(backbone, adapter=adapter, head=HeadConfig(hidden=hidden, scale=3.0))
    again = load(save(retriever, tmp_path / "saved"), backbone=backbone)
    assert again.search(QUERIES, k=3) == retriever.search(QUERIES, k=3)
    assert again.catalogue.documents == DOCUMENTS
    assert again.record == RECORD
    assert (again.adapter_config, again.head_config) == (retriever.adapter_config, retriever.head_config)
    state = again.trainable_state()
    assert all(torch.equal(state[name], tensor) for name, tensor in retriever.trainable_state().items())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_backbone_is_found_again_by_the_saved_reference(tmp_path, models, family):
    retriever = make_retriever(models[family])
    again = load(save(retriever, tmp_path / "saved"))
    assert again.encoder.backbone is not models[family]
    assert again.search(QUERIES) == retriever.search(QUERIES)


def test_saving_twice_and_saving_what_was_loaded_give_the_same_bytes(tmp_path, models):
    retriever = make_retriever(models["bert"], head=HeadConfig(hidden=4))
    first = files_of(save(retriever, tmp_path / "first"))
    assert set(first) == FILES
    assert files_of(save(retriever, tmp_path / "second")) == first
    assert files_of(save(load(tmp_path / "first", backbone=models["bert"]), tmp_path / "third")) == first
    assert files_of(save(retriever, tmp_path / "first")) == first


def test_the_folder_says_what_it_holds(saved, models):
    settings = json.loads((saved / "config.json").read_text())
    assert settings["format"] == "caravan retriever"
    assert settings["format_version"] == 1
    assert settings["documents"] == 3
    assert settings["fingerprint"] == Catalogue(DOCUMENTS).fingerprint
    assert settings["backbone"]["hash"] == models["bert"].hash
    assert (settings["backbone"]["pooling"], settings["backbone"]["family"]) == ("mean", "encoder")
    assert "device" not in settings["backbone"]
    assert {name: tuple(part.shape) for name, part in load_file(saved / "adapter.safetensors").items()} == {
        "matrix": (32, 32)
    }
    assert {name: tuple(part.shape) for name, part in load_file(saved / "head.safetensors").items()} == {
        "rows": (3, 32),
        "bias": (3,),
        "log_scale": (),
    }
    assert json.loads((saved / "training.json").read_text()) == RECORD


def test_other_files_are_kept_when_a_retriever_is_replaced(saved, models):
    (saved / "notes.txt").write_text("mine")
    (saved / "runs").mkdir()
    (saved / "runs" / "a.run").write_text("1 Q0")
    (saved / "link").symlink_to("notes.txt")
    other = make_retriever(models["bert"], DOCUMENTS[:2], seed=1)
    save(other, saved)
    assert load(saved, backbone=models["bert"]).search(QUERIES) == other.search(QUERIES)
    assert set(files_of(saved)) == FILES | {"notes.txt", "runs/a.run", "link"}
    assert (saved / "link").is_symlink()
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path, models):
    retriever = make_retriever(models["bert"])
    for name, config in (("none", None), ("model", '{"model_type": "bert"}'), ("broken", "{"), ("list", "[]")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "thesis.txt").write_text("years of work")
        if config is not None:
            (folder / "config.json").write_text(config)
        before = files_of(folder)
        for refuse in (lambda place: save(retriever, place), check_destination):
            with pytest.raises(StorageError, match="is a folder of something else, not a saved retriever, and is left"):
                refuse(folder)
        assert files_of(folder) == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file: is a file, not a saved retriever"):
        save(retriever, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def test_a_new_an_empty_and_a_retrievers_folder_can_be_saved_to(tmp_path, models):
    retriever = make_retriever(models["bert"])
    (tmp_path / "empty").mkdir()
    for name in ("empty", "empty", "new/deep"):
        check_destination(tmp_path / name)
        assert save(retriever, tmp_path / name) == tmp_path / name
        assert set(files_of(tmp_path / name)) == FILES


FAILURES = [
    (storage, "save_file", SafetensorError("I/O error: No space left on device (os error 28)")),
    (Catalogue, "write", OSError(errno.ENOSPC, "No space left on device")),
    (Path, "write_text", OSError(errno.ENOSPC, "No space left on device")),
    (os, "fsync", OSError(errno.ENOSPC, "No space left on device")),
    (Path, "rename", OSError(errno.EROFS, "Read-only file system: No space left on device")),
    (storage, "model_card", KeyboardInterrupt()),
]


@pytest.mark.parametrize(("owner", "name", "failure"), FAILURES, ids=[name for _, name, _ in FAILURES])
def test_a_failure_in_the_middle_of_saving_leaves_the_old_retriever(saved, models, monkeypatch, owner, name, failure):
    before = files_of(saved)

    def refuse(*_, **__):
        raise failure

    monkeypatch.setattr("caravan.files._exchange", lambda first, second: False)  # as the disk would
    monkeypatch.setattr(owner, name, refuse)
    with pytest.raises((StorageError, KeyboardInterrupt)) as caught:
        save(make_retriever(models["bert"], seed=1), saved)
    if not isinstance(failure, KeyboardInterrupt):
        assert re.match(rf"{saved}(/[a-z]+\.[a-z]+)?: cannot be written: .*No space left", str(caught.value))
    assert files_of(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_a_disk_that_fills_up_at_any_file_leaves_the_old_retriever(tmp_path, models):
    old, new = make_retriever(models["bert"]), make_retriever(models["bert"], seed=1)
    with small_disk(tmp_path / "disk", kib=128) as disk:
        before = files_of(save(old, disk / "saved"))
        told = []
        for kib in range(100, -1, -4):
            (disk / "filler").write_bytes(b"x" * (kib * 1024))
            try:
                save(new, disk / "saved")
            except StorageError as error:
                told.append(str(error))
            else:
                break
            assert files_of(disk / "saved") == before
            assert sorted(path.name for path in disk.iterdir()) == ["filler", "saved"]
        assert all(re.match(rf"{disk}/saved.*: cannot be written: .*No space left on device", line) for line in told)
        assert len(told) >= 6  # it was full at each file once at the least
        assert load(disk / "saved", backbone=models["bert"]).search(QUERIES) == new.search(QUERIES)


def test_a_read_only_disk_is_a_storage_error_and_can_still_be_loaded_from(tmp_path, models):
    retriever = make_retriever(models["bert"])
    with small_disk(tmp_path / "disk", kib=128) as disk:
        save(retriever, disk / "saved")
        make_read_only(disk)
        for name in ("saved", "new"):
            with pytest.raises(StorageError, match=f"{name}: cannot be written: Read-only file system"):
                save(retriever, disk / name)
        assert load(disk / "saved", backbone=models["bert"]).search(QUERIES) == retriever.search(QUERIES)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_retriever_does_not_replace_a_good_one(saved, models, value):
    before = files_of(saved)
    diverged = make_retriever(models["bert"])
    with torch.no_grad():
        diverged.head.bias[1] = value
    with pytest.raises(StorageError, match=r"not saved: head\.bias holds values that are not finite"):
        save(diverged, saved)
    assert files_of(saved) == before


def test_documents_that_no_reader_takes_do_not_replace_good_ones(saved, models):
    before = files_of(saved)
    unreadable = make_retriever(models["bert"], (Document("a", "x"), Document("b", " ")))
    with pytest.raises(StorageError, match=rf"^{saved}/documents\.jsonl, line 2: 'text' is empty"):
        save(unreadable, saved)
    assert files_of(saved) == before


def test_a_record_that_is_no_json_is_refused_and_undefined_numbers_become_null(saved, models):
    before = files_of(saved)
    retriever = make_retriever(models["bert"])
    endless: dict[str, object] = {}
    endless["self"] = endless
    for record in ({"path": Path("x")}, {"tensor": torch.zeros(1)}, {("a", "b"): 1}, endless):
        retriever.record = record
        with pytest.raises(StorageError, match=r"retriever\.record holds something that is no JSON"):
            save(retriever, saved)
        assert files_of(saved) == before
    retriever.record = {"loss": float("nan"), "range": (1, float("-inf"))}
    assert load(save(retriever, saved), backbone=models["bert"]).record == {"loss": None, "range": [1, None]}


def test_a_retriever_for_comparison_only_is_refused(tmp_path, models):
    retriever = make_retriever(models["bert"])
    retriever.head = OutputAdapterHead(torch.zeros(3, 32), HeadConfig())
    with pytest.raises(StorageError, match="a retriever with a OutputAdapterHead is for comparison"):
        save(retriever, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_the_model_card_tells_what_the_record_holds(saved, models):
    card = (saved / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: caravan\ntags:\n- caravan\n")
    assert models["bert"].config.name not in card  # a path says nothing to others, and too much
    for line in (
        "# Retriever trained on helpdesk",
        "| backbone | bert (encoder, mean pooling, frozen) |",
        f"| backbone hash | `{models['bert'].hash}` |",
        "| adapter | full; 1,024 trained numbers |",
        "| head | one row a document; 100 trained numbers |",  # 3 x 32 rows, 3 biases, 1 scale
        "| documents | 3 |",
        "| training data | helpdesk, 1,200 train, 130 validation, 320 test |",
        "| head stage | epochs: 2, last loss 0.2500, validation recall@1 0.7500 |",
        "| federation | 2 clients, 3 rounds of averaging |",
        "|  | recall@1 |",
        "| head | 0.9877 [0.9750, 0.9900] |",
        "| BM25 | 0.5000 |",
        "Trained without differential privacy.",
        'retriever = load("path/to/this/folder")',
    ):
        assert line in card.splitlines(), line


def test_the_model_card_of_an_empty_or_odd_record_has_no_empty_sections(tmp_path, models):
    retriever = make_retriever(models["llama"], adapter=AdapterConfig(kind="core", rank=4), head=HeadConfig(hidden=2))
    odd = {"dataset": {"name": "a|b\nc \ud800"}, "metrics": ["x"], "history": "long", "federation": 3, "privacy": None}
    for record, title in (({}, "# Classifier-as-retriever"), (odd, "# Retriever trained on a\\|b c ?")):
        retriever.record = record
        card = (save(retriever, tmp_path / "saved") / "README.md").read_text()
        assert title in card.splitlines()
        assert "| adapter | core, rank 4; 16 trained numbers |" in card
        assert (
            "| head | one row a document, pre-classifier of width 2; 230 trained numbers |" in card
        )  # 100 + 64 + 2 + 64
        assert "## Results" not in card
        assert "## Privacy" not in card


def test_the_model_card_names_the_base_model_of_a_public_backbone(tmp_path, models):
    bert = models["bert"]
    for name, public in (("minilm", "sentence-transformers/all-MiniLM-L6-v2"), ("org/some-model", "org/some-model")):
        backbone = Backbone(replace(bert.config, name=name, revision="main"), bert.model, bert.tokenizer, bert.hash)
        card = (save(make_retriever(backbone), tmp_path / "saved") / "README.md").read_text()
        assert f'base_model: "{public}"' in card.splitlines()
        assert f"| backbone | {public} at revision `main` (encoder, mean pooling, frozen) |" in card.splitlines()
