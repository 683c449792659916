"""The two stages of a training, and what each of them trains."""

from typing import Literal

from torch.nn import Parameter

from caravan.model.retriever import Retriever

Stage = Literal["head", "adapter"]


def trained_parameters(retriever: Retriever, stage: Stage) -> dict[str, Parameter]:
    """What a stage trains, by the names of `Retriever.named_trainables`."""
    return {
        name: parameter
        for name, parameter in retriever.named_trainables()
        if stage == "adapter" or name.startswith("head.")
    }
