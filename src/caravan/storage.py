"""A retriever as a folder: what was trained, which frozen model it needs, its documents; safetensors and JSON only."""

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from caravan.card import model_card
from caravan.config import AdapterConfig, BackboneConfig, HeadConfig
from caravan.data.catalogue import Catalogue
from caravan.errors import BackboneError, DataError, StorageError
from caravan.files import check_writable, whole_file, whole_folder
from caravan.model.backbone import Backbone, load_backbone
from caravan.model.head import FlatHead
from caravan.model.retriever import Retriever

FORMAT = "caravan retriever"
FORMAT_VERSION = 1

_CONFIG, RECORD, _DOCUMENTS, _CARD = "config.json", "training.json", "documents.jsonl", "README.md"
_TENSORS = {"adapter.": "adapter.safetensors", "head.": "head.safetensors"}
FILES = frozenset({_CONFIG, RECORD, _DOCUMENTS, _CARD, *_TENSORS.values()})
_GIVE = "load the model yourself and give it: load(folder, backbone=load_backbone(BackboneConfig(name=...)))"

_STRICT = ConfigDict(extra="forbid")
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class _SavedBackbone(BackboneConfig):
    hash: _Sha256
    family: Literal["encoder", "decoder"]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class _Manifest:
    """What `config.json` says."""

    format: Literal["caravan retriever"] = FORMAT
    format_version: int = FORMAT_VERSION
    caravan_version: str
    backbone: _SavedBackbone
    adapter: AdapterConfig
    head: HeadConfig
    documents: Annotated[int, Field(ge=1)]
    fingerprint: _Sha256  # of the catalogue


_MANIFEST = TypeAdapter(_Manifest)


def save(retriever: Retriever, folder: str | Path) -> Path:
    """Write a retriever: settings, trained tensors, documents, record and a model card; never the backbone.

    The files are `config.json`, `adapter.safetensors`, `head.safetensors`, `documents.jsonl`, `training.json` and
    `README.md`. The folder appears whole or not at all; the same retriever gives the same bytes. A retriever that is
    there is replaced, other files in its folder are kept.

    Args:
        retriever: what to save; its `record` must be plain JSON values (a number that is not finite becomes null).
        folder: made if it is not there.

    Returns:
        The folder.

    Raises:
        StorageError: the folder holds something else than a retriever or cannot be written, or the retriever could not
            be loaded again (numbers that are not finite, a document no reader takes).
    """
    check_destination(folder)
    manifest = _describe(retriever)
    state = retriever.trainable_state()
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise StorageError(f"{folder}: not saved: {name} holds values that are not finite; lower the learning rate")
    record = _as_json(retriever.record)
    settings = asdict(manifest)
    del settings["backbone"]["device"]  # where to compute is up to whoever loads
    with whole_folder(folder) as new:
        _keep_others(Path(folder), new)
        for prefix, file in _TENSORS.items():
            own = {
                name.removeprefix(prefix): part.contiguous() for name, part in state.items() if name.startswith(prefix)
            }
            with whole_file(new / file) as temporary:
                save_file(own, temporary)
        retriever.catalogue.write(new / _DOCUMENTS)
        _read_catalogue(new, manifest)  # better refused now, with the old folder in place, than when it is needed
        (new / RECORD).write_text(record, encoding="utf-8")
        (new / _CONFIG).write_text(_as_json(settings), encoding="utf-8")
        (new / _CARD).write_text(model_card(retriever), encoding="utf-8", errors="replace")
    return Path(folder)


def check_destination(folder: str | Path) -> None:
    """Refuse a folder that `save` would not write to, so that this is known before the training and not after it.

    Raises:
        StorageError: it is a file, a folder that is neither empty nor a saved retriever, the root of a disk, in a place
            that cannot be written, or of a name that is no text.
    """
    place = Path(folder)
    try:
        str(folder).encode("utf-8")
    except UnicodeEncodeError:
        raise StorageError(f"{folder}: the name is not UTF-8, which safetensors cannot open; choose another") from None
    try:
        if place.exists() and not (place.is_dir() and (not any(place.iterdir()) or _is_retriever(place))):
            what = "is a folder of something else" if place.is_dir() else "is a file"
            raise StorageError(
                f"{folder}: {what}, not a saved retriever, and is left alone; choose a new or an empty folder"
            )
        if place.is_mount():
            raise StorageError(f"{folder}: is the root of a disk, which cannot be replaced; choose a folder in it")
    except OSError as error:
        raise StorageError(f"{folder}: cannot be looked at: {error.strerror}; choose another folder") from None
    check_writable(Path(os.path.realpath(folder)).parent, name=folder)


