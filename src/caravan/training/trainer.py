"""The one local-training function: central training and every client of a federation call `fit`."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from caravan.config import AdapterStageConfig, HeadStageConfig, TrainingConfig
from caravan.data.records import Example
from caravan.errors import TrainingError
from caravan.model.backbone import Backbone
from caravan.model.encoder import pad
from caravan.model.retriever import Retriever
from caravan.training.batches import epoch_batches
from caravan.training.checkpoint import Checkpoint, Snapshot
from caravan.training.features import FeatureStore

Stage = Literal["head", "adapter"]


@dataclass(frozen=True)
class Progress:
    """How far a piece of long work is.

    Attributes:
        task: what is being done.
        done: units done so far.
        total: units in all.
        loss: the latest batch's loss, where there is one.
        rate: queries a second, where known.
    """

    task: str
    done: int
    total: int
    loss: float | None = None
    rate: float | None = None


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of a training.

    Attributes:
        stage: "head" or "adapter".
        epoch: from 0.
        loss: mean training loss, nats.
        validation_recall: share of validation queries whose first hit is gold, or None without validation.
        seconds: wall-clock time.
    """

    stage: str
    epoch: int
    loss: float
    validation_recall: float | None
    seconds: float


def fit(
    retriever: Retriever,
    examples: Sequence[Example],
    stage: Stage,
    config: TrainingConfig,
    *,
    seed: int,
    epochs: range | None = None,
    validation: Sequence[Example] = (),
    store: FeatureStore | None = None,
    report: Report | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[EpochRecord]:
    """Train a retriever in place on one machine's examples (cross-entropy over documents; arXiv:2509.16508, eq. 4).

    The "head" stage trains the head alone on vectors that are computed once; the "adapter" stage trains adapter and
    head and backpropagates through the frozen blocks to their input.

    Args:
        retriever: changed in place; its frozen weights are not.
        examples: N queries with gold documents; several gold documents share the target evenly.
        stage: what is trained.
        config: settings of both stages; the stage's `epochs` is the whole training's length.
        seed: decides the order of examples.
        epochs: the part of the training to do now, for a round of a federation; all of it if None. The learning rate
            follows the whole training's schedule, the optimizer starts anew.
        validation: scored after each epoch; with `config.patience` it also stops the training early.
        store: where vectors are kept; nowhere if None.
        report: called after every step.
        checkpoint: where to save every `config.checkpoint_seconds`; a snapshot found there is taken up.

    Returns:
        One record an epoch, of this call and of the snapshot it took up.

    Raises:
        TrainingError: there is no example, or the loss is no longer finite.
        DataError: an example's gold document is not in the catalogue.
        StorageError: the checkpoint cannot be written or trusted.
    """
    if not examples:
        raise TrainingError("no training examples; give at least one query with its document")
    return _Fit(retriever, examples, stage, config, seed, validation, store, report).run(epochs, checkpoint)


class _Fit:
    """The state of one call of `fit`."""

    def __init__(
        self,
        retriever: Retriever,
        examples: Sequence[Example],
        stage: Stage,
        config: TrainingConfig,
        seed: int,
        validation: Sequence[Example],
        store: FeatureStore | None,
        report: Report | None,
    ) -> None:
        self.retriever, self.stage, self.config, self.seed, self.report = retriever, stage, config, seed, report
        self.settings: HeadStageConfig | AdapterStageConfig = config.head if stage == "head" else config.adapter
        make = _VectorInputs if stage == "head" else _TokenInputs
        store = store or FeatureStore()
        self.inputs = make(retriever, examples, config, store, report)
        self.targets = _Targets(retriever, examples, config.class_weights)
        self.validation = make(retriever, validation, config, store, report) if validation else None
        self.validation_gold = [set(retriever.catalogue.gold_rows(example)) for example in validation]
        self.parameters = {
            name: parameter
            for name, parameter in retriever.named_trainables()
            if stage == "adapter" or name.startswith("head.")
        }
        self.optimizer = self._optimizer()
        self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.held = _held_rows(retriever, self.targets) if retriever.head_config.hold_unseen else None
        self.history: list[EpochRecord] = []
        self.epoch, self.step_in_epoch, self.epoch_loss, self.epoch_seconds = 0, 0, 0.0, 0.0
        self.best: tuple[float, int, dict[str, Tensor]] | None = None

    def run(self, epochs: range | None, checkpoint: Checkpoint | None) -> list[EpochRecord]:
        epochs = range(self.settings.epochs) if epochs is None else epochs
        self.epoch = epochs.start
        snapshot = checkpoint.load() if checkpoint else None
        if snapshot is not None:
            self._restore(snapshot)
        saved = time.monotonic()
        while self.epoch < epochs.stop and not self._out_of_patience():
            groups = self._groups()
            for group in groups[self.step_in_epoch :]:
                self._step(group, len(groups))
                if checkpoint and time.monotonic() - saved >= self.config.checkpoint_seconds:
                    checkpoint.save(self._snapshot())
                    saved = time.monotonic()
            self._close_epoch(len(groups))
        if self.best is not None:
            self.retriever.load_trainable_state({**self.retriever.trainable_state(), **self.best[2]})
        if checkpoint:
            checkpoint.save(self._snapshot())
        return self.history

    def _groups(self) -> list[list[list[int]]]:
        """Give an epoch's steps, each a list of the batches whose gradients it accumulates."""
        batches = epoch_batches(self.inputs.lengths, self.settings.batch_size, seed=self.seed, epoch=self.epoch)
        size = self.config.gradient_accumulation
        return [batches[start : start + size] for start in range(0, len(batches), size)]

    def _step(self, group: list[list[int]], steps: int) -> None:
        started = time.perf_counter()
        count = sum(len(batch) for batch in group)
        self._set_rates((self.epoch + self.step_in_epoch / steps) / self.settings.epochs, 1 / (steps * self.settings.epochs))
        self.optimizer.zero_grad()
        total = 0.0
        for batch in group:
            scores = self.retriever.head(self.inputs.queries(batch))
            loss = self.targets.loss(scores, batch, self.settings.label_smoothing) * (len(batch) / count)
            loss.backward()
            total += float(loss.detach())
        if not math.isfinite(total):
            raise TrainingError(
                f"the loss is {total} in epoch {self.epoch + 1} of the {self.stage} stage; lower training.{self.stage}.learning_rate "
                f"(now {self.settings.learning_rate})"
            )
        if self.config.max_gradient_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_gradient_norm)
        self.optimizer.step()
        self._restore_held_rows()
        self.step_in_epoch += 1
        self.epoch_loss += total
        seconds = time.perf_counter() - started
        self.epoch_seconds += seconds
        if self.report is not None:
            done = self.epoch * steps + self.step_in_epoch
            task = f"training the {self.stage}"
            self.report(Progress(task, done, steps * self.settings.epochs, loss=total, rate=count / seconds))

    def _set_rates(self, done: float, one_step: float) -> None:
        # Linear warm-up, then cosine to zero, as a function of the share of the whole training that is done.
        warm = min(1.0, (done + one_step) / self.config.warmup) if self.config.warmup else 1.0
        factor = warm * 0.5 * (1 + math.cos(math.pi * done))
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor

    def _close_epoch(self, steps: int) -> None:
        recall = self._validation_recall()
        self.history.append(
            EpochRecord(self.stage, self.epoch, self.epoch_loss / max(steps, 1), recall, round(self.epoch_seconds, 3))
        )
        if self.config.patience and recall is not None and (self.best is None or recall > self.best[0]):
            state = {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}
            self.best = (recall, self.epoch, state)
        self.epoch += 1
        self.step_in_epoch, self.epoch_loss, self.epoch_seconds = 0, 0.0, 0.0

    @torch.no_grad()
    def _validation_recall(self) -> float | None:
        if self.validation is None:
            return None
        hits = 0
        for batch in epoch_batches(self.validation.lengths, 64, seed=0, epoch=0):
            first = self.retriever.head(self.validation.queries(batch)).argmax(dim=1).tolist()
            hits += sum(row in self.validation_gold[index] for row, index in zip(first, batch, strict=True))
        return hits / len(self.validation_gold)

    def _out_of_patience(self) -> bool:
        return self.best is not None and self.epoch - self.best[1] > self.config.patience

    def _optimizer(self) -> torch.optim.Optimizer:
        head_rate = self.settings.head_learning_rate if isinstance(self.settings, AdapterStageConfig) else self.settings.learning_rate
        groups: list[dict[str, Any]] = []
        for name, parameter in self.parameters.items():
            rate = head_rate if name.startswith("head.") else self.settings.learning_rate
            # Decay pulls to zero: right for the head's matrices, wrong for its scale and for an adapter that starts at I.
            decay = self.settings.weight_decay if name.startswith("head.") and parameter.ndim == 2 else 0.0
            groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
        if self.config.optimizer == "sgd":
            return torch.optim.SGD(groups)
        return torch.optim.AdamW(groups)

    @torch.no_grad()
    def _restore_held_rows(self) -> None:
        if self.held is not None:
            rows, start, bias = self.held
            self.retriever.head.rows[rows] = start
            self.retriever.head.bias[rows] = bias

    def _snapshot(self) -> Snapshot:
        tensors = {f"parameter.{name}": parameter for name, parameter in self.parameters.items()}
        for index, (name, parameter) in enumerate(self.parameters.items()):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
            if self.best is not None:
                tensors[f"best.{name}"] = self.best[2][name]
        values = {
            "stage": self.stage,
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "epoch_loss": self.epoch_loss,
            "epoch_seconds": self.epoch_seconds,
            "best": None if self.best is None else self.best[:2],
            "history": [asdict(record) for record in self.history],
        }
        return Snapshot(dict(tensors), values)

    @torch.no_grad()
    def _restore(self, snapshot: Snapshot) -> None:
        values, tensors = snapshot.values, snapshot.tensors
        for index, (name, parameter) in enumerate(self.parameters.items()):
            parameter.copy_(tensors[f"parameter.{name}"])
            prefix = f"optimizer.{index}."
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if state:
                on_device = {key: value if value.ndim == 0 else value.to(parameter.device) for key, value in state.items()}
                self.optimizer.state[parameter] = on_device
        self.epoch, self.step_in_epoch = values["epoch"], values["step_in_epoch"]
        self.epoch_loss, self.epoch_seconds = values["epoch_loss"], values["epoch_seconds"]
        if values["best"] is not None:
            self.best = (*values["best"], {name: tensors[f"best.{name}"] for name in self.parameters})
        self.history = [EpochRecord(**record) for record in values["history"]]


