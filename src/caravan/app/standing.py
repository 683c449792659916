"""Where the federation of one stage stands between two rounds, and which round of it is kept."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from caravan.training.checkpoint import Snapshot


@dataclass
class Standing:
    """All that the next round needs, and the best round so far.

    Attributes:
        tensors: the global tensors.
        rounds: one record a round.
        round: the last one's number; 0 before the first.
        server: what the strategy remembers.
        best: validation recall, number and tensors of the best round; None where the last one is kept.
    """

    tensors: dict[str, Tensor]
    rounds: list[dict[str, Any]] = field(default_factory=list)
    round: int = 0
    server: dict[str, Tensor] = field(default_factory=dict)
    best: tuple[float, int, dict[str, Tensor]] | None = None

    @property
    def kept(self) -> tuple[int, dict[str, Tensor]]:
        """Number and tensors of the round that is the stage's result."""
        return (self.round, self.tensors) if self.best is None else self.best[1:]

    def offer(self, recall: float) -> None:
        """Keep the round that just ended if it is the best so far; of equals the first stays."""
        if self.best is None or recall > self.best[0]:
            self.best = (recall, self.round, self.tensors)

    def snapshot(self) -> Snapshot:
        """Give what `from_snapshot` reads."""
        earlier = self.best is not None and self.best[1] != self.round  # else the best tensors are the global ones
        groups = {"global": self.tensors, "server": self.server, "best": self.best[2] if self.best and earlier else {}}
        tensors = {f"{group}.{name}": tensor for group, named in groups.items() for name, tensor in named.items()}
        best = None if self.best is None else self.best[:2]
        return Snapshot(tensors, {"round": self.round, "rounds": self.rounds, "best": best})

    @classmethod
    def from_snapshot(cls, snapshot: Snapshot) -> "Standing":
        """Stand where the snapshot stood."""
        groups: dict[str, dict[str, Tensor]] = {"global": {}, "server": {}, "best": {}}
        for name, tensor in snapshot.tensors.items():
            group, _, own = name.partition(".")
            groups[group][own] = tensor
        values = snapshot.values
        best = None if values["best"] is None else (*values["best"], groups["best"] or groups["global"])
        return cls(groups["global"], values["rounds"], values["round"], groups["server"], best)
