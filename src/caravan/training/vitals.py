"""What an epoch shows of its own health, gathered while it is trained at next to no cost."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from caravan.model.encoder import places

_LOOKS = 8  # steps an epoch whose first-order decrease is worked out: a mean needs no more
_CHUNK = 1 << 20  # numbers at a time: 4 MiB, however large the head


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of a training. What depends on private queries without noise is None in a private one.

    Attributes:
        stage: "head" or "adapter".
        epoch: from 0.
        loss: mean training loss over the epoch's queries, nats, each as it was when its batch was trained on.
        validation_recall: share of validation queries whose first hit is gold, or None without validation.
        seconds: wall-clock time of the training steps.
        epsilon: what private trainings on the data have spent by the end of the epoch, rounded up a little; None of
            one that is not private.
        validation_loss: mean cross-entropy over validation queries, nats, without smoothing; None without validation.
        gradient_norm: root mean square over steps of the gradient's L2 norm before it is cut. Of a private training it
            is worked out from the noised gradients and the known length of the noise, which costs no privacy, and never
            below what can be told from nothing.
        noise_norm: expected L2 norm of a step's noise; None without noise.
        clipped: share of steps whose whole gradient was cut at `max_gradient_norm`.
        predicted_decrease: how far the loss would have fallen in the epoch if it were linear along each step: the sum
            of <gradient, step>, nats. The loss of a head alone is convex, so that its steps, each on its own batch,
            cannot have lowered it by more.
        first_loss: of the epoch's first step, nats: in epoch 0, from where the stage began.
        padding: share of the encoded places that held no token; None where nothing is encoded.
    """

    stage: str
    epoch: int
    loss: float | None
    validation_recall: float | None
    seconds: float
    epsilon: float | None = None
    validation_loss: float | None = None
    gradient_norm: float | None = None
    noise_norm: float | None = None
    clipped: float | None = None
    predicted_decrease: float | None = None
    padding: float | None = None
    first_loss: float | None = None

    def metrics(self) -> dict[str, float]:
        """Its numbers by name; what is None is left out."""
        values = asdict(self)
        return {name: values[name] for name in METRICS if values[name] is not None}


METRICS = ("loss", "first_loss", "seconds", "gradient_norm", "noise_norm", "clipped", "predicted_decrease", "padding")


@dataclass
class Vitals:
    """Sums over the steps of an epoch so far; plain numbers, so that a snapshot can keep them."""

    seconds: float = 0.0
    loss: float = 0.0
    steps: int = 0
    squares: float = 0.0
    noise: float = 0.0
    noise_spread: float = 0.0
    cut: int = 0
    shrunk: float = 1.0
    first_loss: float | None = None
    decrease: float = 0.0
    looks: int = 0
    tokens: int = 0
    places: int = 0

    def see_gradient(self, norm: float, *, most: float | None) -> None:
        """Count a step's gradient, of this L2 norm before it is cut at `most`."""
        self.squares += norm**2
        self.cut += most is not None and norm > most
        self.shrunk = 1.0 if most is None else max(1.0, norm / most)

    def see_loss(self, loss: float, count: int) -> None:
        """Count a step's mean loss over `count` queries."""
        self.loss += loss * count
        self.first_loss = loss if self.first_loss is None else self.first_loss

    def see_noised(self, gradients: Iterable[Tensor | None], std: float) -> None:
        """Count a step's noised gradient: its square has d std² more than that without noise, give or take √(2d) std².

        Args:
            gradients: of all parameters.
            std: standard deviation of the noise in each of their d numbers.
        """
        own = [each for each in gradients if each is not None]
        numbers = sum(each.numel() for each in own)
        self.squares += sum(float(torch.linalg.vector_norm(each, dtype=torch.float64)) ** 2 for each in own)
        self.noise += numbers * std**2
        self.noise_spread += 2 * numbers * std**4

    def see_lengths(self, batches: Sequence[Sequence[int]], lengths: Sequence[int], device: torch.device) -> None:
        """Count the tokens of a step's batches, and the places that are computed for them."""
        for batch in batches:
            own = [lengths[number] for number in batch]
            self.tokens += sum(own)
            self.places += places(own, device)

    def wants_decrease(self, step: int, steps: int) -> bool:
        """Whether a step of an epoch is one of the few to look at closely."""
        return step % max(1, steps // _LOOKS) == 0

    def see_decrease(self, optimizer: torch.optim.Optimizer) -> None:
        """Count what the optimizer's latest step promised, by the gradient as it was before it was cut."""
        self.decrease += self.shrunk * promised_decrease(optimizer)
        self.looks += 1

    def close(self, *, queries: int, private: bool, padded: bool) -> dict[str, Any]:
        """Give the numbers of an `EpochRecord` that were gathered here, and begin anew.

        Args:
            queries: of the epoch.
            private: whether the steps keep a guarantee.
            padded: whether lengths are those of texts.
        """
        steps, noisy = max(1, self.steps), self.noise > 0
        least = math.sqrt(self.noise_spread)  # nothing below it can be told from noise
        norm = math.sqrt(max(self.squares - self.noise, least) / steps)
        found = {
            "seconds": round(self.seconds, 3),
            "loss": None if private else self.loss / queries,
            "first_loss": None if private else self.first_loss,
            "gradient_norm": norm if noisy or not private else None,
            "noise_norm": math.sqrt(self.noise / steps) if noisy else None,
            "clipped": None if private else self.cut / steps,
            "predicted_decrease": None if private or not self.looks else self.decrease / self.looks * steps,
            "padding": 1 - self.tokens / self.places if padded and not private and self.places else None,
        }
        self.__init__()
        return found


@torch.no_grad()
def promised_decrease(optimizer: torch.optim.Optimizer) -> float:
    """Give <gradient, step> of the step just taken by AdamW or plain SGD, over all parameters, as they still are.

    With rate r, decay w and direction u (the gradient itself, or Adam's m / (√v + eps)) the step was r (u + w θ).
    """
    total = 0.0
    for group in optimizer.param_groups:
        rate, decay = float(group["lr"]), float(group["weight_decay"])
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = optimizer.state.get(parameter, {})
            kept = (parameter.grad, parameter, *(state[name] for name in ("exp_avg", "exp_avg_sq") if name in state))
            pieces = zip(*(each.detach().flatten().split(_CHUNK) for each in kept), strict=True)
            for gradient, now, *moments in pieces:
                direction = _direction(gradient, moments, group, state)
                before = (now + rate * direction) / (1 - rate * decay)
                total += rate * float(torch.dot(gradient, direction + decay * before))
    return total


def _direction(gradient: Tensor, moments: Sequence[Tensor], group: Mapping, state: Mapping) -> Tensor:
    if not moments:
        return gradient
    (first, second), steps = group["betas"], float(state["step"])
    mean, square = moments[0] / (1 - first**steps), moments[1] / (1 - second**steps)
    return mean / (square.sqrt() + group["eps"])


def round_metrics(records: Sequence[EpochRecord]) -> dict[str, float]:
    """Give one number a metric for a round's epochs, for whoever may know them.

    Seconds and predicted decrease are summed, the others averaged; `first_loss` is the first epoch's, and `last_loss`
    the mean loss of the last one.
    """
    kept = [record.metrics() for record in records]
    found = {}
    for name in METRICS:
        values = [each[name] for each in kept if name in each]
        if values:
            found[name] = math.fsum(values) / (1 if name in ("seconds", "predicted_decrease") else len(values))
    if "loss" in found:
        found |= {"first_loss": kept[0]["first_loss"], "last_loss": kept[-1]["loss"]}
    return found