class _VectorInputs:
    """Queries as vectors computed once: nothing before the head is trained."""

    def __init__(
        self,
        retriever: Retriever,
        examples: Sequence[Example],
        config: TrainingConfig,
        store: FeatureStore,
        report: Report | None,
    ) -> None:
        del config
        self.vectors = encode_with_progress(retriever, [example.text for example in examples], store, report)
        self.lengths = [1] * len(examples)

    def queries(self, batch: Sequence[int]) -> Tensor:
        return self.vectors[torch.tensor(batch, device=self.vectors.device)]


class _TokenInputs:
    """Queries as tokens, encoded anew at every step because the adapter changes."""

    def __init__(
        self,
        retriever: Retriever,
        examples: Sequence[Example],
        config: TrainingConfig,
        store: FeatureStore,
        report: Report | None,
    ) -> None:
        del store, report
        self.encoder = retriever.encoder
        self.tokens = self.encoder.tokenize([example.text for example in examples])
        self.lengths = [len(ids) for ids in self.tokens]
        self.backbone = self.encoder.backbone.cast(training_dtype(config, self.encoder.backbone))
        self.backbone.checkpoint_activations(config.activation_checkpointing)

    def queries(self, batch: Sequence[int]) -> Tensor:
        input_ids, mask = pad([self.tokens[index] for index in batch], device=self.encoder.device)
        return self.encoder(input_ids, mask, backbone=self.backbone)


