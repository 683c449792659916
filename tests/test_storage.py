import errno
import json
import os
import pickle
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from caravan import storage
from caravan.config import AdapterConfig, BackboneConfig, HeadConfig
from caravan.data.catalogue import Catalogue
from caravan.data.records import Document
from caravan.errors import BackboneError, CaravanError, StorageError
from caravan.model.backbone import Backbone, load_backbone
from caravan.model.head import OutputAdapterHead
from caravan.model.retriever import Retriever
from caravan.storage import check_destination, load, save
from disks import make_read_only, small_disk
from tiny_models import make_tiny_bert, make_tiny_llama

QUERIES = ["where is my parcel", "i forgot it!", "refund"]
DOCUMENTS = (
    Document("parcel", "track a parcel", "Tracking", {"url": "https://example.org/1"}),
    Document("login", "reset the password \N{GREEK SMALL LETTER GAMMA}"),
    Document("money", "get a refund", "Refunds"),
)
FILES = {"README.md", "adapter.safetensors", "config.json", "documents.jsonl", "head.safetensors", "training.json"}
RECORD = {
    "dataset": {"name": "helpdesk", "train": 1200, "validation": 130, "test": 320, "documents": 3},
    "history": [
        {"stage": "head", "epoch": 0, "loss": 0.5, "validation_recall": None, "seconds": 1.0},
        {"stage": "head", "epoch": 1, "loss": 0.25, "validation_recall": 0.75, "seconds": 1.0},
    ],
    "metrics": {
        "head": {"recall@1": {"value": 0.98765, "low": 0.975, "high": 0.99}},
        "BM25": {"recall@1": {"value": 0.5}},
    },
    "metrics_split": "test",
    "versions": {"torch": "2.13.0"},
    "seed": 7,
    "seconds": 12.5,
    "privacy": "Trained without differential privacy.",
    "federation": {"clients": [{"name": "a"}, {"name": "b"}], "rounds": [{}, {}, {}]},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Backbone]:
    folder = tmp_path_factory.mktemp("models")
    makers = {"bert": make_tiny_bert, "llama": make_tiny_llama}
    return {name: load_backbone(BackboneConfig(name=str(make(folder / name)))) for name, make in makers.items()}


def make_retriever(backbone: Backbone, documents=DOCUMENTS, *, seed: int = 0, adapter=None, head=None) -> Retriever:
    """A retriever all of whose trainable numbers are random, as if trained."""
    generator = torch.Generator().manual_seed(seed)
    rows, head = torch.zeros(len(documents), backbone.hidden_width), head or HeadConfig(hidden=0)
    retriever = Retriever.start(backbone, Catalogue(documents), rows, adapter=adapter, head=head)
    with torch.no_grad():
        for _, parameter in retriever.named_trainables():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    retriever.record = dict(RECORD)
    return retriever


@pytest.fixture
def saved(tmp_path, models) -> Path:
    return save(make_retriever(models["bert"]), tmp_path / "saved")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change_config(folder: Path, change) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))


def change_tensors(folder: Path, file: str, change) -> None:
    state = load_file(folder / file)
    change(state)
    save_file(state, folder / file)


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


def test_no_folder_a_file_and_a_folder_of_something_else_are_refused(tmp_path, models):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    told = {"gone": "no such folder", "file": "a file; give the folder", "empty": "no config.json, so not a saved"}
    for name, message in told.items():
        with pytest.raises(StorageError, match=message):
            load(tmp_path / name, backbone=models["bert"])
    with pytest.raises(StorageError, match=r'config\.json: not of a saved retriever \("format" is not'):
        load(models["bert"].config.name, backbone=models["bert"])


@pytest.mark.parametrize("file", sorted(FILES - {"README.md", "config.json"}))
def test_a_missing_file_is_named(saved, models, file):
    (saved / file).unlink()
    with pytest.raises(StorageError, match=rf"{file}: missing; the retriever's folder is incomplete"):
        load(saved, backbone=models["bert"])


def test_a_model_card_is_not_needed_to_load(saved, models):
    (saved / "README.md").unlink()
    assert load(saved, backbone=models["bert"]).record == RECORD


