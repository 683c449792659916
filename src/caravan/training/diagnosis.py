"""What ails a training, told from its epochs: small rules, each from evidence to a cause and what to change."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from caravan.config import PrivacyConfig, TrainingConfig
from caravan.training.vitals import EpochRecord


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        name: what it is, in a few words.
        evidence: what was seen, in figures.
        cause: what that most likely comes from.
        remedy: what to change and in which direction, the first thing to try first.
        settings: the same as `KEY=VALUE` for `--set`, in that order; none where it is no setting.
        severity: 3 spoils the result, 2 costs some of it, 1 wastes time or bytes.
    """

    name: str
    evidence: str
    cause: str
    remedy: str
    settings: tuple[str, ...]
    severity: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "settings": list(self.settings)}


@dataclass(frozen=True)
class Course:
    """One stage of a training as the rules look at it.

    Attributes:
        stage: "head" or "adapter".
        epochs: what was recorded of each, in order; of a federated training one a round, its clients taken together.
        training: settings of both stages.
        privacy: settings of privacy.
        documents: C, rows of the head.
        queries: trained on, of all clients; passages are not among them.
        validation: queries of validation.
        per_epoch: epochs that a record stands for.
    """

    stage: str
    epochs: Sequence[EpochRecord]
    training: TrainingConfig
    privacy: PrivacyConfig
    documents: int
    queries: int
    validation: int
    per_epoch: float = 1.0

    @property
    def settings(self) -> Any:
        """Those of the stage."""
        return getattr(self.training, self.stage)

    @property
    def rate(self) -> tuple[str, float]:
        """The stage's main learning rate: its setting and value."""
        return f"training.{self.stage}.learning_rate", self.settings.learning_rate

    @property
    def losses(self) -> list[float]:
        """Mean training loss of each epoch; none where it may not be known."""
        return [epoch.loss for epoch in self.epochs if epoch.loss is not None]

    @property
    def floor(self) -> float:
        """The least that the loss can be, nats: smoothed targets have an entropy of their own."""
        smoothing, count = self.settings.label_smoothing, self.documents
        if not smoothing or count < 2:
            return 0.0
        rest, gold = smoothing / count, 1 - smoothing + smoothing / count
        return -gold * math.log(gold) - (count - 1) * rest * math.log(rest)

    @property
    def start(self) -> float | None:
        """The loss that the stage began with; of its first step, or, where that is not known, of its first epoch."""
        first = self.epochs[0].first_loss if self.epochs else None
        return first if first is not None else next(iter(self.losses), None)

    @property
    def promised(self) -> float | None:
        """How far the loss would have fallen over all epochs if it were linear along each step, nats."""
        values = [epoch.predicted_decrease for epoch in self.epochs if epoch.predicted_decrease is not None]
        return math.fsum(values) if values else None


Rule = Callable[[Course], Finding | None]

# Steps promise in sum several times what the loss then falls by, since each promise is about its own batch: 10 to 20
# times in trainings here that went well. A promise of less than a tenth cannot be kept by more than that tenth.
_SLOW, _ENOUGH, _WILD = 0.1, 3.0, 50.0
_HARD_CUT = 10.0  # gradients ten times as long as they may be: for SGD, a rate ten times smaller
_ADAM_FEELS = 1e-4  # a clip that brings single numbers of a gradient near Adam's epsilon of 1e-8
_STILL_FALLING = 0.05  # of what is left, in the last epoch: half of it would go in another dozen
_VALIDATION_RISE = 0.25  # over its least: what confidence alone does to the loss of a sound head stays below a tenth
_NOISE_SHARE = 0.4  # of the way moved: 0.14 where a point of recall was lost, 0.65 and 1.0 where 7 and 15 were
_FAINT = 0.02  # gradients of a fiftieth of the clip: the noise is made for gradients fifty times as long
_PADDING = 0.5  # half of the work


def diagnose(course: Course) -> list[Finding]:
    """Apply every rule to one stage; worst first."""
    findings = [finding for rule in RULES if (finding := rule(course)) is not None]
    return sorted(findings, key=lambda finding: -finding.severity)


def rate_too_high(course: Course) -> Finding | None:
    """The loss rose above its start, or is still near it after steps that promised to lower it many times over."""
    losses, start, promised = course.losses, course.start, course.promised
    if start is None or not losses:
        return None
    above = start - course.floor
    # The start is one batch's loss, of queries of like length: in sound trainings here up to 0.3 nats below the rest's.
    rose = max(losses) > start + max(0.5 * above, 0.5)
    stuck = promised is not None and promised > _WILD * above > 0 and start - losses[-1] < 0.5 * above
    if not (rose or stuck):
        return None
    key, rate = course.rate
    evidence = f"the loss began at {start:.3g} and went up to {max(losses):.3g}; it ended at {losses[-1]:.3g}"
    if stuck and promised is not None:
        evidence += f"; by their gradients the steps should have lowered it by {promised:.3g}"
    return Finding(
        f"{course.stage}: the learning rate is too high",
        evidence,
        f"steps at {key} = {rate:g} go past the valley that their gradients point to",
        f"lower {key}, first to a tenth{_or_chosen(course)}",
        (f"{key}={rate / 10:g}",),
        3,
    )


