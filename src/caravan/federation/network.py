"""Flower's ServerApp and ClientApp between machines: who is connected, and the same rounds as in simulation."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from caravan.config import FederationConfig
from caravan.errors import FederationError
from caravan.federation.flower import client_app, import_flower
from caravan.federation.quorum import quorum
from caravan.federation.rounds import Update
from caravan.federation.server import OnRound, Server, ask_names, drive
from caravan.federation.strategies import Strategy

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid

_ROUND_SECONDS = 86400.0
_POLL_SECONDS = 0.5  # a node's process takes longer to start

_log = logging.getLogger(__name__)

Network = Any  # a flwr Grid, which only this package takes apart


def make_client_app(train_round: Callable[[Mapping[str, Any], Mapping[str, Any], dict[str, Tensor]], Update]) -> Any:
    """Make the ClientApp that a SuperNode starts for every message.

    Args:
        train_round: called with the node's own configuration, the server's words and the global tensors.
    """
    import_flower()

    def name_of(context: "Context") -> str:
        return str(context.node_config["name"])

    def train(context: "Context", words: Mapping[str, Any], received: dict[str, Tensor]) -> Update:
        return train_round(context.node_config, words, received)

    app: ClientApp = client_app(name_of, train)
    return app


def make_server_app(main: Callable[[Network, Mapping[str, Any]], None]) -> Any:
    """Make the ServerApp that a SuperLink starts for every run.

    Args:
        main: called with the network and the run's configuration.
    """
    import_flower()
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def run(grid: "Grid", context: "Context") -> None:
        main(grid, context.run_config)

    return app


def run_on_network(
    network: Network,
    initial: Mapping[str, Tensor],
    clients: Sequence[str],
    *,
    rounds: int,
    settings: FederationConfig,
    seed: int,
    first_round: int,
    strategy: Strategy,
    instructions: Mapping[str, str | int | float],
    connect_seconds: float,
    on_round: OnRound,
) -> dict[str, Tensor]:
    """Train on the nodes of a network; see `flower.run_federation`, which does the same on one machine.

    Args:
        network: what Flower gave to the ServerApp.
        initial: the global tensors to start from.
        clients: the nodes' names, distinct; their order decides each one's place.
        rounds: the last round's number, counted from 1.
        settings: without `round_seconds`, answers that take a day are not waited for.
        seed: of the draw of clients.
        first_round: where to go on.
        strategy: made of the same settings.
        instructions: told to every node with every round.
        connect_seconds: how long a round waits for nodes that are not connected before it begins without them.
        on_round: called after each round.

    Raises:
        ConfigError: no round of so many nodes could meet the settings.
        FederationError: a round had too few usable updates.
    """
    settings = replace(settings, round_seconds=settings.round_seconds or _ROUND_SECONDS)
    server = _NetworkServer(
        dict(initial),
        clients,
        settings,
        strategy,
        seed,
        first_round,
        on_round,
        instructions,
        connect_seconds=connect_seconds,
    )
    return server.run(rounds, lambda left: drive(server, network, left))


@dataclass
class _NetworkServer(Server):
    connect_seconds: float = 60.0
    known: dict[int, str] = field(default_factory=dict)  # node ids that have said their name
    strangers: set[str] = field(default_factory=set)
    absent: set[str] = field(default_factory=set)  # those a round has begun without are not waited for again

    def meet(self, grid: "Grid") -> dict[int, str]:
        deadline = time.monotonic() + self.connect_seconds
        needed, reason = quorum(self.settings)
        while True:
            nodes = self._connected(grid)
            missing = set(self.clients) - nodes.keys()
            enough = len(nodes) >= needed
            if (enough and missing <= self.absent) or time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
        self.absent = missing
        if not enough:
            raise FederationError(
                f"{len(nodes)} of {len(self.clients)} nodes are connected after {self.connect_seconds:g} seconds, "
                f"{reason} (missing: {', '.join(sorted(missing))}); start them and resume"
            )
        return {nodes[client]: client for client in self.clients if client in nodes}

    def _connected(self, grid: "Grid") -> dict[str, int]:
        """The clients that are connected: names to node ids."""
        infos = sorted(cast(Any, grid).get_nodes(), key=lambda info: info.last_activated_at)
        # A registered key has a name of the server's choosing; without keys, nodes are asked.
        nameless = [info.node_id for info in infos if not info.name and info.node_id not in self.known]
        if nameless:
            self.known.update(ask_names(grid, nameless, strict=False))
        # Of two with one name, as after a restart without keys, the later one counts.
        names = {info.name or self.known.get(info.node_id, ""): info.node_id for info in infos}
        for stranger in names.keys() - {*self.clients, *self.strangers, ""}:
            self.strangers.add(stranger)
            _log.warning("node %s is connected but not among deployment.nodes; it is not asked", stranger)
        return {name: node for name, node in names.items() if name in self.clients}