@pytest.mark.parametrize("file", ["config.json", "training.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"format": "caravan retriever", ', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1, 2]", "a JSON list, not an object"),
    ],
)
def test_invalid_json_is_refused(saved, models, file, content, message):
    (saved / file).write_bytes(content)
    with pytest.raises(StorageError, match=rf"{file}: {message}"):
        load(saved, backbone=models["bert"])


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(2, "upgrade caravan"), (0, "save it"), ("1", "save it"), (True, "save it"), (None, "save it")],
)
def test_another_format_version_is_refused(saved, models, number, remedy):
    change_config(saved, lambda settings: settings.update(format_version=number))
    with pytest.raises(StorageError, match=f"format version {number!r}, this caravan reads 1; {remedy}"):
        load(saved, backbone=models["bert"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda settings: settings.update(colour="red"), "colour: Unexpected keyword argument"),
        (lambda settings: settings["adapter"].update(colour="red"), r"adapter\.colour: Unexpected keyword argument"),
        (lambda settings: settings["backbone"].update(colour="red"), r"backbone\.colour: Unexpected keyword"),
        (lambda settings: settings["adapter"].update(kind="cubic"), r"adapter\.kind: Input should be 'full'"),
        (lambda settings: settings["head"].update(scale=float("nan")), r"head\.scale: Input should be"),
        (lambda settings: settings["backbone"].update(hash="../../x"), r"backbone\.hash: String should match"),
        (lambda settings: settings.pop("head"), "head: Field required"),
        (lambda settings: settings.update(documents=-1), "documents: Input should be greater"),
    ],
)
def test_settings_that_are_unknown_missing_or_not_allowed_are_refused(saved, models, change, message):
    change_config(saved, change)
    with pytest.raises(StorageError, match=rf"config\.json: {message}") as caught:
        load(saved, backbone=models["bert"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("adapter", lambda s: s.update(matrix=torch.zeros(31, 32)), r"adapter\.matrix has shape \(31, 32\)"),
        ("head", lambda s: s.update(rows=torch.zeros(4, 32)), r"head\.rows has shape \(4, 32\), this retriever needs"),
        ("head", lambda s: s.update(extra=torch.zeros(1)), r"missing \[\], unknown \['head\.extra'\]"),
        ("head", lambda s: s.pop("bias"), r"missing \['head\.bias'\], unknown \[\]"),
        ("adapter", lambda s: s.clear(), r"missing \['adapter\.matrix'\]"),
        ("adapter", lambda s: s["matrix"][3].fill_(torch.nan), r"adapter\.matrix holds values that are not finite"),
        ("head", lambda s: s["log_scale"].fill_(torch.inf), r"head\.log_scale holds values that are not finite"),
        ("head", lambda s: s.update(rows=s["rows"].half()), r"head\.rows is torch\.float16, expected torch\.float32"),
        ("head", lambda s: s.update({"pre.inner": torch.zeros(32, 5)}), r"has 5 columns, config\.json says .* = 0"),
        ("head", lambda s: s.update({"pre.inner": torch.zeros(())}), r"unknown \['head\.pre\.inner'\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(saved, models, file, change, message):
    change_tensors(saved, f"{file}.safetensors", change)
    with pytest.raises(StorageError, match=message) as caught:
        load(saved, backbone=models["bert"])
    assert str(caught.value).startswith(str(saved))
    assert "\n" not in str(caught.value)


def test_a_changed_width_is_refused_before_a_layer_of_that_width_is_made(saved, models):
    change_config(saved, lambda settings: settings["head"].update(hidden=10**12))
    with pytest.raises(StorageError, match=r"head\.pre\.inner has 0 columns, config\.json says head\.hidden = 10+;"):
        load(saved, backbone=models["bert"])


@pytest.mark.parametrize("file", ["adapter.safetensors", "head.safetensors"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content[:4],
        lambda content: b"",
        lambda content: content + b"\0",
        lambda content: b"\0" * len(content),
        lambda content: b"\xff" * len(content),
        lambda content: pickle.dumps({"matrix": [1.0]}) * 9,
    ],
    ids=["one byte short", "half", "four bytes", "empty", "one byte more", "zeros", "ones", "pickle"],
)
def test_a_damaged_or_foreign_tensor_file_is_refused(saved, models, file, damage):
    path = saved / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StorageError, match=rf"{file}: not a sound safetensors file"):
        load(saved, backbone=models["bert"])


def test_a_pickle_is_not_run_whatever_its_name(saved, models, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"matrix": Bomb()}, saved / "adapter.safetensors")
    with pytest.raises(StorageError, match="not a sound safetensors file"):
        load(saved, backbone=models["bert"])
    assert not (tmp_path / "exploded").exists()


def test_folders_in_the_place_of_files_are_refused(saved, models):
    for file in sorted(FILES - {"README.md"}, reverse=True):
        (saved / file).unlink()
        (saved / file).mkdir()
        with pytest.raises(StorageError):
            load(saved, backbone=models["bert"])


def test_other_documents_than_the_saved_ones_are_refused(saved, models):
    path = saved / "documents.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    told = {
        "".join(lines[:2]): "2 documents, config.json says 3",
        "".join([lines[1], lines[0], lines[2]]): "not the documents it was saved with",
        "".join(lines).replace("a refund", "no refund"): "not the documents it was saved with",
        lines[0] + lines[0] + lines[2]: "line 2: duplicate document id 'parcel'",
        "{": "line 1: not JSON",
        "": "an empty file",
    }
    for content, message in told.items():
        path.write_text(content)
        with pytest.raises(StorageError, match=message):
            load(saved, backbone=models["bert"])


