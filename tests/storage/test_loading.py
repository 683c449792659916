import errno
import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from caravan.config import BackboneConfig
from caravan.errors import BackboneError, CaravanError, StorageError
from caravan.model.backbone import Backbone, load_backbone
from caravan.storage import check_destination, load, save
from saved_retrievers import FILES, QUERIES, RECORD, change_config, change_tensors, make_retriever
from tiny_models import make_tiny_bert


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


def test_a_place_that_may_not_be_looked_at_is_a_storage_error(saved, models, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(StorageError, match="saved: cannot be read: Permission denied; check the folder and its rights"):
        load(saved, backbone=models["bert"])
    with pytest.raises(StorageError, match="saved: cannot be looked at: Permission denied; choose another folder"):
        check_destination(saved)
