"""What one owner's data may be used for: how much noise a training needs, and the ledger that it is written into."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from caravan.config import PrivacyConfig
from caravan.data.records import Example
from caravan.errors import PrivacyError
from caravan.training.accounting import (
    Guarantee,
    Mechanism,
    PaperGuarantee,
    default_delta,
    epsilon,
    in_figures,
    noise_for,
    paper_guarantee,
)
from caravan.training.ledger import Ledger, default_folder, identify
from caravan.training.private import PrivateSteps
from caravan.training.sampling import sampling_rate, steps_per_epoch, units_of


@dataclass(frozen=True)
class Plan:
    """The noised steps of a whole training on one owner's data.

    Attributes:
        sampling: chance of a unit to be in a step.
        sigma: noise multiplier of each step.
        steps: by stage; a stage without any is left out.
        delta: at which the guarantee is meant.
    """

    sampling: float
    sigma: float
    steps: Mapping[str, int]
    delta: float

    @property
    def mechanisms(self) -> list[Mechanism]:
        """The steps as the accountant takes them."""
        return [Mechanism(self.sampling, self.sigma, steps) for steps in self.steps.values()]

    @cached_property
    def guarantee(self) -> Guarantee:
        """What the whole of it is worth."""
        return epsilon(self.mechanisms, self.delta)


class Budget:
    """One owner's examples, the plan of a training on them, and the ledger of all trainings on them.

    Attributes:
        config: the settings of privacy.
        plan: of this training; in mode "paper" with the paper's noise.
        ledger: where steps are announced before they are taken; those of mode "paper" as having no noise, so that no
            cap holds on the data any more.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        config: PrivacyConfig,
        epochs: Mapping[str, int],
        *,
        folder: str | Path | None = None,
        run: str = "",
        part: str = "",
        paper_batch: Mapping[str, int] | None = None,
    ) -> None:
        """Plan a training, and refuse one that the cap would stop.

        Args:
            examples: the owner's queries.
            config: mode, noise or epsilon, batch, unit, cap.
            epochs: passes over the queries by stage; a stage that is not trained is left out or has 0.
            folder: of the ledger; the user's own if None, see `ledger.default_folder`.
            run: see `Ledger`; needed where one run plays several owners.
            part: the owner's name in that run.
            paper_batch: mode "paper": examples a step by stage.

        Raises:
            PrivacyError: there is no example, neither or both of epsilon and noise_multiplier are set, the cap leaves
                too little, or an accountant is missing.
        """
        if not examples:
            raise PrivacyError("there are no training queries to keep private; give at least one")
        self.config, self.epochs = config, {stage: count for stage, count in epochs.items() if count}
        units = len(units_of(examples, config))
        delta = config.delta or default_delta(max(units, 2))
        self._steps: dict[str, PrivateSteps] = {}
        if config.mode == "paper":
            self.plan = _paper_plan(config, units, self.epochs, paper_batch or {}, delta)
        else:
            self.plan = _accounted_plan(config, units, self.epochs, delta)
        column = config.user_column if config.unit == "user" else None
        self.ledger = Ledger.open(folder or default_folder(), identify(examples, column), run=run, part=part)

    def check(self, stages: Sequence[str]) -> None:
        """Refuse the steps of stages that are still to come if they would cross the cap, before any is taken.

        Raises:
            PrivacyError: they would.
        """
        cap = self.config.epsilon_cap
        if cap is None:
            return
        plan, sigma = self.plan, self._announced_sigma
        ahead = [Mechanism(plan.sampling, sigma, plan.steps[stage]) for stage in stages if stage in plan.steps]
        after = epsilon([*self.ledger.spent(), *ahead], plan.delta)
        if not after.epsilon <= cap:
            so_far = in_figures(self.ledger.guarantee(plan.delta).epsilon)
            raise PrivacyError(
                f"this training would bring epsilon from {so_far} to {in_figures(after.epsilon)} at delta = "
                f"{plan.delta:.3g}, and privacy.epsilon_cap is {cap:g}; nothing was done: lower privacy.epsilon"
            )

    def steps(self, stage: str) -> PrivateSteps:
        """How the steps of a stage are to be taken; the same object each time, since an adaptive clip moves in it."""
        if stage not in self._steps:

            def spend(count: int) -> float | None:
                plan = self.plan
                mechanism = Mechanism(plan.sampling, self._announced_sigma, count)
                self.ledger.reserve(mechanism, cap=self.config.epsilon_cap, delta=plan.delta, stage=stage)
                so_far = epsilon(self.ledger.spent(), plan.delta, rough=True).epsilon
                return so_far if math.isfinite(so_far) else None

            self._steps[stage] = PrivateSteps(self.config, self.plan.sigma, spend)
            if self.config.mode == "paper" and stage in self.plan.steps:
                spend(self.plan.steps[stage])  # its steps ask for no leave
        return self._steps[stage]

    @property
    def spent(self) -> float | None:
        """The epsilon of all private trainings on the data, as it was found when steps were last announced here."""
        return max((own.epsilon for own in self._steps.values() if own.epsilon is not None), default=None)

    @property
    def _announced_sigma(self) -> float:
        """The noise that the ledger is told of: none where none can be accounted for."""
        return 0.0 if self.config.mode == "paper" else self.plan.sigma

    def paper(self) -> PaperGuarantee:
        """What can be proved of mode "paper", and what its noise would be worth where each step is accounted for."""
        plan, config = self.plan, self.config
        total = sum(plan.steps.values())
        warm = sum(
            count * min(config.paper_warmup, self.epochs[stage]) // self.epochs[stage]
            for stage, count in plan.steps.items()
        )
        return paper_guarantee(
            Mechanism(plan.sampling, plan.sigma, max(1, total - warm)),
            plan.delta,
            noise_free_steps=warm,
            clipping=config.paper_clipping,
        )

    def spent_metrics(self) -> dict[str, float]:
        """The epsilon of all private trainings on the data, for whoever its owner lets know; none if it is infinite."""
        found = self.ledger.guarantee(self.plan.delta).epsilon
        return {"epsilon": found} if math.isfinite(found) else {}

    def facts(self) -> dict[str, Any]:
        """What is saved of it: plain values without private statistics; an epsilon that is infinite is None."""
        config, plan = self.config, self.plan
        facts: dict[str, Any] = {
            "mode": config.mode,
            "unit": config.unit,
            "delta": plan.delta,
            "noise_multiplier": plan.sigma,
            "sampling": plan.sampling,
            "steps": dict(plan.steps),
        }
        if config.mode == "paper":
            found = self.paper()
            reasons, accounted = list(found.reasons), as_values(found.accounted)
            return facts | {**as_values(found.proved), "reasons": reasons, "accounted": accounted}
        facts |= {"clip": config.clip, "batch": config.batch, **as_values(plan.guarantee)}
        return facts | {"all_runs": as_values(self.ledger.guarantee(plan.delta))}

    def statement(self) -> str:
        """What a reader of the saved retriever is told."""
        if self.config.mode == "paper":
            return (
                "Trained with the clipping and noise of arXiv:2509.16508, which is no guarantee: "
                f"{self.paper()} Keep the tensors as private as the queries."
            )
        plan, ledger = self.plan, self.ledger
        who = "query" if self.config.unit == "example" else "user's queries together"
        steps = " and ".join(f"{count:,} {stage}" for stage, count in plan.steps.items())
        return (
            f"Trained with differential privacy for each training {who} ({self.config.mode}, adding or removing one): "
            f"{plan.guarantee}, noise multiplier {plan.sigma:.4g}, sampling {plan.sampling:.4g}, {steps} steps. "
            f"With all other private trainings on the same data: {ledger.guarantee(plan.delta)}. Document texts, "
            "settings and the number of queries are taken to be public; validation and test queries are not protected."
        )