def load(
    folder: str | Path, *, device: str = "cpu", backbone: Backbone | None = None, trust_remote_code: bool = False
) -> Retriever:
    """Read a saved retriever, with everything in the folder checked before it is used.

    Args:
        folder: what `save` wrote.
        device: where its backbone is loaded; one that is given stays where it is.
        backbone: the frozen model, already loaded; None: found by the saved reference. Its pooling, length limit and
            normalisation are set as saved.
        trust_remote_code: let the backbone's folder run its own Python. What the saved reference says is not heeded.

    Returns:
        The retriever; it gives the same numbers as the saved one.

    Raises:
        StorageError: the folder is missing, damaged, incomplete, of an unknown format version, or does not fit the
            backbone.
        BackboneError: the backbone cannot be found or loaded.
    """
    folder = Path(folder)
    try:
        manifest = _read_manifest(folder)
        record = _read_object(folder / RECORD)
        catalogue = _read_catalogue(folder, manifest)
        state = {name: part for prefix in _TENSORS for name, part in _read_tensors(folder, prefix).items()}
    except OSError as error:
        raise StorageError(f"{folder}: cannot be read: {error.strerror}; check the folder and its rights") from None
    _check_hidden(folder, manifest.head, state)
    if backbone is None:
        backbone = _load_backbone(folder, manifest.backbone, record, device, trust_remote_code)
    backbone = _fitting(folder, manifest.backbone, backbone)
    rows = torch.zeros((), device=backbone.config.device).expand(len(catalogue), backbone.hidden_width)
    retriever = Retriever.start(backbone, catalogue, rows, adapter=manifest.adapter, head=manifest.head)
    try:
        retriever.load_trainable_state(state)
    except StorageError as error:
        raise StorageError(f"{folder}: {error}") from None
    retriever.record = record
    return retriever


def fits(folder: str | Path, backbone: Backbone) -> bool:
    """Whether a saved retriever was trained on this frozen model, in this dtype, so that `load` could take it.

    Raises:
        StorageError: the folder is missing, or its settings are damaged or of an unknown format version.
    """
    saved = _read_manifest(Path(folder)).backbone
    return saved.hash == backbone.hash and backbone.blocks_dtype == getattr(torch, saved.dtype)


def read_record(folder: str | Path) -> dict[str, Any]:
    """Read what a saved retriever's training wrote down of itself, without loading the retriever.

    Raises:
        StorageError: the folder is no saved retriever, or its record is missing or damaged.
    """
    _read_manifest(Path(folder))
    return _read_object(Path(folder) / RECORD)


def _describe(retriever: Retriever) -> _Manifest:
    if not isinstance(retriever.head, FlatHead):
        raise StorageError(f"a retriever with a {type(retriever.head).__name__} is for comparison and cannot be saved")
    reference = retriever.encoder.backbone.reference()
    place = Path(reference["name"]).expanduser()
    if reference["name"] != "minilm" and place.is_dir():
        reference["name"] = str(place.resolve())  # a relative path would mean another folder elsewhere
    return _Manifest(
        caravan_version=version("caravan"),
        backbone=_SavedBackbone(**reference),
        adapter=retriever.adapter_config,
        head=retriever.head_config,
        documents=len(retriever.catalogue),
        fingerprint=retriever.catalogue.fingerprint,
    )


def _keep_others(old: Path, new: Path) -> None:
    for entry in old.iterdir() if old.is_dir() else ():
        if entry.name in FILES:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, new / entry.name, follow_symlinks=False)


