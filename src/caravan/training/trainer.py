"""The one local-training function: central training and every client of a federation call `fit`."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from caravan.config import AdapterStageConfig, HeadStageConfig, PrivacyConfig, TrainingConfig
from caravan.data.records import Example
from caravan.errors import TrainingError
from caravan.model.head import FlatHead
from caravan.model.retriever import Retriever
from caravan.training.batches import epoch_batches, noise_source
from caravan.training.checkpoint import Checkpoint, Snapshot
from caravan.training.diagnosis import Course, rate_too_high
from caravan.training.features import FeatureStore
from caravan.training.inputs import Inputs, TokenInputs, encode_inputs
from caravan.training.mechanism import NoisedSteps, PaperSteps
from caravan.training.optimizer import make_optimizer, rate_factor
from caravan.training.private import PrivateSteps
from caravan.training.progress import Progress, Report
from caravan.training.rate import automatic, choose_rates, with_rates
from caravan.training.stages import Stage, trained_parameters
from caravan.training.steps import Batches, PlainSteps, Steps, Work
from caravan.training.targets import HeldRows, Targets, plain_loss
from caravan.training.vitals import EpochRecord, Vitals

_VALIDATION_BATCH = 64  # queries without gradients: as when encoding


def fit(
    retriever: Retriever,
    examples: Sequence[Example],
    stage: Stage,
    config: TrainingConfig,
    *,
    seed: int,
    epochs: range | None = None,
    passages: Sequence[Example] = (),
    validation: Sequence[Example] = (),
    store: FeatureStore | None = None,
    report: Report | None = None,
    on_epoch: Callable[[EpochRecord], object] | None = None,
    checkpoint: Checkpoint | None = None,
    proximal_mu: float = 0.0,
    privacy: PrivateSteps | None = None,
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
            and the order of examples follow the whole training's schedule, the optimizer starts anew.
        passages: what documents say of themselves, trained on like `examples`; a document that only these know counts
            as one without training queries.
        validation: scored after each epoch; with `config.patience` it also stops the training early, and the weights
            become those after the best epoch.
        store: where vectors are kept; nowhere if None.
        report: called after every step, and while vectors are computed.
        on_epoch: called after every epoch of this call.
        checkpoint: where to save every `config.checkpoint_seconds`; a snapshot found there is taken up.
        proximal_mu: adds mu/2 ||theta - theta_0||^2 to what is minimised, theta_0 being the retriever as it was given
            (FedProx; arXiv:1812.06127, eq. 2); the losses that are reported are without it.
        privacy: how a guarantee is kept. Then an epoch is as many steps as see each unit about once; the whole
            gradient is not clipped again; no row of the head is held, as the held ones are those without queries; and
            validation is not looked at unless it is public.

    Returns:
        One record an epoch, of this call and of the snapshot it took up.

    Raises:
        TrainingError: there is no example, `epochs` reaches beyond the stage's, or the loss or a weight is no longer
            finite; then the retriever is not to be used.
        DataError: an example's gold document is not in the catalogue.
        StorageError: the checkpoint cannot be written or trusted.
        PrivacyError: a setting does not go with `privacy`, or its budget is spent.
    """
    settings = config.head if stage == "head" else config.adapter
    epochs = range(settings.epochs) if epochs is None else epochs
    if not examples:
        raise TrainingError("no training examples; give at least one query with its document")
    if len(epochs) and not 0 <= epochs.start <= epochs.stop <= settings.epochs:
        raise TrainingError(
            f"epochs {epochs.start} to {epochs.stop} are asked for, training.{stage}.epochs is {settings.epochs}; "
            "stay within the whole training"
        )
    # Whatever can be refused is refused before the long work of encoding.
    if privacy is not None:
        privacy.check(retriever, examples, config, passages=bool(passages))
        validation = validation if privacy.config.public_validation else ()
    snapshot = checkpoint.load() if checkpoint else None
    if automatic(config, stage):  # at the stage's start, also where a snapshot of later is taken up
        choice = choose_rates(
            retriever, examples, stage, config, passages=passages, seed=seed, store=store, report=report
        )
        config = with_rates(config, stage, choice.rates)
    training = _Fit(
        retriever, examples, passages, stage, config, seed, epochs, validation, report, proximal_mu, privacy
    )
    if checkpoint and snapshot:
        training.restore(checkpoint, snapshot)
    training.on_epoch = on_epoch
    training.prepare(store or FeatureStore())
    try:
        training.run(checkpoint)
    finally:
        training.inputs.close()
    return training.history


