"""Steps that keep a guarantee: units drawn by chance, clipped, summed and noised (DP-SGD; arXiv:1607.00133)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from caravan.data.records import Example
from caravan.training.clipping import by_unit, clip_weights, example_factors, joint_norms, weighted_sums
from caravan.training.noise import noised, secret_generator
from caravan.training.private import COUNT_NOISE, PrivateSteps, StepReport, sum_noise
from caravan.training.sampling import draw, physical_batches, sampling_rate, steps_per_epoch, units_of
from caravan.training.steps import Batches, Work


class NoisedSteps:
    """The steps of "dp-sgd" and "dp-sgd-adaptive": Poisson batches, each unit's gradient clipped, the sum noised.

    Attributes:
        per_epoch: steps that see each unit about once on average.
        noise: standard deviation of the noise in each number of the latest gradient: public, as clip and sigma are.
    """

    def __init__(self, work: Work, private: PrivateSteps, examples: Sequence[Example]) -> None:
        self.work, self.private = work, private
        self.units = units_of(examples, private.config)
        self.unit_of = {number: unit for unit, own in enumerate(self.units) for number in own}
        self.rate = sampling_rate(len(self.units), private.config.batch)
        self.expected = self.rate * len(self.units)
        self.per_epoch = steps_per_epoch(len(self.units), private.config.batch)
        self.adaptive = private.config.mode == "dp-sgd-adaptive"
        self.multiplier = sum_noise(private.sigma, self.expected) if self.adaptive else private.sigma
        self.noise: float | None = None

    def of_epoch(self, epoch: int, done: int) -> Sequence[Batches]:
        """Spend for the rest of an epoch's steps, and draw their batches: others at every call."""
        del epoch
        left = self.per_epoch - done
        if left:
            self.private.epsilon = self.private.spend(left)
        config, lengths = self.private.config, self.work.inputs.lengths
        most = 1 if config.unit == "example" else config.examples_per_user
        drawn = (draw(self.units, self.rate, most, self.private.source) for _ in range(left))
        return [physical_batches(units, lengths, self.work.batch_size) for units in drawn]

    def gradients(self, batches: Batches, dropout: torch.Generator) -> float | None:
        """Set `grad` to the noised sum of clipped gradients over the expected number of units.

        Args:
            batches: examples of the units drawn.
            dropout: not used, as its seed is known: see `secret_generator`.

        Returns:
            The mean loss of the examples, or None without any.
        """
        del dropout
        private, clip, masks = self.private, self.private.clip, secret_generator(self.private.source)
        total = _Total(self.work)
        norms = [
            total.add(batch, masks, clip=clip, units=[self.unit_of[number] for number in batch]) for batch in batches
        ]
        drawn, inside = sum(map(len, norms)), sum(int((each <= clip).sum()) for each in norms)
        total.write(self.multiplier * clip, self.expected, private)
        self.noise = self.multiplier * clip / self.expected
        total.tell(private, drawn, drawn - inside, clip, self.multiplier * clip)
        if self.adaptive:
            self._move_clip(inside, drawn)
        return total.mean_loss()

    def _move_clip(self, inside: int, drawn: int) -> None:
        """Follow the quantile: C ← C · exp(-η (b - γ)) with the noised share b of unclipped (arXiv:1905.03871)."""
        config = self.private.config
        std = self.expected / COUNT_NOISE if self.private.sigma else 0.0
        count = noised(torch.tensor(inside - drawn / 2, dtype=torch.float64), std, self.private.source)
        share = float(count) / self.expected + 0.5
        self.private.clip *= math.exp(-config.clip_rate * (share - config.quantile))


