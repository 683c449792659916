"""How far a round's updates go, and how much of it they agree on: what a server can tell from what it is sent."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from caravan.federation.rounds import Update, update_norm


class Drift:
    """Watches a round's updates go by; keeps one sum of them, however many there are.

    Attributes:
        norms: L2 norm of each client's change, by name.
    """

    def __init__(self, start: Mapping[str, Tensor]) -> None:
        """Begin a round at its global tensors."""
        self._start = start
        self._sum = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
        self._weight, self._squares = 0.0, 0.0
        self.norms: dict[str, float] = {}

    def watch(self, updates: Iterable[Update]) -> Iterator[Update]:
        """Give updates on as they come."""
        for update in updates:
            norm = update_norm(update, self._start)
            self.norms[update.client] = norm
            self._weight += update.examples
            self._squares += update.examples * norm**2
            for name, total in self._sum.items():
                total.add_(update.tensors[name] - self._start[name], alpha=update.examples)
            yield update

    @property
    def agreement(self) -> float | None:
        """Squared length of the mean change by the mean squared length of changes, weighted by examples.

        1 where all clients make the same change, 1/n where n of equal weight and length go at right angles, below it
        where they undo each other (the inverse of the gradient diversity of arXiv:1706.05699, for whole updates). None
        of fewer than two changes.
        """
        if len(self.norms) < 2 or not self._squares:
            return None
        mean = sum(float(torch.linalg.vector_norm(total)) ** 2 for total in self._sum.values()) / self._weight**2
        return round(mean / (self._squares / self._weight), 6)  # the last bits depend on who answers first
