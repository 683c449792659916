"""The language model around an encoder's frozen blocks: the same weights write text, and no adapter is applied."""

from collections.abc import Iterable
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from caravan.errors import BackboneError
from caravan.model.backbone import Backbone
from caravan.model.source import model_folder, weight_files

_IN_FILES = {"embed_out.weight": "lm_head.weight"}  # GPT-NeoX's output layer, as its files call it


def language_model(backbone: Backbone) -> Any:
    """Put the output layer of a decoder on blocks that are already in memory.

    The adapter of a retriever stands between lookup and blocks, outside of `backbone.model`: what is made here is the
    model as it was published.

    Args:
        backbone: a decoder; its weights are shared, not copied.

    Returns:
        transformers' causal language model; beyond the backbone's it holds the output layer alone, or nothing where
        that is the embedding table.

    Raises:
        BackboneError: the backbone is no decoder, its weights were drawn, or its files have no output layer.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    name = backbone.config.name
    if backbone.family != "decoder":
        raise BackboneError(f"{name} is an encoder and cannot write; give a causal language model (a decoder)")
    if backbone.config.random_weights:
        raise BackboneError(f"{name} has random weights and writes noise; give a pretrained model")
    folder = model_folder(backbone.config)
    settings: Any = backbone.model.config
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            settings, dtype=backbone.blocks_dtype, trust_remote_code=backbone.config.trust_remote_code
        )
    if type(getattr(model, model.base_model_prefix, None)) is not type(backbone.model):
        raise BackboneError(f"{name}: a {settings.model_type} model cannot share its blocks; give another generator")
    setattr(model, model.base_model_prefix, backbone.model)
    if getattr(settings, "tie_word_embeddings", False):
        model.get_output_embeddings().weight = backbone.table.weight
    _fill(model, folder, backbone)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval().requires_grad_(False)


def _fill(model: nn.Module, folder: Any, backbone: Backbone) -> None:
    """Read the tensors that the blocks do not bring from the weight files."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    wanted = {name for name, tensor in tensors.items() if tensor.is_meta}
    for name, tensor in _read(folder, wanted):
        owner = model.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        tensor = tensor.to(device=backbone.config.device, dtype=backbone.blocks_dtype)
        if leaf in owner._parameters:
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(owner, leaf, tensor)
        wanted.remove(name)
    if wanted:
        raise BackboneError(
            f"{folder}: no {min(wanted)}, which a language model needs to write; give the folder of a causal language "
            f"model as it was published, or another generator"
        )


def _read(folder: Any, names: set[str]) -> Iterable[tuple[str, torch.Tensor]]:
    for path in weight_files(folder) if names else ():
        try:
            with safe_open(path, framework="pt") as file:
                keys = {_IN_FILES.get(key, key): key for key in file.keys()}  # noqa: SIM118 - not a mapping
                found = [(name, file.get_tensor(keys[name])) for name in names.intersection(keys)]
        except (SafetensorError, OSError) as error:
            raise BackboneError(f"{path}: not a sound safetensors file ({error}); get the model again") from None
        yield from found
