"""What a training step does before the optimizer: which examples it sees, and which gradient they give."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import Parameter

from caravan.model.retriever import Retriever
from caravan.training.batches import epoch_batches
from caravan.training.inputs import Inputs
from caravan.training.targets import Targets

Batches = list[list[int]]  # of one step: lists of example numbers, each small enough for memory


@dataclass(frozen=True)
class Work:
    """What there is to train on, in the form that a step needs.

    Attributes:
        retriever: what is trained.
        parameters: its trained parameters by the names of `Retriever.named_trainables`.
        inputs: the examples' queries, N or more.
        targets: what they aim at.
        count: N.
        batch_size: examples of a physical batch.
        smoothing: of labels.
        seed: decides the order of examples where that may be known.
    """

    retriever: Retriever
    parameters: dict[str, Parameter]
    inputs: Inputs
    targets: Targets
    count: int
    batch_size: int
    smoothing: float
    seed: int

    def shuffled(self, epoch: int, accumulated: int) -> list[Batches]:
        """Give an epoch's steps, each of `accumulated` batches, so that each example is seen once."""
        size = self.batch_size
        # Cut after batching, so that accumulation changes the memory needed and not the examples of a step.
        wholes = epoch_batches(self.inputs.lengths[: self.count], size * accumulated, seed=self.seed, epoch=epoch)
        return [[whole[cut : cut + size] for cut in range(0, len(whole), size)] for whole in wholes]


class Steps(Protocol):
    """How steps are made.

    Attributes:
        per_epoch: steps of an epoch.
        noise: standard deviation of the noise in each number of the latest step's gradient, where everybody may know
            it; else None.
    """

    per_epoch: int
    noise: float | None

    def of_epoch(self, epoch: int, done: int) -> Sequence[Batches]:
        """Give the batches of an epoch's steps but the first `done`."""
        ...

    def gradients(self, batches: Batches, dropout: torch.Generator) -> float | None:
        """Set each trained parameter's `grad` to that of the mean loss over a step's examples.

        Returns:
            That loss, nats; None of a step without examples.
        """
        ...


class PlainSteps:
    """All examples once an epoch, in an order drawn from the seed, and their gradient as it is."""

    def __init__(self, work: Work, accumulated: int) -> None:
        self.work, self.accumulated = work, accumulated
        self.noise: float | None = None
        self.per_epoch = -(-work.count // (work.batch_size * accumulated))

    def of_epoch(self, epoch: int, done: int) -> Sequence[Batches]:
        """Give the steps of an epoch but the first `done`: the same at every call."""
        return self.work.shuffled(epoch, self.accumulated)[done:]

    def gradients(self, batches: Batches, dropout: torch.Generator) -> float | None:
        """Backpropagate, batch by batch."""
        work, count = self.work, sum(map(len, batches))
        for parameter in work.parameters.values():
            parameter.grad = None
        total = 0.0
        for batch in batches:
            scores = work.retriever.head(work.inputs.queries(batch, dropout))
            loss = work.targets.loss(scores, batch, work.smoothing) * (len(batch) / count)
            loss.backward()
            total += float(loss.detach())
        return total
