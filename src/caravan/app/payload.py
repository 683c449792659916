"""What a client sends in one round, counted from shapes alone: our adapters, and what could be trained instead."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import nn

from caravan.config import AdapterConfig, BackboneConfig, HeadConfig
from caravan.federation.codec import Codec, Kind
from caravan.model.adapter import make_adapter
from caravan.model.head import FlatHead
from caravan.model.source import read_skeleton

Method = Literal["full", "lowrank", "core", "lora-qv", "lora-all", "fine-tuning"]
Shapes = dict[str, tuple[int, ...]]

ADAPTERS: tuple[Method, ...] = ("full", "lowrank", "core")
RIVALS: tuple[Method, ...] = ("lora-qv", "lora-all", "fine-tuning")
CODECS: tuple[Kind, ...] = ("float32", "float16", "int8")
LORA_RANK = 8  # of the experiments with RoBERTa in arXiv:2106.09685 (table 9), and peft's default

# What a LoRA on "query and value" changes, by the names that transformers' families give these layers; GPT-2 and
# GPT-NeoX compute both, and the key, in one layer.
_QUERY_VALUE = ("query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "c_attn", "query_key_value")

# Larger models, by their published config.json. Only sizes: nothing here is downloaded.
LLAMAS: dict[str, dict[str, Any]] = {
    "TinyLlama-1.1B": {  # huggingface.co/TinyLlama/TinyLlama-1.1B-Chat-v1.0
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "Llama-3.2-3B": {  # huggingface.co/meta-llama/Llama-3.2-3B
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True)
class Skeleton:
    """A frozen model without its numbers.

    Attributes:
        name: the model.
        embedding_width: E, of the token embeddings.
        hidden_width: H, of the vectors.
        weights: shapes of all that the model computes its states with, by name; a pooler behind them is left out, and
            so is what a language model has to write text with.
        linears: (out, in) of its linear layers, by name.
    """

    name: str
    embedding_width: int
    hidden_width: int
    weights: Mapping[str, tuple[int, ...]]
    linears: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, name: str, model: nn.Module) -> "Skeleton":
        """Take the shapes of a transformers model, which may be on the device "meta"."""
        table: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        settings: Any = model.config
        weights = {name: tuple(weight.shape) for name, weight in model.named_parameters() if used(name)}
        linears = {name: _sides(layer) for name, layer in model.named_modules() if used(name) and _is_linear(layer)}
        return cls(name, int(table.weight.shape[1]), int(settings.hidden_size), weights, linears)

    def lora_layers(self, method: Method) -> list[str]:
        """The names of the layers that a LoRA changes: queries and values, or all linear ones."""
        return [name for name in self.linears if method == "lora-all" or name.split(".")[-1] in _QUERY_VALUE]

    @property
    def numbers(self) -> int:
        """How many numbers the model computes with."""
        return sum(map(math.prod, self.weights.values()))


@dataclass(frozen=True)
class Payload:
    """What a client sends in one round by one method and codec, beside the head.

    Attributes:
        method: what is trained beside the head.
        codec: how numbers are packed.
        numbers: how many are trained beside the head.
        part: bytes of these.
        head: bytes of the head.
        to_lora: `part` by that of a LoRA on queries and values of the same codec; None where no layer is called so.
        to_full: `part + head` by that of the full adapter in float32.
        down: bytes of adapter and head from the server to a client that has not got the round's start packed, as in a
            stage's first round; with a codec, later rounds bring it as many as go up.
    """

    method: Method
    codec: Kind
    numbers: int
    part: int
    head: int
    to_lora: float | None
    to_full: float
    down: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the sum of both parts."""
        return {**asdict(self), "together": self.part + self.head}


def payloads(skeleton: Skeleton, adapter: AdapterConfig, head: HeadConfig, documents: int) -> list[Payload]:
    """Count what every method sends with every codec; without the frames around the numbers (`Codec.expected_bytes`).

    Args:
        skeleton: the frozen model.
        adapter: rank and bias; its kind is not looked at.
        head: whether there is a pre-classifier layer, and how wide.
        documents: C, rows of the head.
    """
    of_head = head_shapes(skeleton, head, documents)
    methods = (*ADAPTERS, *RIVALS)
    parts: dict[Method, Shapes] = {method: part_shapes(method, skeleton, adapter) for method in methods}
    plain = Codec("float32")
    base = plain.expected_bytes({**parts["full"], **of_head})
    rows = []
    for method, part in parts.items():
        for kind in CODECS if part else ():
            codec = Codec(kind)
            size, lora, rest = (codec.expected_bytes(shapes) for shapes in (part, parts["lora-qv"], of_head))
            rows.append(
                Payload(
                    method=method,
                    codec=kind,
                    numbers=sum(map(math.prod, part.values())),
                    part=size,
                    head=rest,
                    to_lora=size / lora if lora else None,
                    to_full=(size + rest) / base,
                    down=plain.expected_bytes({**part, **of_head}),
                )
            )
    return rows


def part_shapes(method: Method, skeleton: Skeleton, adapter: AdapterConfig) -> Shapes:
    """Shapes of what is trained beside the head, by name; none where a LoRA finds no layer."""
    if method == "fine-tuning":
        return dict(skeleton.weights)
    if method in ("lora-qv", "lora-all"):
        shapes: Shapes = {}
        for name in skeleton.lora_layers(method):
            outputs, inputs = skeleton.linears[name]
            shapes |= {f"{name}.lora_A": (LORA_RANK, inputs), f"{name}.lora_B": (outputs, LORA_RANK)}
        return shapes
    kind = cast(Literal["full", "lowrank", "core"], method)
    made = make_adapter(replace(adapter, kind=kind), skeleton.embedding_width)
    return {f"adapter.{name}": tuple(parameter.shape) for name, parameter in made.named_parameters()}


def head_shapes(skeleton: Skeleton, head: HeadConfig, documents: int) -> Shapes:
    """Shapes of the head's tensors, by name."""
    made = FlatHead(torch.empty(documents, skeleton.hidden_width, device="meta"), head)
    return {f"head.{name}": tuple(parameter.shape) for name, parameter in made.named_parameters()}


def skeletons(backbone: BackboneConfig) -> list[Skeleton]:
    """The backbone at hand, then the larger models.

    Raises:
        BackboneError: there is no such backbone.
    """
    return [Skeleton.of(backbone.name, read_skeleton(backbone)), *map(_llama, LLAMAS)]


@cache
def _llama(name: str) -> Skeleton:
    from transformers import LlamaConfig, LlamaModel

    with torch.device("meta"):
        return Skeleton.of(name, LlamaModel(LlamaConfig(**LLAMAS[name])))


def used(name: str) -> bool:
    """Whether a weight or layer of this name takes part in the hidden states: a pooler comes behind them."""
    return "pooler" not in name.split(".")


def _is_linear(layer: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

    return isinstance(layer, nn.Linear | Conv1D)


def _sides(layer: Any) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    return (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else (layer.nf, layer.nx)
