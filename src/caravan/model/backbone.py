"""The frozen model: loaded without ever unpickling, and split into the token lookup and the blocks after it."""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from caravan.config import BackboneConfig
from caravan.errors import BackboneError
from caravan.model.source import read_model


class Backbone(nn.Module):
    """A frozen transformer in two halves: the token-embedding lookup and the blocks after it.

    Sizes: B texts, T tokens, E width of the token embeddings, H width of the hidden states (E = H in most models).

    Attributes:
        config: the settings it was loaded with.
        hash: sha256 hex over weights, configuration and tokenizer; the same files give the same hash everywhere.
        family: "encoder" (attention both ways) or "decoder" (causal attention).
        embedding_width: E.
        embedding_scale: what the lookup multiplies its table by (1 in most models, √E in Gemma's).
        hidden_width: H.
        max_tokens: the longest input used, never above what the model's positions allow.

    Raises:
        BackboneError: `max_tokens` leaves no room for text beside the model's special tokens.
    """

    def __init__(self, config: BackboneConfig, model: nn.Module, tokenizer: Any, digest: str) -> None:
        super().__init__()
        model.eval()
        model.requires_grad_(False)
        settings: Any = model.config
        table: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.hash = digest
        self.family: Literal["encoder", "decoder"] = _family(settings)
        self.table: Any = table
        self.embedding_width = int(table.weight.shape[1])
        self.embedding_scale = float(torch.as_tensor(getattr(table, "embed_scale", 1.0)).to(table.weight.dtype))
        self.hidden_width = int(settings.hidden_size)
        self._position_offset = _position_offset(model)
        self._accepts = inspect.signature(model.forward).parameters
        self._closing = self._closing_tokens()
        self.max_tokens = min(config.max_tokens, _position_limit(settings) - self._position_offset)
        needed = tokenizer.num_special_tokens_to_add() + len(self._closing) + 1
        if self.max_tokens < needed:
            raise BackboneError(
                f"{config.name}: backbone.max_tokens = {self.max_tokens} leaves no room for text; set at least {needed}"
            )

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

        Raises:
            BackboneError: the tokenizer names a token that the model has no embedding for.
        """
        if not texts:
            return []
        room = self.max_tokens - len(self._closing)
        encoded = self.tokenizer(list(texts), truncation=True, max_length=room, padding=False)["input_ids"]
        # A text of characters the tokenizer drops altogether would leave nothing to pool.
        filler = self._closing or [self.tokenizer.unk_token_id or 0]
        tokens = [(ids if self._closing == ids[-1:] else ids + self._closing) or filler for ids in encoded]
        highest, known = max(map(max, tokens)), len(self.table.weight)
        if highest >= known:
            raise BackboneError(
                f"{self.config.name}: the tokenizer gives token {highest}, the model knows 0 to {known - 1}; "
                f"give a folder whose tokenizer and weights belong together"
            )
        return tokens

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
        return next(p.dtype for p in self.model.parameters() if p is not self.table.weight)

    def cast(self, dtype: torch.dtype) -> "Backbone":
        """Give a backbone whose blocks compute in `dtype`; the embedding table is shared, not copied.

        Frozen weights are cast once here because autocast would cast them again at every step.
        """
        if dtype == self.blocks_dtype:
            return self
        shared = {id(parameter) for parameter in self.table.parameters()}
        # Telling deepcopy the copies beforehand keeps it from making full-width ones that are cast and thrown away.
        copies: dict[int, Any] = {id(self.table): self.table}
        for parameter in self.model.parameters():
            if id(parameter) not in shared:
                copies[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
        return Backbone(self.config, copy.deepcopy(self.model, copies), self.tokenizer, self.hash)

    def checkpoint_activations(self, enabled: bool) -> None:
        """Keep only each block's input on the way forward and compute the rest again on the way back, or stop that.

        Raises:
            BackboneError: the model's code does not say which of its modules are blocks.
        """
        layers = _repeated_blocks(self.model)
        if enabled and not layers:
            raise BackboneError(
                f"{self.config.name}: its blocks cannot be told apart; set training.activation_checkpointing = false"
            )
        for layer in layers:
            # transformers' own switch works in training mode only, which would bring dropout back in some families.
            vars(layer).pop("forward", None)
            if enabled:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)

    def reference(self) -> dict[str, Any]:
        """What a saved retriever keeps to find and verify this backbone again."""
        return {**asdict(self.config), "hash": self.hash, "family": self.family, "pooling": self.pooling}

    def _closing_tokens(self) -> list[int]:
        tokenizer = self.tokenizer
        if self.family == "encoder" or self.pooling != "last" or tokenizer.eos_token_id is None:
            return []
        written = tokenizer("a")["input_ids"][-1:]
        # Some tokenizers close a text themselves, not always with the token they call end of sequence.
        closed = written and written[0] in tokenizer.all_special_ids and written[0] != tokenizer.unk_token_id
        return [] if closed else [tokenizer.eos_token_id]


def load_backbone(config: BackboneConfig, *, seed: int = 0) -> Backbone:
    """Find, verify and load a frozen model.

    Args:
        config: `name` is "minilm" (the bundled all-MiniLM-L6-v2), a folder, or a Hugging Face id.
        seed: draws the weights when `config.random_weights` asks for the never-pretrained control.

    Raises:
        BackboneError: there is no such model, it is of no usable family, its weights are no safetensors, incomplete or
            not the published ones, or its device is not there.
    """
    _check_device(config.device)
    model, tokenizer, digest = read_model(config, seed=seed)
    return _split(config, model, tokenizer, digest)


def random_twin(backbone: Backbone, *, seed: int) -> Backbone:
    """The control: a backbone of the same shape and tokenizer whose weights were never pretrained."""
    return load_backbone(replace(backbone.config, random_weights=True), seed=seed)


def _split(config: BackboneConfig, model: Any, tokenizer: Any, digest: str) -> Backbone:
    try:
        backbone = Backbone(config, model.to(config.device), tokenizer, digest)
        ids = torch.tensor(backbone.tokenize(["a"]), device=config.device)
        with torch.no_grad():
            own = model(input_ids=ids).last_hidden_state
            ours = backbone.blocks(backbone.embed(ids), torch.ones_like(ids))
    except BackboneError:
        raise
    except torch.OutOfMemoryError:
        raise BackboneError(
            f"{config.name}: too large for the memory of {config.device}; set backbone.dtype or backbone.device"
        ) from None
    except Exception as error:  # a model of images, or one without a token lookup: each fails in a way of its own
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise BackboneError(
            f"{config.name}: not a usable text model ({reason}); give an encoder or a decoder"
        ) from error
    # Some families feed token ids to more than the first lookup; an adapter on the lookup would then be half a one.
    same = own.shape == ours.shape and own.shape[2] == backbone.hidden_width
    if not same or not torch.allclose(own.float(), ours.float(), rtol=1e-2, atol=1e-2, equal_nan=True):
        raise BackboneError(
            f"{config.name}: a {model.config.model_type} model does not give the same states from token embeddings as "
            f"from token ids, so no adapter can work on it; give another model"
        )
    return backbone


def _family(settings: Any) -> Literal["encoder", "decoder"]:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if getattr(settings, "is_decoder", False):
        return "decoder"
    # Embedding models made of decoders (EmbeddingGemma) attend both ways and say so.
    if getattr(settings, "use_bidirectional_attention", False):
        return "encoder"
    kind = settings.model_type
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "decoder" if causal else "encoder"


def _repeated_blocks(module: nn.Module) -> list[Any]:
    # Every family keeps its blocks in one list; lists inside a block (experts, shared groups) belong to that block.
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [block for child in module.children() for block in _repeated_blocks(child)]


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
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:160]
        raise BackboneError(f'device "{device}" cannot be used here ({reason}); set backbone.device = "cpu"') from None