class _Fit:
    """The state of one call of `fit`."""

    on_epoch: Callable[[EpochRecord], object] | None = None
    inputs: Inputs  # the examples' queries, the passages, then the queries of validation
    steps: Steps

    def __init__(
        self,
        retriever: Retriever,
        examples: Sequence[Example],
        passages: Sequence[Example],
        stage: Stage,
        config: TrainingConfig,
        seed: int,
        epochs: range,
        validation: Sequence[Example],
        report: Report | None,
        proximal_mu: float,
        privacy: PrivateSteps | None,
    ) -> None:
        self.retriever, self.stage, self.config, self.seed = retriever, stage, config, seed
        self.examples, self.privacy = examples, privacy
        self.settings: HeadStageConfig | AdapterStageConfig = config.head if stage == "head" else config.adapter
        self.epochs, self.report = epochs, report
        self.texts = [example.text for example in (*examples, *passages, *validation)]
        self.count = len(examples) + len(passages)
        self.targets = Targets(
            [retriever.catalogue.gold_rows(example) for example in (*examples, *passages)],
            queries=len(examples),
            document_count=len(retriever.catalogue),
            weighting=config.class_weights,
            device=retriever.encoder.device,
        )
        self.validation_gold = [set(retriever.catalogue.gold_rows(example)) for example in validation]
        self.parameters = trained_parameters(retriever, stage)
        self.proximal_mu = proximal_mu
        self.anchors = {
            name: parameter.detach().clone() for name, parameter in self.parameters.items() if proximal_mu > 0
        }
        self.optimizer = make_optimizer(self.parameters, self.settings, config.optimizer)
        self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.history: list[EpochRecord] = []
        self.warned = False
        self.epoch, self.step_in_epoch, self.vitals = epochs.start, 0, Vitals()
        self.best: tuple[float, int, dict[str, Tensor]] | None = None

    def prepare(self, store: FeatureStore) -> None:
        """Encode or tokenize the queries, and remember what must not move."""
        encoder, queries, validation = self.retriever.encoder, self.texts[: self.count], self.texts[self.count :]
        if self.stage == "head":
            dropout = self.config.head.dropout
            self.inputs = encode_inputs(encoder, queries, validation, store, self.report, dropout=dropout)
        else:
            self.inputs = TokenInputs(encoder, self.texts, self.config)
        self.steps = self._make_steps()
        head = self.retriever.head
        self.held: HeldRows | None = None
        if self.retriever.head_config.hold_unseen and isinstance(head, FlatHead) and self.privacy is None:
            self.held = HeldRows(head, self.targets.seen)

    def _make_steps(self) -> Steps:
        settings, accumulated = self.settings, self.config.gradient_accumulation
        work = Work(
            retriever=self.retriever,
            parameters=self.parameters,
            inputs=self.inputs,
            targets=self.targets,
            count=self.count,
            batch_size=settings.batch_size,
            smoothing=settings.label_smoothing,
            seed=self.seed,
        )
        if self.privacy is None:
            return PlainSteps(work, accumulated)
        if self.privacy.config.mode == "paper":
            return PaperSteps(work, self.privacy, accumulated)
        return NoisedSteps(work, self.privacy, self.examples)

    def run(self, checkpoint: Checkpoint | None) -> None:
        saved = time.monotonic()
        while self.epoch < self.epochs.stop and not self._out_of_patience():
            for batches in self.steps.of_epoch(self.epoch, self.step_in_epoch):
                self._step(batches)
                if checkpoint and time.monotonic() - saved >= self.config.checkpoint_seconds:
                    checkpoint.save(self._snapshot())
                    saved = time.monotonic()
            self._close_epoch()
        self.optimizer.zero_grad()  # frees the gradients
        if self.report is not None and self.epoch < self.epochs.stop:
            total = self.steps.per_epoch * len(self.epochs)
            self.report(Progress(self._task(), total, total))  # stopped early: nothing is left to do
        if self.best is not None:
            self.retriever.load_trainable_state(self.best[2], partial=True)
        if checkpoint:
            checkpoint.save(self._snapshot())

    def _step(self, batches: Batches) -> None:
        started = time.perf_counter()
        count, steps = sum(len(batch) for batch in batches), self.steps.per_epoch
        step = self.epoch * steps + self.step_in_epoch
        factor = rate_factor(step, steps * self.settings.epochs, self.config.warmup)
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor
        loss = self.steps.gradients(batches, noise_source(self.seed, self.epoch, self.step_in_epoch))
        if self.steps.noise is not None:
            self.vitals.see_noised((parameter.grad for parameter in self.parameters.values()), self.steps.noise)
        self._pull_to_anchors()
        if self.privacy is None:
            self._bound_gradients()
            self._count_loss(loss, count)
        self.optimizer.step()
        self._see_step(batches)
        if self.held is not None:
            self.held.put_back()
        self.step_in_epoch += 1
        seconds = time.perf_counter() - started
        self.vitals.seconds += seconds
        if self.report is not None:
            done = step + 1 - self.epochs.start * steps
            epsilon = self.privacy.epsilon if self.privacy else None
            rate = count / seconds
            self.report(Progress(self._task(), done, steps * len(self.epochs), loss=loss, rate=rate, epsilon=epsilon))

    def _bound_gradients(self) -> None:
        if self.held is not None:
            self.held.drop_gradients()
        most = self.config.max_gradient_norm
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), math.inf if most is None else most)
        self.vitals.see_gradient(float(norm), most=most)

    def _see_step(self, batches: Batches) -> None:
        """Gather what tells a sound training from one that is not."""
        self.vitals.steps += 1
        if self.privacy is None:
            self.vitals.see_lengths(batches, self.inputs.lengths, self.retriever.encoder.device)
            if self.vitals.wants_decrease(self.step_in_epoch, self.steps.per_epoch):
                self.vitals.see_decrease(self.optimizer)

    def _count_loss(self, loss: float | None, count: int) -> None:
        if loss is None or not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss}")
        self.vitals.see_loss(loss, count)

    @torch.no_grad()
    def _pull_to_anchors(self) -> None:
        """Add the gradient of the proximal term."""
        for name, anchor in self.anchors.items():
            parameter = self.parameters[name]
            if parameter.grad is not None:
                parameter.grad.add_(parameter - anchor, alpha=self.proximal_mu)

    def _close_epoch(self) -> None:
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters.values()):
            raise self._diverged("a weight is no longer finite")
        recall, validation_loss = self._validate()
        private, padded = self.privacy is not None, self.stage == "adapter"
        found = self.vitals.close(queries=self.count, private=private, padded=padded)
        found |= {"validation_recall": recall, "validation_loss": validation_loss}
        epsilon = self.privacy.epsilon if self.privacy else None
        self.history.append(EpochRecord(self.stage, self.epoch, epsilon=epsilon, **found))
        if self.on_epoch is not None:
            self.on_epoch(self.history[-1])
        self._warn()
        if self.config.patience and recall is not None and (self.best is None or recall > self.best[0]):
            state = {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}
            self.best = (recall, self.epoch, state)
        self.epoch += 1
        self.step_in_epoch = 0

    @torch.no_grad()
    def _validate(self) -> tuple[float | None, float | None]:
        """Recall@1 and mean loss of the validation queries."""
        if not self.validation_gold:
            return None, None
        hits, loss = 0, 0.0
        for batch in epoch_batches(self.inputs.lengths[self.count :], _VALIDATION_BATCH, seed=0, epoch=0):
            scores = self.retriever.head(self.inputs.queries([self.count + index for index in batch]))
            gold = [self.validation_gold[index] for index in batch]
            hits += sum(row in own for row, own in zip(scores.argmax(dim=1).tolist(), gold, strict=True))
            loss += float(plain_loss(scores, gold).sum())
        return hits / len(self.validation_gold), loss / len(self.validation_gold)

    def _warn(self) -> None:
        """Tell of a rate that is too high as soon as it shows: nothing good comes of the rest of the training."""
        if self.report is None or self.warned or self.privacy is not None:
            return
        sizes = (len(self.retriever.catalogue), len(self.examples), len(self.validation_gold))
        course = Course(self.stage, self.history, self.config, PrivacyConfig(), *sizes)
        if (finding := rate_too_high(course)) is not None:
            self.warned = True
            total = self.steps.per_epoch * len(self.epochs)
            done = min(total, self.steps.per_epoch * (self.epoch + 1 - self.epochs.start))
            line = f"{finding.name}: {finding.evidence}; {finding.remedy} (--set {finding.settings[0]})"
            self.report(Progress(self._task(), done, total, warning=line))

    def _out_of_patience(self) -> bool:
        return self.best is not None and self.epoch - self.best[1] > self.config.patience

    def _task(self) -> str:
        return f"training the {self.stage}"

    def _diverged(self, what: str) -> TrainingError:
        settings, where = self.settings, f"training.{self.stage}"
        rates = f"{where}.learning_rate (now {settings.learning_rate})"
        if isinstance(settings, AdapterStageConfig):
            rates += f" or {where}.head_learning_rate (now {settings.head_learning_rate})"
        return TrainingError(f"{what} in epoch {self.epoch + 1} of the {self.stage} stage; lower {rates}")

    def _snapshot(self) -> Snapshot:
        tensors: dict[str, Tensor] = {f"parameter.{name}": parameter for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}/{key}"] = torch.as_tensor(value)
            if self.best is not None:
                tensors[f"best.{name}"] = self.best[2][name]
        values = {
            "part": self._part(),
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "vitals": asdict(self.vitals),
            "best": None if self.best is None else self.best[:2],
            "history": [asdict(record) for record in self.history],
            "privacy": None if self.privacy is None else self.privacy.state(),
        }
        return Snapshot(tensors, values)

    def _part(self) -> dict[str, Any]:
        """What a snapshot must be of to be taken up: the stage, the epochs and the form of what is trained."""
        shapes = {name: list(parameter.shape) for name, parameter in self.parameters.items()}
        return {"stage": self.stage, "epochs": [self.epochs.start, self.epochs.stop], "shapes": shapes}

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint, snapshot: Snapshot) -> None:
        """Stand where the snapshot stood.

        Raises:
            StorageError: it is of another stage, other epochs or another retriever.
        """
        values, tensors = snapshot.values, snapshot.tensors
        if values["part"] != self._part():
            (start, stop), stage = values["part"]["epochs"], values["part"]["stage"]
            raise checkpoint.refusal(
                f"it is of epochs {start} to {stop} of the {stage} stage, asked for are {self.epochs.start} to "
                f"{self.epochs.stop} of the {self.stage} stage, or the retriever is of another form"
            )
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
            prefix = f"optimizer.{name}/"
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if state:
                # Adam's step count is a number and stays on the CPU.
                self.optimizer.state[parameter] = {
                    key: value if value.ndim == 0 and key == "step" else value.to(parameter.device)
                    for key, value in state.items()
                }
        self.epoch, self.step_in_epoch = values["epoch"], values["step_in_epoch"]
        self.vitals = Vitals(**values["vitals"])
        if values["best"] is not None:
            self.best = (*values["best"], {name: tensors[f"best.{name}"] for name in self.parameters})
        self.history = [EpochRecord(**record) for record in values["history"]]
        if self.privacy is not None:
            self.privacy.restore(values["privacy"])