def too_slow(course: Course) -> Finding | None:
    """All steps together promised next to nothing: too small a rate, or gradients that are cut too short."""
    losses, start, promised = course.losses, course.start, course.promised
    if start is None or promised is None or not losses:
        return None
    above = start - course.floor
    # A batch's first loss says little of where the mean began: what fell is told by epochs.
    if above < 0.05 or promised > _SLOW * above or losses[0] - losses[-1] > _SLOW * above:
        return None
    evidence = (
        f"the loss went from {losses[0]:.4g} to {losses[-1]:.4g}, with {course.floor:.3g} as the least possible; by "
        f"their gradients all steps together could lower it by {promised:.2g} at most"
    )
    return _cut_short(course, evidence) or _rate_too_low(course, evidence, above, promised)


def _rate_too_low(course: Course, evidence: str, above: float, promised: float) -> Finding:
    key, rate = course.rate
    # What is promised grows like the rate: as far as would make it a few times what there is to fall.
    factor = min(max(_ENOUGH * above / promised, 10.0), 1000.0) if promised > 0 else 1000.0
    better = float(f"{rate * factor:.1g}")
    return Finding(
        f"{course.stage}: the learning rate is too low",
        evidence,
        f"steps at {key} = {rate:g} are too short to get anywhere in {len(course.epochs) * course.per_epoch:g} epochs",
        f"raise {key}, first to {better:g}{_or_chosen(course)}",
        (f"{key}={better:g}",),
        3,
    )


def _or_chosen(course: Course) -> str:
    """The other remedy for a rate, where private queries are not to be looked at for it."""
    return ', or let it be chosen ("auto")' if course.privacy.mode == "none" else ""


def _cut_short(course: Course, evidence: str) -> Finding | None:
    most, training = course.training.max_gradient_norm, course.training
    norms = [epoch.gradient_norm for epoch in course.epochs if epoch.gradient_norm is not None]
    cut = [epoch.clipped for epoch in course.epochs if epoch.clipped is not None]
    if most is None or not norms or not cut or (training.optimizer == "adamw" and most > _ADAM_FEELS):
        return None  # Adam divides by the gradients' own size, so that a cut changes next to nothing
    norm, share = sum(norms) / len(norms), sum(cut) / len(cut)
    if share < 0.9 or norm < _HARD_CUT * most:
        return None
    return Finding(
        f"{course.stage}: nearly all gradients are cut",
        f"{share:.0%} of the steps were cut at {most:g}, and their gradients were {norm:.3g} long; {evidence}",
        f"training.max_gradient_norm = {most:g} leaves {most / norm:.1g} of each step",
        f"raise training.max_gradient_norm to about the usual length, {norm:.2g}",
        (f"training.max_gradient_norm={norm:.2g}",),
        3,
    )


def too_few_epochs(course: Course) -> Finding | None:
    """The loss, and that of validation, still falls in the last epoch, when the rate is next to nothing already."""
    losses = course.losses
    validation = [epoch.validation_loss for epoch in course.epochs if epoch.validation_loss is not None]
    start = course.start
    if len(losses) < 2 or start is None:
        return None
    left, step = losses[-1] - course.floor, losses[-2] - losses[-1]
    epochs = course.settings.epochs
    if step < _STILL_FALLING * course.per_epoch * left or losses[-1] > start:
        return None
    if len(validation) > 1 and validation[-1] > validation[-2] * (1 - _STILL_FALLING / 5):
        return None
    heard = f", that on validation from {validation[-2]:.3g} to {validation[-1]:.3g}" if len(validation) > 1 else ""
    key = f"training.{course.stage}.epochs"
    return Finding(
        f"{course.stage}: too few epochs",
        f"from the last epoch but one to the last the loss still fell from {losses[-2]:.3g} to {losses[-1]:.3g}{heard}",
        f"{key} = {epochs} ends before the training is done",
        f"raise {key}, first to three times as many",
        (f"{key}={3 * epochs}",),
        2,
    )