def _as_json(value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        what = f"retriever.record holds something that is no JSON ({error})"
        raise StorageError(f"{what}; keep strings, numbers, lists and dicts in it") from None


def _finite(value: Any) -> Any:
    """JSON has no NaN: a measure that is undefined is written as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


def _is_retriever(folder: Path) -> bool:
    try:
        return _read_object(folder / _CONFIG).get("format") == FORMAT
    except StorageError:
        return False


def _read_manifest(folder: Path) -> _Manifest:
    if not folder.is_dir():
        what = "a file" if folder.exists() else "no such folder"
        raise StorageError(f"{folder}: {what}; give the folder of a saved retriever")
    path = folder / _CONFIG
    if not path.is_file():
        raise StorageError(f"{folder}: no {_CONFIG}, so not a saved retriever; give the folder that was saved to")
    values = _read_object(path)
    if values.get("format") != FORMAT:
        raise StorageError(f'{path}: not of a saved retriever ("format" is not "{FORMAT}"); give the folder saved to')
    number = values.get("format_version")
    if type(number) is not int or number != FORMAT_VERSION:
        newer = type(number) is int and number > FORMAT_VERSION
        remedy = "upgrade caravan" if newer else "save it again"
        raise StorageError(f"{path}: format version {number!r}, this caravan reads {FORMAT_VERSION}; {remedy}")
    try:
        return _MANIFEST.validate_python(values)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()[:5]]
        raise StorageError(f"{path}: {'; '.join(faults)}; the file was changed, save the retriever again") from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _missing(path) from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}; check the file and its rights") from None
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path}: not valid JSON ({error}); the file is damaged, save the retriever again") from None
    if not isinstance(value, dict):
        raise StorageError(f"{path}: a JSON {type(value).__name__}, not an object; the file is damaged, save again")
    return value


def _read_catalogue(folder: Path, manifest: _Manifest) -> Catalogue:
    path = folder / _DOCUMENTS
    if not path.exists():
        raise _missing(path)
    try:
        catalogue = Catalogue.read(path)
    except DataError as error:
        raise StorageError(str(error)) from None
    if len(catalogue) != manifest.documents:
        what = f"{len(catalogue):,} documents, {_CONFIG} says {manifest.documents:,}"
        raise StorageError(f"{path}: {what}; the head's rows would be others': restore the file, or train again")
    if catalogue.fingerprint != manifest.fingerprint:
        raise StorageError(f"{path}: not the documents it was saved with (another fingerprint); restore the file")
    return catalogue


def _read_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    path = folder / _TENSORS[prefix]
    if not path.is_file():
        raise _missing(path)
    try:
        with safe_open(path, framework="pt") as file:
            state = {prefix + name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise StorageError(
            f"{path}: not a sound safetensors file ({error}); restore the file, or train again"
        ) from None
    for name, tensor in state.items():
        if tensor.dtype != torch.float32:
            raise StorageError(f"{path}: {name} is {tensor.dtype}, expected torch.float32; restore the file")
    return state


def _check_hidden(folder: Path, head: HeadConfig, state: Mapping[str, Tensor]) -> None:
    # Before a layer of that width is made: a changed number must not ask for all the memory there is.
    inner = state.get("head.pre.inner")
    found = 0 if inner is None else inner.shape[-1] if inner.dim() else 0
    if found != head.hidden:
        what = f"head.pre.inner has {found} columns, {_CONFIG} says head.hidden = {head.hidden}"
        raise StorageError(f"{folder}: {what}; restore the files, or train again")


def _load_backbone(
    folder: Path, saved: _SavedBackbone, record: Mapping[str, Any], device: str, trust_remote_code: bool
) -> Backbone:
    values = {field.name: getattr(saved, field.name) for field in fields(BackboneConfig)}
    config = BackboneConfig(**{**values, "device": device, "trust_remote_code": trust_remote_code})
    if Path(config.name).is_absolute() and not Path(config.name).is_dir():
        raise BackboneError(f"{folder}: its backbone was the folder {config.name}, which is not there; {_GIVE}")
    seed = record.get("seed")  # of the weights, where they were drawn and never trained
    try:
        return load_backbone(config, seed=seed if type(seed) is int else 0)
    except BackboneError as error:
        raise BackboneError(f"{folder}: {error}; or {_GIVE}") from None


def _fitting(folder: Path, saved: _SavedBackbone, backbone: Backbone) -> Backbone:
    """The backbone with the saved settings, its weights shared, once it is sure that it is the right one."""
    if backbone.hash != saved.hash:
        hashes = f"{backbone.config.name} has hash {backbone.hash[:12]}, it was trained on {saved.hash[:12]}"
        raise StorageError(f"{folder}: another backbone: {hashes} ({saved.name}); for the right one, {_GIVE}")
    if backbone.blocks_dtype != getattr(torch, saved.dtype):
        got = f"the backbone computes in {backbone.blocks_dtype}, the retriever was trained with {saved.dtype}"
        raise StorageError(f'{folder}: {got}; load it with dtype = "{saved.dtype}"')
    config = replace(backbone.config, pooling=saved.pooling, max_tokens=saved.max_tokens, normalize=saved.normalize)
    if config == replace(backbone.config, pooling=backbone.pooling):
        return backbone
    return Backbone(config, backbone.model, backbone.tokenizer, backbone.hash)


def _missing(path: Path) -> StorageError:
    return StorageError(f"{path}: missing; the retriever's folder is incomplete: copy all of it, or save again")
