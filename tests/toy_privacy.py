"""Private steps for tests: what they draw repeats, what they spend is written down."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from caravan.config import PrivacyConfig
from caravan.training.noise import NoiseSource, SeededNoise
from caravan.training.private import PrivateSteps, StepReport

HUGE = 1e9  # a clip that cuts nothing


def seeded(seed: int = 0) -> SeededNoise:
    return SeededNoise(torch.Generator().manual_seed(seed))


class Scripted:
    """A source whose first draws are given, and whose others are seeded."""

    def __init__(self, draws: Sequence[Sequence[float]]) -> None:
        self.draws = list(draws)
        self.rest = seeded()

    def uniforms(self, count: int) -> Tensor:
        if not self.draws:
            return self.rest.uniforms(count)
        numbers = torch.tensor(self.draws.pop(0), dtype=torch.float64)
        assert len(numbers) == count
        return numbers


def only(chosen: Sequence[int], count: int) -> list[float]:
    """Uniforms that draw the chosen units, at any rate below 0.999."""
    return [0.0 if number in chosen else 0.999 for number in range(count)]


class Spent:
    """Writes down what is spent, and with `most` refuses to spend more."""

    def __init__(self, most: int | None = None) -> None:
        self.steps: list[int] = []
        self.most = most

    def __call__(self, steps: int) -> None:
        if self.most is not None and sum(self.steps) + steps > self.most:
            raise OverspentError
        self.steps.append(steps)


class OverspentError(Exception):
    pass


def private_steps(
    *,
    sigma: float = 0.0,
    spend: Spent | None = None,
    source: NoiseSource | None = None,
    reports: list[StepReport] | None = None,
    **settings: Any,
) -> PrivateSteps:
    """Steps of "dp-sgd" that cut nothing and add nothing, unless told otherwise."""
    config = PrivacyConfig(**{"mode": "dp-sgd", "clip": HUGE, "batch": 99, **settings})
    diagnose = None if reports is None else reports.append
    return PrivateSteps(config, sigma, spend or Spent(), source=source or seeded(), diagnose=diagnose)