def test_another_backbone_is_refused(saved, models, tmp_path):
    with pytest.raises(StorageError, match=f"has hash {models['llama'].hash[:12]}, it was trained on") as caught:
        load(saved, backbone=models["llama"])
    assert "backbone=load_backbone(" in str(caught.value)
    other = load_backbone(BackboneConfig(name=str(make_tiny_bert(tmp_path / "other", seed=1))))
    with pytest.raises(StorageError, match="another backbone"):
        load(saved, backbone=other)
    change_config(saved, lambda settings: settings["backbone"].update(name=other.config.name))
    with pytest.raises(StorageError, match="another backbone"):
        load(saved)


def test_a_backbone_that_moved_can_be_given(tmp_path, models):
    folder = make_tiny_bert(tmp_path / "here")
    retriever = make_retriever(load_backbone(BackboneConfig(name=str(folder))))
    place = save(retriever, tmp_path / "saved")
    folder.rename(tmp_path / "there")
    with pytest.raises(
        BackboneError, match=f"its backbone was the folder {folder}, which is not there; load the"
    ) as caught:
        load(place)
    assert "load(folder, backbone=load_backbone(BackboneConfig(name=...)))" in str(caught.value)
    moved = load_backbone(BackboneConfig(name=str(tmp_path / "there")))
    assert load(place, backbone=moved).search(QUERIES) == retriever.search(QUERIES)


def test_a_relative_backbone_folder_is_saved_absolute(tmp_path, monkeypatch):
    make_tiny_bert(tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    retriever = make_retriever(load_backbone(BackboneConfig(name="models/tiny")))
    save(retriever, "saved")
    monkeypatch.chdir(tmp_path / "models")
    assert load(tmp_path / "saved").search(QUERIES) == retriever.search(QUERIES)


def test_a_broken_backbone_folder_is_a_backbone_error(tmp_path):
    folder = make_tiny_bert(tmp_path / "tiny")
    place = save(make_retriever(load_backbone(BackboneConfig(name=str(folder)))), tmp_path / "saved")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match=rf"^{place}: .*no model\.safetensors.*; or load the model yourself"):
        load(place)
    with pytest.raises(BackboneError, match='device "abacus" cannot be used here'):
        load(place, device="abacus")


def test_a_given_backbone_takes_the_saved_pooling_length_and_normalisation(tmp_path, models):
    bert = models["bert"]
    config = replace(bert.config, pooling="cls", max_tokens=6, normalize=False)
    retriever = make_retriever(Backbone(config, bert.model, bert.tokenizer, bert.hash))
    place = save(retriever, tmp_path / "saved")
    again = load(place, backbone=bert)
    assert again.search(QUERIES) == retriever.search(QUERIES)
    assert again.encoder.backbone.model is bert.model
    assert bert.pooling == "mean"
    assert load(place).search(QUERIES) == retriever.search(QUERIES)


def test_a_fitting_backbone_is_used_as_it_is(saved, models):
    assert load(saved, backbone=models["bert"]).encoder.backbone is models["bert"]


def test_a_backbone_of_another_precision_is_refused(saved, models):
    with pytest.raises(
        StorageError, match=r'computes in torch\.bfloat16, .* trained with float32; .* dtype = "float32"'
    ):
        load(saved, backbone=models["bert"].cast(torch.bfloat16))


def test_a_never_pretrained_backbone_is_drawn_again_from_the_recorded_seed(tmp_path, models):
    config = replace(models["bert"].config, random_weights=True)
    retriever = make_retriever(load_backbone(config, seed=7))
    place = save(retriever, tmp_path / "saved")
    assert load(place).search(QUERIES) == retriever.search(QUERIES)
    retriever.record = {"seed": 8}
    with pytest.raises(StorageError, match="another backbone"):
        load(save(retriever, place))


CODE = """
from pathlib import Path
from transformers import BertConfig

Path(r"{marker}").touch()


class OwnConfig(BertConfig):
    model_type = "own-bert"
"""


def test_code_in_the_backbones_folder_runs_only_if_the_caller_says_so(tmp_path, monkeypatch):
    folder, marker = make_tiny_bert(tmp_path / "tiny"), tmp_path / "ran"
    place = save(make_retriever(load_backbone(BackboneConfig(name=str(folder)))), tmp_path / "saved")
    (folder / "own.py").write_text(CODE.format(marker=marker))
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "own-bert", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(settings))
    change_config(place, lambda settings: settings["backbone"].update(trust_remote_code=True))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(BackboneError, match="trust_remote_code"):
        load(place)
    assert not marker.exists()
    with pytest.raises(CaravanError):  # the changed configuration is another backbone, trusted or not
        load(place, trust_remote_code=True)
    assert marker.exists()


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


def test_a_place_that_may_not_be_looked_at_is_a_storage_error(saved, models, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(StorageError, match="saved: cannot be read: Permission denied; check the folder and its rights"):
        load(saved, backbone=models["bert"])
    with pytest.raises(StorageError, match="saved: cannot be looked at: Permission denied; choose another folder"):
        check_destination(saved)
