"""A private training thought through before it is run: how much noise, for which guarantee, and what would help."""

import math
from dataclasses import asdict, dataclass
from typing import Any, cast

from caravan.config import Config
from caravan.errors import PrivacyError
from caravan.training.accounting import Guarantee, Mechanism, default_delta, epsilon, epsilons, in_figures, noise_for

_MOST_RUNS = 1_000
_WEAK = 10.0  # e^10: what an attacker sees may be 22,000 times as likely with one example as without it


@dataclass(frozen=True)
class Plan:
    """What a private training comes to.

    Attributes:
        mechanism: its steps.
        guarantee: of them all.
        by_accountant: epsilon by PLD, RDP and PRV; None where one has no answer.
        numbers: d, how many numbers are trained, if that was said.
        noise_to_signal: L2 norm of a step's noise by the longest that a step's gradient can be; None without `numbers`.
        runs_within_cap: how often the training fits below the cap on the same data, at most 1,000; None without a cap.
        advice: what to think about, a sentence each.
    """

    mechanism: Mechanism
    guarantee: Guarantee
    by_accountant: dict[str, float | None]
    numbers: int | None
    noise_to_signal: float | None
    runs_within_cap: int | None
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, infinity as a word."""
        values = asdict(self) | {"by_accountant": {name: plain(value) for name, value in self.by_accountant.items()}}
        return values | {"guarantee": {**asdict(self.guarantee), "epsilon": plain(self.guarantee.epsilon)}}


def make_plan(
    examples: int,
    epochs: int,
    batch: int,
    *,
    target_epsilon: float | None = None,
    noise_multiplier: float | None = None,
    delta: float | None = None,
    numbers: int | None = None,
    cap: float | None = None,
) -> Plan:
    """Work out noise for an epsilon, or an epsilon for noise.

    Args:
        examples: n units (examples, or users), 2 or more.
        epochs: passes, each of n / batch steps.
        batch: units a step on average.
        target_epsilon: either this,
        noise_multiplier: or this.
        delta: n^-1.1 if None.
        numbers: d, how many numbers are trained.
        cap: the most that epsilon may come to over all trainings on the data.

    Raises:
        PrivacyError: a number is out of range, or the extra "private" is not installed.
    """
    if batch > examples:
        raise PrivacyError(f"batch = {batch:,} is more than the {examples:,} examples; a batch of all is the largest")
    delta = default_delta(examples) if delta is None else delta
    mechanism = _mechanism(examples, epochs, batch, noise_multiplier or 0.0)
    if target_epsilon is not None:
        least = noise_for(target_epsilon, delta, [(mechanism.sampling, mechanism.steps)])
        noise_multiplier = _four_figures_up(least)  # what is read off the screen is enough
        mechanism = _mechanism(examples, epochs, batch, noise_multiplier)
    guarantee = epsilon([mechanism], delta)
    ratio = None if numbers is None else noise_to_signal(mechanism, examples, numbers)
    runs = None if cap is None else _count_runs(mechanism, delta, cap)
    advice = [
        *_on_guarantee(guarantee, examples, cap, runs),
        *_on_signal(ratio, numbers),
        *_on_settings(mechanism, guarantee, examples, epochs, batch),
    ]
    return Plan(mechanism, guarantee, epsilons([mechanism], delta), numbers, ratio, runs, tuple(advice))


def noise_to_signal(mechanism: Mechanism, examples: int, numbers: int) -> float:
    """Give the length of a step's noise by the longest that its gradient can be: sigma sqrt(d) / (q n).

    Both are measured on the mean over the expected batch of q n, where each unit counts for at most the clipping norm.
    """
    return mechanism.noise_multiplier * math.sqrt(numbers) / (mechanism.sampling * examples)


def trained_numbers(config: Config, documents: int) -> int:
    """Count what is trained: head and adapter, or the head alone where the mode or the adapter's kind says so.

    Raises:
        BackboneError: there is no such backbone.
    """
    from caravan.app.payload import Method, Skeleton, head_shapes, part_shapes
    from caravan.model.source import read_skeleton

    skeleton = Skeleton.of(config.backbone.name, read_skeleton(config.backbone))
    shapes = list(head_shapes(skeleton, config.head, documents).values())
    if config.training.mode == "adapter" and config.adapter.kind != "none":
        shapes += part_shapes(cast(Method, config.adapter.kind), skeleton, config.adapter).values()
    return sum(map(math.prod, shapes))


def plain(value: float | None) -> float | str | None:
    """A number as JSON can hold it."""
    return "infinity" if value is not None and math.isinf(value) else value


def _mechanism(examples: int, epochs: int, batch: int, noise_multiplier: float) -> Mechanism:
    return Mechanism(batch / examples, noise_multiplier, epochs * max(1, round(examples / batch)))


def _four_figures_up(value: float) -> float:
    digits = 3 - math.floor(math.log10(value))
    return round(math.ceil(value * 10.0**digits) / 10.0**digits, max(digits, 0))


def _count_runs(mechanism: Mechanism, delta: float, cap: float) -> int:
    """How many trainings fit, one after the other."""

    def fit(count: int) -> bool:
        together = Mechanism(mechanism.sampling, mechanism.noise_multiplier, count * mechanism.steps)
        return epsilon([together], delta).epsilon <= cap

    low, high = 0, 1
    while high <= _MOST_RUNS and fit(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle <= _MOST_RUNS and fit(middle) else (low, middle)
    return low


def _on_guarantee(guarantee: Guarantee, examples: int, cap: float | None, runs: int | None) -> list[str]:
    advice = []
    if math.isinf(guarantee.epsilon):
        advice.append("Without noise nothing is guaranteed; give --epsilon, or a --sigma above 0.")
    elif guarantee.epsilon > _WEAK:
        advice.append("An epsilon above 10 promises next to nothing by itself; aim at 8 or less, better 1 to 3.")
    if guarantee.delta * examples >= 1:
        advice.append(
            f"delta = {guarantee.delta:.3g} allows one of {examples:,} examples to be published outright; take less "
            f"than {1 / examples:.2g}."
        )
    if runs == 0:
        advice.append(f"A ledger with the cap {cap:g} refuses this training before its last step.")
    elif runs is not None:
        times = f"{runs:,} or more times" if runs == _MOST_RUNS else "once" if runs == 1 else f"{runs:,} times"
        advice.append(f"Under the cap of {cap:g} it can be run {times} on the same data, tuning included.")
    return advice


def _on_signal(ratio: float | None, numbers: int | None) -> list[str]:
    if ratio is None or numbers is None or ratio <= 1:
        return []
    return [
        f"A step's noise is {ratio:.1f} times as long as its gradient can be; with a quarter of the {numbers:,} "
        "numbers (a core or lowrank adapter, head.hidden = 0) half as long."
    ]


def _on_settings(mechanism: Mechanism, guarantee: Guarantee, examples: int, epochs: int, batch: int) -> list[str]:
    """What other batches and epochs would come to at the same epsilon, as noise by expected batch: less is better."""
    if not 0 < guarantee.epsilon < math.inf:
        return []
    now = mechanism.noise_multiplier / batch

    def change(other_epochs: int, other_batch: int) -> tuple[float, float]:
        other = _mechanism(examples, other_epochs, other_batch, 0.0)
        noise = noise_for(guarantee.epsilon, guarantee.delta, [(other.sampling, other.steps)], rough=True)
        return noise, noise / other_batch / now

    advice = []
    for name, others in (
        ("A batch of {1:,}", (epochs, min(4 * batch, examples))),
        ("{0:,} epochs", (max(1, epochs // 2), batch)),
    ):
        if others != (epochs, batch):
            noise, share = change(*others)
            advice.append(
                f"{name.format(*others)} in place of {epochs if others[1] == batch else batch:,} needs sigma "
                f"{noise:.3g}, and a step's noise would be {share:.2f} times as long at the same epsilon "
                f"({in_figures(guarantee.epsilon)})."
            )
    return advice