def as_values(guarantee: Guarantee) -> dict[str, Any]:
    """A guarantee as JSON holds it: infinity is None."""
    value = guarantee.epsilon
    shown = value if math.isfinite(value) else None
    return {"epsilon": shown, "delta": guarantee.delta, "accountant": guarantee.accountant}


def _paper_plan(
    config: PrivacyConfig, units: int, epochs: Mapping[str, int], sizes: Mapping[str, int], delta: float
) -> Plan:
    steps = {stage: count * math.ceil(units / sizes[stage]) for stage, count in epochs.items() if stage in sizes}
    share = max((min(1.0, size / units) for size in sizes.values()), default=1.0)
    return Plan(share, config.paper_noise, steps, delta)


def _accounted_plan(config: PrivacyConfig, units: int, epochs: Mapping[str, int], delta: float) -> Plan:
    sampling, per_epoch = sampling_rate(units, config.batch), steps_per_epoch(units, config.batch)
    steps = {stage: count * per_epoch for stage, count in epochs.items()}
    sigma = noise_of(config, delta, [(sampling, count) for count in steps.values()])
    return Plan(sampling, sigma, steps, delta)


def noise_of(config: PrivacyConfig, delta: float, plan: Sequence[tuple[float, int]]) -> float:
    """Give the noise multiplier that is set, or the least that keeps a plan within the epsilon that is set.

    Args:
        config: one of `epsilon` and `noise_multiplier`.
        delta: in (0, 1).
        plan: (sampling, steps) pairs; without any no noise is needed.

    Raises:
        PrivacyError: neither or both are set, or the accountant is missing.
    """
    if (config.epsilon is None) == (config.noise_multiplier is None):
        both = "both are" if config.epsilon is not None else "neither is"
        raise PrivacyError(
            f'privacy.mode = "{config.mode}" needs privacy.epsilon or privacy.noise_multiplier, and {both} set; '
            "set one of them, for example privacy.epsilon = 8"
        )
    if config.noise_multiplier is not None:
        return config.noise_multiplier
    return noise_for(config.epsilon or math.inf, delta, plan) if plan else 0.0
