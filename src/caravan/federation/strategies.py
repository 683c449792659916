"""How a round's usable updates become the new global tensors: our average, or Flower's strategies over them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from caravan.config import FederationConfig
from caravan.errors import FederationError
from caravan.federation.central_noise import CentralNoise
from caravan.federation.quorum import safe_selection
from caravan.federation.rounds import Update, average

if TYPE_CHECKING:
    from flwr.app import ArrayRecord
    from flwr.serverapp.strategy import FedAvg
    from numpy.typing import NDArray

_EXAMPLES = "num-examples"
_AVERAGES = ("fedavg", "fedprox")
_OPTIMIZERS = ("fedavgm", "fedadam", "fedyogi")
_RATES = {"fedavgm": 1.0, "fedadam": 0.01, "fedyogi": 0.01}  # reasons: config.FederationConfig


class Strategy:
    """One strategy of a server, with what it remembers from round to round.

    - fedavg, fedprox: `rounds.average`. What fedprox adds happens on the clients: see `proximal_mu`.
    - fedavgm, fedadam, fedyogi: Flower's server optimizers, which take the step from the global tensors to
      `rounds.average` for a gradient (arXiv:1909.06335; arXiv:2003.00295).
    - median, trimmed_mean (arXiv:1803.01498), krum, multi_krum (Blanchard et al., NeurIPS 2017), bulyan
      (arXiv:1802.07927): Flower's robust strategies. Example counts do not enter them: their proofs are about equal
      votes, and a count is a client's own claim, which would let one liar outvote the others.

    Flower computes in float64 here, and the result is rounded once: in float32 the distances of Krum drown in the
    tensors' own norms, and the step of FedAdam would change the dtype.

    Attributes:
        settings: of the federation.
        noise: makes the average private for each client as a whole; only for averages.
    """

    def __init__(self, settings: FederationConfig, noise: CentralNoise | None = None) -> None:
        self.settings, self.noise = settings, noise
        self._state: dict[str, Tensor] = {}

    def combine(self, number: int, updates: Iterable[Update], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Make the new global tensors of a round.

        Args:
            number: the round, counted over the whole training: FedAdam corrects its early rounds.
            updates: checked, of distinct clients, at least as many as `quorum.quorum` says, in any order. Averages take
                them one by one; the robust strategies need all at once.
            reference: the global tensors the round began with.

        Returns:
            Tensors with the names, shapes and dtypes of the reference.

        Raises:
            FederationError: a result is not finite.
        """
        trained_from = reference if self.settings.rows == "trained" else None
        if self.noise is not None:
            combined = self.noise.mean(updates, reference)
        elif self.settings.strategy in _AVERAGES:
            combined = average(updates, trained_from=trained_from)
        elif self.settings.strategy in _OPTIMIZERS:
            combined = self._optimize(number, average(updates, trained_from=trained_from), reference)
        else:
            ordered = sorted(updates, key=lambda update: update.client)
            arrays = _aggregate(
                self._robust(len(ordered)), number, [update.tensors for update in ordered], list(reference)
            )
            combined = _from_float64(arrays, reference)
        combined = {name: combined[name] for name in reference}
        for name, tensor in combined.items():
            if not bool(torch.isfinite(tensor).all()):
                raise FederationError(
                    f'round {number}: strategy = "{self.settings.strategy}" makes tensor {name} overflow; '
                    "set federation.max_update_norm"
                )
        return combined

    def state(self) -> dict[str, Tensor]:
        """Give what the strategy remembers: float64 tensors by name, none where there is nothing to remember."""
        return {name: tensor.clone() for name, tensor in self._state.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave after an earlier round of the same tensors and settings."""
        self._state = {name: tensor.clone() for name, tensor in state.items()}

    def _optimize(self, number: int, averaged: dict[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Let Flower's server optimizer go from the reference towards the average; its memory stays here."""
        from flwr.serverapp.strategy import FedAdam, FedAvgM, FedYogi

        settings = self.settings
        rate = settings.server_learning_rate or _RATES[settings.strategy]
        if settings.strategy == "fedavgm":
            flower = FedAvgM(server_learning_rate=rate, server_momentum=settings.server_momentum)
            flower.current_arrays = _in_float64(reference)
            if self._state:
                flower.momentum_vector = [self._state[f"momentum.{name}"].numpy() for name in reference]
            arrays = _aggregate(flower, number, [averaged], list(reference))
            if flower.momentum_vector is not None:
                memory = zip(reference, flower.momentum_vector, strict=True)
                self._state = {f"momentum.{name}": torch.as_tensor(vector).clone() for name, vector in memory}
            return _from_float64(arrays, reference)
        adaptive = (FedAdam if settings.strategy == "fedadam" else FedYogi)(
            eta=rate,
            beta_1=settings.server_momentum,
            beta_2=settings.server_second_momentum,
            tau=settings.server_adaptivity,
        )
        adaptive.current_arrays = {name: array.numpy() for name, array in _in_float64(reference).items()}
        if self._state:
            adaptive.m_t = {name: self._state[f"first_moment.{name}"].numpy() for name in reference}
            adaptive.v_t = {name: self._state[f"second_moment.{name}"].numpy() for name in reference}
        arrays = _aggregate(adaptive, number, [averaged], list(reference))
        memories = {"first_moment": adaptive.m_t or {}, "second_moment": adaptive.v_t or {}}
        self._state = {
            f"{memory}.{name}": torch.as_tensor(vector).clone()
            for memory, vectors in memories.items()
            for name, vector in vectors.items()
        }
        return _from_float64(arrays, reference)

    def _robust(self, updates: int) -> "FedAvg":
        from flwr.serverapp.strategy import Bulyan, FedMedian, FedTrimmedAvg, Krum, MultiKrum

        byzantine = self.settings.byzantine_clients
        match self.settings.strategy:
            case "median":
                return FedMedian()
            case "trimmed_mean":
                return FedTrimmedAvg(beta=self.settings.trimmed_share)
            case "krum":
                return Krum(num_malicious_nodes=byzantine)
            case "multi_krum":
                selected = safe_selection(self.settings, updates)
                return MultiKrum(num_malicious_nodes=byzantine, num_nodes_to_select=selected)
            case _:
                return Bulyan(num_malicious_nodes=byzantine)


def proximal_mu(settings: FederationConfig) -> float:
    """Give the coefficient that a client's local training (`fit`) needs: that of fedprox, else 0."""
    return settings.proximal_mu if settings.strategy == "fedprox" else 0.0


def _aggregate(
    strategy: "FedAvg", number: int, states: Sequence[Mapping[str, Tensor]], names: Sequence[str]
) -> "ArrayRecord":
    """Give checked tensors to a Flower strategy as replies of equal weight, all with the names in one order.

    Flower goes by position where it compares or subtracts, and a client or a snapshot may have another order.
    """
    from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict

    class LastingRecord(ArrayRecord):
        """A record that is not emptied: Bulyan would collect garbage after each, a second with torch loaded."""

        def to_numpy_ndarrays(self, *, keep_input: bool = True) -> "list[NDArray]":
            return super().to_numpy_ndarrays()

    replies = []
    for place, tensors in enumerate(states):
        arrays = LastingRecord(dict(_in_float64({name: tensors[name] for name in names}).items()))
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({_EXAMPLES: 1})})
        replies.append(Message(content, place + 1, MessageType.TRAIN))
    aggregated, _ = strategy.aggregate_train(number, replies)
    assert aggregated is not None  # None would mean too few replies: the quorum was checked before
    return aggregated


def _in_float64(tensors: Mapping[str, Tensor]) -> "ArrayRecord":
    from flwr.app import Array, ArrayRecord

    return ArrayRecord({name: Array(tensor.detach().cpu().double().numpy()) for name, tensor in tensors.items()})


def _from_float64(arrays: "ArrayRecord", reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(arrays[name].numpy()).to(like.dtype) for name, like in reference.items()}