class PaperSteps:
    """The steps of "paper": shuffled batches, a clip that follows the norms unnoised, no noise in the warm-up.

    The clip is the moving average of a quantile of the norms seen: of a step's examples, or, where the mean gradient of
    a batch is what is cut, of the latest hundred batches. It is cut where the steps before have left it, at the start
    at `privacy.clip` (arXiv:2509.16508).

    Attributes:
        per_epoch: as without privacy.
        noise: None: it follows norms that are not noised.
    """

    def __init__(self, work: Work, private: PrivateSteps, accumulated: int) -> None:
        self.work, self.private, self.accumulated = work, private, accumulated
        self.per_epoch = -(-work.count // (work.batch_size * accumulated))
        self.warm = False
        self.noise: float | None = None

    def of_epoch(self, epoch: int, done: int) -> Sequence[Batches]:
        """Give the steps of an epoch but the first `done`, as without privacy."""
        self.warm = epoch < self.private.config.paper_warmup
        return self.work.shuffled(epoch, self.accumulated)[done:]

    def gradients(self, batches: Batches, dropout: torch.Generator) -> float | None:
        """Set `grad` to the clipped mean gradient, or the mean of clipped gradients, with noise after the warm-up."""
        private, config, clip = self.private, self.private.config, self.private.clip
        each = config.paper_clipping == "example"
        std = 0.0 if self.warm else config.paper_noise * clip
        total, count = _Total(self.work), sum(map(len, batches))
        norms = torch.cat([total.add(batch, dropout, clip=clip if each else None) for batch in batches])
        if not each:
            norms = total.shorten(clip, count).unsqueeze(0)
        total.write(std, count if each else 1, private)
        total.tell(private, count, int((norms > clip).sum()), clip, std)
        self._move_clip(norms, each)
        return total.mean_loss()

    def _move_clip(self, norms: Tensor, each: bool) -> None:
        config, private = self.private.config, self.private
        if not each:
            private.norms.extend(norms.tolist())
            norms = torch.tensor(list(private.norms), dtype=torch.float64)
        finite = norms[torch.isfinite(norms)]
        if len(finite):
            seen = float(finite.quantile(config.paper_quantile))
            private.clip = config.paper_decay * private.clip + (1 - config.paper_decay) * seen


class _Total:
    """A logical batch's sum, while it grows by physical batches."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.sums = {name: torch.zeros_like(parameter) for name, parameter in work.parameters.items()}
        self.loss, self.count = 0.0, 0

    def add(
        self, batch: Sequence[int], dropout: torch.Generator, *, clip: float | None, units: Sequence[int] | None = None
    ) -> Tensor:
        """Add the gradients of a batch's units, clipped unless `clip` is None; give their norms, float64 (U,)."""
        work = self.work
        traced = work.inputs.traced(batch, dropout)
        losses, factors = example_factors(
            work.retriever, traced, lambda scores: work.targets.losses(scores, batch, work.smoothing)
        )
        if units is not None and len(set(units)) < len(units):
            factors = by_unit(factors, units)
        factors = {name: factors[name] for name in self.sums}
        norms = joint_norms(factors)
        weights = torch.ones_like(norms) if clip is None else clip_weights(norms, clip)
        for name, total in weighted_sums(factors, weights).items():
            self.sums[name] += total
        self.loss += float(losses.sum())
        self.count += len(batch)
        return norms

    def shorten(self, clip: float, count: int) -> Tensor:
        """Make the sum a mean over `count`, cut at `clip`; give the norm before the cut, float64 ()."""
        norm = self.norm() / count
        weight = float(clip_weights(norm, clip)) / count
        self.sums = {name: torch.nan_to_num(total) * weight for name, total in self.sums.items()}
        return norm

    def norm(self) -> Tensor:
        """Give the L2 norm over all parameters together, float64 ()."""
        norms = [torch.linalg.vector_norm(total, dtype=torch.float64) for total in self.sums.values()]
        return torch.stack(norms).square().sum().sqrt()

    def write(self, std: float, count: float, private: PrivateSteps) -> None:
        """Set each parameter's `grad` to (sum + noise) / count."""
        for name, parameter in self.work.parameters.items():
            parameter.grad = noised(self.sums[name], std, private.source) / count

    def tell(self, private: PrivateSteps, units: int, clipped: int, clip: float, std: float) -> None:
        """Tell who asked what the step did."""
        if private.diagnose is None:
            return
        signal = float(self.norm())
        noise = std * sum(total.numel() for total in self.sums.values()) ** 0.5
        private.diagnose(StepReport(units, clipped, clip, noise / signal if signal else float("inf")))

    def mean_loss(self) -> float | None:
        """Give the mean loss over all examples added."""
        return self.loss / self.count if self.count else None
