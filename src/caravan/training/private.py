"""How a training keeps a guarantee: what it says to whoever takes the steps, and which settings it refuses."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from caravan.config import AUTO, PrivacyConfig, TrainingConfig
from caravan.data.records import Example
from caravan.errors import PrivacyError
from caravan.model.head import FlatHead
from caravan.model.retriever import Retriever
from caravan.training.noise import NoiseSource, SystemNoise
from caravan.training.sampling import units_of

COUNT_NOISE = 20  # the noise on the count of unclipped units is the batch divided by this, as in arXiv:1905.03871
_NORMS_KEPT = 100  # of batches, mode "paper": enough for a 0.9 quantile


@dataclass(frozen=True)
class StepReport:
    """What one private step did; a statistic of private data, for the eyes of their owner only.

    Attributes:
        units: how many were drawn.
        clipped: how many of them had a gradient longer than `clip`.
        clip: L2 norm at which they were cut.
        noise_to_signal: expected L2 norm of the noise over that of what it was added to; infinity over nothing.
    """

    units: int
    clipped: int
    clip: float
    noise_to_signal: float


class PrivateSteps:
    """How a stage's steps keep a guarantee; kept from round to round in a federation, for the clip that it learns.

    Attributes:
        config: mode, unit, batch and the rest.
        sigma: noise multiplier of each step, everything that it reveals taken together.
        spend: told how many steps are about to be taken, before the first of them; what it raises stops the training
            with nothing of them revealed, what it returns becomes `epsilon`. Not called in mode "paper".
        source: who draws units and noise.
        clip: L2 norm at which the next step cuts; the mode decides whether it moves.
        epsilon: of all private trainings on the data, up to the end of the steps that `spend` was told of last, as it
            has found; None before the first, and where nothing is guaranteed.
        diagnose: told what each step did; it must not leave the machine.
    """

    def __init__(
        self,
        config: PrivacyConfig,
        sigma: float,
        spend: Callable[[int], float | None],
        *,
        source: NoiseSource | None = None,
        diagnose: Callable[[StepReport], None] | None = None,
    ) -> None:
        """Say how.

        Raises:
            PrivacyError: the mode is "none".
        """
        if config.mode == "none":
            raise PrivacyError('privacy.mode = "none" has no private steps; set it to "dp-sgd"')
        self.config, self.sigma, self.spend = config, sigma, spend
        self.source, self.diagnose = source or SystemNoise(), diagnose
        self.clip = config.clip
        self.epsilon: float | None = None
        self.norms: deque[float] = deque(maxlen=_NORMS_KEPT)

    def state(self) -> dict[str, Any]:
        """What a snapshot keeps."""
        return {"clip": self.clip, "norms": list(self.norms)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what a snapshot kept."""
        self.clip = float(state["clip"])
        self.norms = deque(state["norms"], maxlen=_NORMS_KEPT)

    def check(
        self,
        retriever: Retriever,
        examples: Sequence[Example],
        config: TrainingConfig,
        *,
        passages: bool,
    ) -> None:
        """Refuse what would say more about the examples than the noised gradients do.

        Raises:
            PrivacyError: a setting lets something by, the head has no closed form, an example names no user, or the
                batch is too small for an adaptive clip at this sigma.
        """
        refuse_automatic_rates(config)
        if config.class_weights != "none":
            raise PrivacyError(
                f'training.class_weights = "{config.class_weights}" counts the queries of each document; '
                'set it to "none" to train privately'
            )
        if config.patience and not self.config.public_validation:
            raise PrivacyError(
                f"training.patience = {config.patience} chooses an epoch by validation queries; set it to 0, or "
                "privacy.public_validation = true if these are nobody's"
            )
        if passages:
            raise PrivacyError("passages are public: train on them first, by themselves and without noise")
        if self.config.mode == "paper" and self.config.unit == "user":
            raise PrivacyError('privacy.mode = "paper" knows no users; set privacy.unit = "example"')
        if not isinstance(retriever.head, FlatHead):
            raise PrivacyError(f"a {type(retriever.head).__name__} cannot be trained privately; use a FlatHead")
        units = len(units_of(examples, self.config))
        if self.config.mode == "dp-sgd-adaptive":
            sum_noise(self.sigma, min(units, self.config.batch))


def refuse_automatic_rates(config: TrainingConfig) -> None:
    """Refuse rates that would be chosen by looking at the queries without noise, and say so for all to see.

    Not chosen on passages instead: noise and clipping decide which rate a private training needs, not curvature.

    Raises:
        PrivacyError: a rate is "auto".
    """
    rates = {
        "head.learning_rate": config.head.learning_rate,
        "adapter.learning_rate": config.adapter.learning_rate,
        "adapter.head_learning_rate": config.adapter.head_learning_rate,
    }
    for name, rate in rates.items():
        if rate == AUTO:
            raise PrivacyError(
                f'training.{name} = "auto" would be worked out from the queries\' gradients; set a number, or leave it '
                "out, to train privately"
            )


def sum_noise(sigma: float, batch: float) -> float:
    """Give the noise multiplier of the sum, so that sum and noised count together cost what sigma alone would.

    z = (sigma⁻² - (2 sigma_b)⁻²)^(-1/2), with sigma_b = batch / 20 on a count to which a unit adds ±1/2
    (arXiv:1905.03871, theorem 1).

    Args:
        sigma: noise multiplier of the pair.
        batch: expected units of a step.

    Raises:
        PrivacyError: the count alone costs that much.
    """
    count_noise = 2 * batch / COUNT_NOISE
    if sigma == 0:
        return 0.0
    if count_noise <= sigma:
        raise PrivacyError(
            f"an adaptive clip at sigma = {sigma:.3g} needs more than {sigma * COUNT_NOISE / 2:.0f} units a step, "
            f'got {batch:g}; raise privacy.batch or set privacy.mode = "dp-sgd"'
        )
    return (sigma**-2 - count_noise**-2) ** -0.5
