"""Which optimizer moves which parameter, and how fast at which moment of the training."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch.nn import Parameter

from caravan.config import AdapterStageConfig, HeadStageConfig


def make_optimizer(
    parameters: Mapping[str, Parameter], settings: HeadStageConfig | AdapterStageConfig, kind: Literal["adamw", "sgd"]
) -> torch.optim.Optimizer:
    """Make the optimizer of a stage, with one group a parameter, each at its peak learning rate.

    Args:
        parameters: what is trained, by the names of `Retriever.named_trainables`.
        settings: of the stage; names beginning with "head." have the head's rate, the others the adapter's.
        kind: "adamw" (arXiv:1711.05101), or "sgd" without momentum.
    """
    head_rate = settings.learning_rate if isinstance(settings, HeadStageConfig) else settings.head_learning_rate
    groups: list[dict[str, Any]] = []
    for name, parameter in parameters.items():
        in_head = name.startswith("head.")
        # Decay pulls to zero: right for the head's matrices, wrong for its scale and for an adapter that starts at I.
        decay = settings.weight_decay if in_head and parameter.ndim == 2 else 0.0
        rate = head_rate if in_head else settings.learning_rate
        groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
    if kind == "sgd":
        return torch.optim.SGD(groups)
    return torch.optim.AdamW(groups, fused=True)  # one pass over the numbers: a tenth of the time where rows are many


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """Give the share of the peak learning rate at a step: a linear warm-up, times a cosine from 1 to 0.

    Source of the cosine: arXiv:1608.03983, equation 5, without restarts.

    Args:
        step: number of the step in the whole training, from 0.
        steps: of the whole training.
        warmup: share of the steps after which the warm-up is over, in [0, 1).

    Returns:
        In (0, 1].
    """
    warm = min(1.0, (step + 1) / (warmup * steps)) if warmup else 1.0
    return warm * 0.5 * (1 + math.cos(math.pi * step / steps))
