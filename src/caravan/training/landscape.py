"""The loss of one owner's examples around a retriever as it stands: value, gradient, and Hessian-vector products."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from caravan.config import TrainingConfig
from caravan.data.records import Example
from caravan.errors import TrainingError
from caravan.model.head import FlatHead
from caravan.model.retriever import Retriever
from caravan.training.batches import epoch_batches
from caravan.training.features import FeatureStore
from caravan.training.inputs import Inputs, TokenInputs, encode_inputs
from caravan.training.progress import Report
from caravan.training.stages import Stage, trained_parameters
from caravan.training.targets import Targets

Direction = dict[str, Tensor]  # one float32 tensor a trained parameter, of its shape


class Landscape:
    """What a stage minimises, as a function of what it trains; nothing of the retriever is changed.

    The loss is that of training without what is dropped at random. Rows that training holds (documents without
    queries) are no direction one can go in: gradients and Hessian-vector products are 0 there.

    Attributes:
        retriever: where it stands is where derivatives are taken.
        parameters: the trained ones by the names of `Retriever.named_trainables`.
        inputs: N examples.
        targets: what they aim at.
        batches: the examples' numbers, in an order drawn from the seed, in parts that fit into memory.
    """

    def __init__(
        self,
        retriever: Retriever,
        examples: Sequence[Example],
        stage: Stage,
        config: TrainingConfig,
        *,
        passages: Sequence[Example] = (),
        seed: int = 0,
        store: FeatureStore | None = None,
        report: Report | None = None,
    ) -> None:
        """Encode or tokenize the examples.

        Args:
            retriever: adapter and head, as they stand.
            examples: queries with gold documents.
            stage: whose parameters are looked at.
            config: the stage's smoothing, and the batch size.
            passages: what documents say of themselves, trained on like `examples`.
            seed: decides the batches.
            store: where vectors are kept; nowhere if None.
            report: called while vectors are computed.

        Raises:
            TrainingError: there is no example.
        """
        together = [*examples, *passages]
        if not together:
            raise TrainingError("no examples to look at the loss of; give at least one query with its document")
        self.retriever, self.stage = retriever, stage
        self.parameters = trained_parameters(retriever, stage)
        settings = config.head if stage == "head" else config.adapter
        self.smoothing = settings.label_smoothing
        texts = [example.text for example in together]
        self.inputs: Inputs
        if stage == "head":
            self.inputs = encode_inputs(retriever.encoder, texts, [], store or FeatureStore(), report)
        else:  # in float32: second derivatives are differences of near equals
            self.inputs = TokenInputs(
                retriever.encoder, texts, replace(config, precision="float32", activation_checkpointing=False)
            )
        self.targets = Targets(
            [retriever.catalogue.gold_rows(example) for example in together],
            queries=len(examples) or len(together),
            document_count=len(retriever.catalogue),
            weighting=config.class_weights,
            device=retriever.encoder.device,
        )
        self.count = len(together)
        self.batches = epoch_batches(self.inputs.lengths, settings.batch_size, seed=seed, epoch=0)
        self._held = retriever.head_config.hold_unseen and isinstance(retriever.head, FlatHead)

    def losses(self, batch: Sequence[int]) -> Tensor:
        """Give each example's loss, float32 (B,) nats, differentiable twice."""
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
            scores = self.retriever.head(self.inputs.queries(batch))
        return self.targets.losses(scores, batch, self.smoothing)

    def slope(self, batches: Sequence[Sequence[int]] | None = None) -> tuple[float, Direction]:
        """Give the mean loss over batches (all if None), nats, and its gradient."""
        batches = self.batches if batches is None else batches
        count, total = sum(map(len, batches)), 0.0
        gradient = self._zeros()
        for batch in batches:
            loss = self.losses(batch).sum() / count
            total += float(loss.detach())
            self._add(gradient, torch.autograd.grad(loss, list(self.parameters.values())))
        return total, self._free(gradient)

    def curve(self, direction: Mapping[str, Tensor], batches: Sequence[Sequence[int]] | None = None) -> Direction:
        """Give the product of the mean loss's Hessian with a direction (Pearlmutter, 1994), over batches (all if None).

        One forward and two backward passes; the Hessian is never made.
        """
        batches = self.batches if batches is None else batches
        count, parameters = sum(map(len, batches)), list(self.parameters.values())
        product = self._zeros()
        for batch in batches:
            loss = self.losses(batch).sum() / count
            gradients = torch.autograd.grad(loss, parameters, create_graph=True)
            along = torch.stack(
                [(own * direction[name]).sum() for name, own in zip(self.parameters, gradients, strict=True)]
            )
            self._add(product, torch.autograd.grad(along.sum(), parameters, materialize_grads=True))
        return self._free(product)

    def close(self) -> None:
        """Leave the encoder as it was found."""
        self.inputs.close()

    def _zeros(self) -> Direction:
        return {name: torch.zeros_like(parameter) for name, parameter in self.parameters.items()}

    def _add(self, total: Direction, parts: Sequence[Tensor]) -> None:
        for whole, part in zip(total.values(), parts, strict=True):
            whole += part.detach()

    def _free(self, direction: Direction) -> Direction:
        """Leave out what training holds."""
        if self._held:
            for name in ("head.rows", "head.bias"):
                seen = torch.zeros_like(direction[name])
                seen[self.targets.seen] = 1
                direction[name] *= seen
        return direction


def inner(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Give the inner product of two directions, summed in float64."""
    return sum(float((one[name].double() * other[name].double()).sum()) for name in one)
