"""Client-level privacy: the server clips each client's step and adds noise to their sum before it is the round's.

Flower has this too (`DifferentialPrivacyServerSideFixedClipping`), but draws its noise from NumPy's global Mersenne
twister, which 624 numbers give away; here it comes from the operating system.
"""

import math
from collections.abc import Iterable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from caravan.config import PrivacyConfig
from caravan.errors import FederationError
from caravan.federation.rounds import Update, update_norm
from caravan.training.accounting import Guarantee, Mechanism, default_delta, epsilon
from caravan.training.budget import noise_of
from caravan.training.noise import NoiseSource, SystemNoise, noised


class CentralNoise:
    """What a server does to a round's updates so that the result hides whether one client took part.

    Every client weighs the same: a weight of its own choice would let one of them change the sum by more than the clip.

    Attributes:
        clip: L2 norm at which a client's step is cut, all tensors together.
        sigma: noise multiplier.
        rounds: of the whole training, all stages together; each is a release.
        asked: clients a round, by which the sum is divided: who does not answer must not change it.
        delta: at which the guarantee is meant.
    """

    def __init__(
        self, config: PrivacyConfig, clients: int, rounds: int, asked: int, *, source: NoiseSource | None = None
    ) -> None:
        """Plan the noise of a training.

        Args:
            config: `clip`, and `epsilon` or `noise_multiplier`.
            clients: how many there are; those drawn for a round are not hidden, so that drawing amplifies nothing.
            rounds: of all stages.
            asked: clients a round.
            source: who draws; the operating system if None.

        Raises:
            PrivacyError: neither or both of epsilon and noise_multiplier are set, or the accountant is missing.
        """
        self.clip, self.rounds, self.asked = config.clip, max(1, rounds), asked
        self.delta = config.delta or default_delta(max(clients, 2))
        self.sigma = noise_of(config, self.delta, [(1.0, self.rounds)])
        self._source = source or SystemNoise()

    @cached_property
    def guarantee(self) -> Guarantee:
        """What the whole training is worth to each client."""
        return epsilon([Mechanism(1.0, self.sigma, self.rounds)], self.delta)

    def spent(self, rounds: int) -> float | None:
        """The epsilon of the first rounds, all stages together, a little too high; None where it is infinite."""
        found = epsilon([Mechanism(1.0, self.sigma, rounds)], self.delta, rough=True).epsilon
        return found if math.isfinite(found) else None

    def mean(self, updates: Iterable[Update], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Make the new global tensors: reference + (sum of clipped steps + noise) / asked.

        Args:
            updates: checked, of distinct clients.
            reference: the tensors the round began with.

        Raises:
            FederationError: there is no update.
        """
        sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in reference.items()}
        count = 0
        for update in updates:
            norm = update_norm(update, reference)
            weight = min(1.0, self.clip / norm) if norm else 1.0
            for name, total in sums.items():
                total += weight * (update.tensors[name].double() - reference[name].double())
            count += 1
        if not count:
            raise FederationError(
                "there is no update to average: every client failed or was refused; see their reasons"
            )
        std = self.sigma * self.clip
        return {
            name: (tensor.double() + noised(sums[name], std, self._source) / self.asked).to(tensor.dtype)
            for name, tensor in reference.items()
        }

    def statement(self) -> str:
        """What a reader of the saved retriever is told."""
        return (
            "Trained with differential privacy for each client as a whole (adding or removing one), against everybody "
            f"but the server, which sees each update before the noise: {self.guarantee}, noise multiplier "
            f"{self.sigma:.4g}, {self.rounds} rounds. Which clients took part in a round, document texts and settings "
            "are taken to be public."
        )
