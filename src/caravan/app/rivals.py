"""Rivals to the adapter that change the backbone itself: LoRA (by peft) and full fine-tuning, on a copy of its own."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from caravan.app.learning import Experiment
from caravan.app.payload import LORA_RANK, Method, Skeleton, used
from caravan.config import Config
from caravan.data.dataset import Dataset
from caravan.errors import ConfigError
from caravan.model.adapter import Adapter
from caravan.model.backbone import Backbone
from caravan.model.encoder import Encoder
from caravan.model.retriever import Retriever
from caravan.training.features import FeatureStore
from caravan.training.progress import Report

# Peak learning rates of Adam. LoRA: RoBERTa's on most tasks of arXiv:2106.09685, table 9. Fine-tuning: the highest
# that the authors of BERT search (arXiv:1810.04805, appendix A.3).
LEARNING_RATES: dict[Method, float] = {"lora-qv": 5e-4, "lora-all": 5e-4, "fine-tuning": 5e-5}


class TunedBlocks(Adapter):
    """In an adapter's place, the weights of the backbone that are trained; token embeddings go through as they are."""

    def __init__(self, width: int, weights: Mapping[str, Parameter]) -> None:
        super().__init__(width)
        self._start: dict[str, Tensor] = {}
        for name, weight in weights.items():
            plain = name.replace(".", ":")  # PyTorch keeps the dot for itself
            self.register_parameter(plain, weight)
            self._start[plain] = weight.detach().clone()

    def apply_map(self, embeddings: Tensor) -> Tensor:
        """Return e."""
        return embeddings

    def is_identity(self) -> bool:
        """Whether every weight is as at the start, where a LoRA changes nothing."""
        return all(torch.equal(weight, self._start[name]) for name, weight in self.named_parameters())


class RivalExperiment(Experiment):
    """The same training, of a rival: only what is trained beside the head differs."""

    def __init__(
        self,
        dataset: Dataset,
        config: Config,
        method: Method,
        *,
        backbone: Backbone,
        store: FeatureStore | None = None,
        report: Report | None = None,
    ) -> None:
        """Prepare a training.

        Args:
            dataset: catalogue and examples.
            config: settings; the adapter's kind and learning rate are not looked at.
            method: "lora-qv", "lora-all" or "fine-tuning".
            backbone: the frozen model; it is copied, and stays as it is.
            store: where vectors are kept.
            report: called as the work goes on.

        Raises:
            ConfigError: the method is a LoRA, and peft is not installed or no layer fits.
        """
        self.method: Method = method
        stage = replace(config.training.adapter, learning_rate=LEARNING_RATES[method])
        config = replace(config, adapter=replace(config.adapter, kind="none"))
        config = replace(config, training=replace(config.training, adapter=stage))
        super().__init__(dataset, config, backbone=backbone, store=store, report=report)

    def _start(self) -> Retriever:
        plain = super()._start()
        encoder = tuned_encoder(self.backbone, self.method, seed=self.config.seed)
        adapter, head = plain.adapter_config, plain.head_config
        return Retriever(encoder, plain.head, plain.catalogue, adapter_config=adapter, head_config=head)


def tuned_encoder(backbone: Backbone, method: Method, *, seed: int) -> Encoder:
    """Copy a backbone and have some of its weights trained; at the start its vectors are the backbone's own.

    Args:
        backbone: stays as it is.
        method: "lora-qv" and "lora-all" train factors of rank 8 beside the layers, "fine-tuning" all weights.
        seed: draws the factors.

    Raises:
        ConfigError: the method is a LoRA, and peft is not installed or no layer fits.
    """
    model = copy.deepcopy(backbone.model)
    if method != "fine-tuning":
        _add_lora(model, backbone, method, seed)
    tuned = Backbone(backbone.config, model, backbone.tokenizer, backbone.hash)
    marks = "" if method == "fine-tuning" else ".lora_"
    weights = {name: weight for name, weight in model.named_parameters() if marks in name and used(name)}
    for weight in weights.values():
        weight.requires_grad_(True)  # the copy alone: a backbone is frozen
    return Encoder(tuned, TunedBlocks(tuned.embedding_width, weights))


def _add_lora(model: Any, backbone: Backbone, method: Method, seed: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError("LoRA needs peft; install it with `pip install 'caravan[compare]'`") from None
    layers = Skeleton.of(backbone.config.name, model).lora_layers(method)
    if not layers:
        raise ConfigError(f"{backbone.config.name}: no layer of its blocks is known to be one that LoRA fits")
    # alpha = rank, as for RoBERTa in arXiv:2106.09685: the factors' product counts as it is.
    settings = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=layers)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(settings, model)