def over_fitting(course: Course) -> Finding | None:
    """The training loss falls on while validation has been getting worse for long."""
    seen = [epoch for epoch in course.epochs if epoch.validation_loss is not None and epoch.loss is not None]
    if len(seen) < 3:
        return None
    best = min(range(len(seen)), key=lambda place: seen[place].validation_loss or 0.0)
    then, last = seen[best], seen[-1]
    low, now = then.validation_loss or 0.0, last.validation_loss or 0.0
    # In nats as well: next to nothing may double without harm.
    if now < (1 + _VALIDATION_RISE) * low or now - low < 0.1 or (last.loss or 0.0) >= (then.loss or 0.0):
        return None
    each = course.queries / course.documents
    recalls = f", its recall@1 from {then.validation_recall:.1%} to {last.validation_recall:.1%}"
    where = f"training.{course.stage}"
    return Finding(
        f"{course.stage}: over-fitting",
        f"since epoch {best + 1} of {len(seen)} the loss fell from {then.loss:.3g} to {last.loss:.3g}, while that of "
        f"validation queries rose from {low:.3g} to {now:.3g}{recalls}",
        f"with {each:.3g} queries a document the {course.stage} learns them by heart",
        f"stop where validation is best (training.patience), or fewer {where}.epochs; then more dropout, "
        "label_smoothing and passages, or more queries a document",
        ("training.patience=2", f"{where}.dropout=0.3", f"{where}.label_smoothing=0.1"),
        2,
    )


def too_much_noise(course: Course) -> Finding | None:
    """Over the whole stage the noise goes a good part of the way that the gradients go."""
    seen = [epoch for epoch in course.epochs if epoch.noise_norm and epoch.gradient_norm]
    if not seen:
        return None
    privacy = course.privacy
    signal = math.sqrt(math.fsum((epoch.gradient_norm or 0.0) ** 2 for epoch in seen) / len(seen))
    noise = math.sqrt(math.fsum((epoch.noise_norm or 0.0) ** 2 for epoch in seen) / len(seen))
    batch = min(privacy.batch, course.queries)
    steps = len(seen) * course.per_epoch * max(1, round(course.queries / batch))
    share = noise / signal / math.sqrt(steps)  # noise adds up like the root of the steps, the signal like the steps
    if share < _NOISE_SHARE:
        return None
    first = seen[0].gradient_norm or 0.0
    evidence = (
        f"a step's noise is {noise / signal:.2g} times as long as the gradient it hides, and over {steps:.0f} steps "
        f"{share:.0%} of the way moved is noise"
    )
    if privacy.mode == "dp-sgd" and first < _FAINT * privacy.clip:
        lower = max(first * 5, privacy.clip / 100)
        return Finding(
            f"{course.stage}: the clip is too large",
            f"{evidence}; the mean gradient began at {first:.2g}, {first / privacy.clip:.1%} of privacy.clip",
            f"noise is made for gradients of length privacy.clip = {privacy.clip:g}, and they are far shorter",
            f"lower privacy.clip, first to {lower:.2g}, or let it follow the gradients: "
            'privacy.mode = "dp-sgd-adaptive"',
            (f"privacy.clip={lower:.2g}", "privacy.mode=dp-sgd-adaptive"),
            3,
        )
    change, settings = [], []
    if batch < course.queries / 2:
        change.append("raise privacy.batch: noise does not grow with it, the signal does")
        settings.append(f"privacy.batch={min(4 * batch, course.queries)}")
    if privacy.epsilon is not None:
        change.append("raise privacy.epsilon if a weaker promise will do")
        settings.append(f"privacy.epsilon={2 * privacy.epsilon:g}")
    elif privacy.noise_multiplier is not None:
        change.append("lower privacy.noise_multiplier if a weaker promise will do")
        settings.append(f"privacy.noise_multiplier={privacy.noise_multiplier / 2:g}")
    change.append("train fewer numbers (head.hidden = 0, a core adapter), or find more queries")
    return Finding(
        f"{course.stage}: noise drowns the gradients",
        evidence,
        f"{course.queries:,} queries, {course.queries / course.documents:.3g} a document, in batches of {batch:,} are "
        "too few to be hidden by this much noise and still be learned from",
        "; ".join(change),
        tuple(settings),
        3,
    )


def padding_waste(course: Course) -> Finding | None:
    """More than half of what is encoded is padding."""
    shares = [epoch.padding for epoch in course.epochs if epoch.padding is not None]
    if not shares or (share := sum(shares) / len(shares)) < _PADDING:
        return None
    size, accumulated = course.settings.batch_size, course.training.gradient_accumulation
    smaller = max(1, size // 4)
    longer = accumulated * size // smaller
    return Finding(
        f"{course.stage}: padding",
        f"{share:.0%} of the places that were encoded held no token",
        f"batches of {size} mix short texts and long ones",
        f"a smaller training.{course.stage}.batch_size with as much more training.gradient_accumulation: a step's "
        "queries are sorted by length before they are cut into batches; or a lower backbone.max_tokens",
        (f"training.{course.stage}.batch_size={smaller}", f"training.gradient_accumulation={longer}"),
        1,
    )


RULES: tuple[Rule, ...] = (
    rate_too_high,
    too_slow,
    too_few_epochs,
    over_fitting,
    too_much_noise,
    padding_waste,
)