class _Targets:
    """Gold rows as padded arrays, and the loss over them."""

    def __init__(self, retriever: Retriever, examples: Sequence[Example], weighting: str) -> None:
        gold = [retriever.catalogue.gold_rows(example) for example in examples]
        device = retriever.encoder.device
        widest = max(len(rows) for rows in gold)
        self.rows = torch.tensor([rows + [rows[0]] * (widest - len(rows)) for rows in gold], device=device)
        counts = torch.tensor([len(rows) for rows in gold], device=device)
        self.share = (torch.arange(widest, device=device) < counts.unsqueeze(1)) / counts.unsqueeze(1)
        self.seen = torch.unique(self.rows)
        frequency = torch.bincount(self.rows[:, 0], minlength=len(retriever.catalogue)).to(torch.float32)[self.rows[:, 0]]
        weights = {"none": frequency**0, "sqrt": frequency**-0.5, "balanced": frequency**-1.0}[weighting]
        self.weights = weights / weights.mean()

    def loss(self, scores: Tensor, batch: Sequence[int], smoothing: float) -> Tensor:
        """Mean cross-entropy, nats, of logits (B, C) against each query's gold rows, every gold row equally."""
        index = torch.tensor(batch, device=scores.device)
        log_probability = functional.log_softmax(scores, dim=1)
        gold = (log_probability.gather(1, self.rows[index]) * self.share[index]).sum(dim=1)
        if smoothing:
            gold = (1 - smoothing) * gold + smoothing * log_probability.mean(dim=1)
        return -(gold * self.weights[index]).mean()


def _held_rows(retriever: Retriever, targets: _Targets) -> tuple[Tensor, Tensor, Tensor] | None:
    """Rows of documents without training queries, with the values they keep."""
    unseen = torch.ones(len(retriever.catalogue), dtype=torch.bool, device=targets.seen.device)
    unseen[targets.seen] = False
    rows = unseen.nonzero().squeeze(1)
    if not len(rows):
        return None
    head = retriever.head
    return rows, head.rows.detach()[rows].clone(), head.bias.detach()[rows].clone()


def encode_with_progress(
    retriever: Retriever, texts: Sequence[str], store: FeatureStore, report: Report | None, *, task: str = "encoding"
) -> Tensor:
    """Vectors of texts from the store, float32 (B, H), reported as `task`."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if report is not None:
            report(Progress(task, min(done, len(texts)), len(texts)))

    return store.encode(retriever.encoder, texts, progress=advance)


def training_dtype(config: TrainingConfig, backbone: Backbone) -> torch.dtype:
    """In which dtype the frozen blocks compute while training.

    "auto" takes bfloat16 only where the processor multiplies it natively (measured: 5 times slower than float32 on one
    without, 3 to 5 times faster on one with it), and never widens a backbone that was loaded narrower.
    """
    if config.precision == "float32" or backbone.blocks_dtype != torch.float32:
        return backbone.blocks_dtype
    if config.precision == "bfloat16":
        return torch.bfloat16
    device = torch.device(backbone.config.device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32

