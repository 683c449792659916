"""Flower's ServerApp and ClientApp between machines: who is connected, and the same rounds as in simulation."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid

_ROUND_SECONDS = 86400.0
_POLL_SECONDS = 0.5  # a node's process takes longer to start
_LOOK_SECONDS = 1.0  # between two looks for answers; a round of work takes longer
_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError)  # what Flower raises on an answer that is none

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
    watched = cast(Any, _Watched(network))
    return server.run(rounds, lambda left: drive(server, watched, left))


@dataclass
class _Watched:
    """Flower's grid, whose waiting ends also for what can no longer come.

    A node that was started anew does not know of the message that went to its predecessor. Where the server has not
    looked in the meantime, Flower does not notice, and would wait for ever.
    """

    grid: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.grid, name)

    def send_and_receive(self, messages: "Iterable[Message]", *, timeout: float | None = None) -> "list[Message]":
        """Send messages and wait for the answers; see `flwr.serverapp.Grid`."""
        messages, replies = list(messages), []
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        starts = self._starts()
        nodes = [message.metadata.dst_node_id for message in messages]
        sent = self.grid.push_messages(messages)  # ids; none where they are too large for the server
        waiting = {question: node for question, node in zip(sent, nodes, strict=False) if question}
        while waiting and time.monotonic() < deadline:
            now = self._starts()  # before the look for answers, which its predecessor may have left
            for question, node in list(waiting.items()):
                answers = self._answers(question)
                replies += answers or []
                if answers != [] or now.get(node, starts.get(node)) != starts.get(node):
                    del waiting[question]
            if waiting:
                time.sleep(_LOOK_SECONDS)
        return replies

    def _answers(self, question: str) -> "list[Message] | None":
        try:
            return list(self.grid.pull_messages([question]))
        except _UNREADABLE:  # one node's answer must not end the run of the others
            return None

    def _starts(self) -> dict[int, str]:
        return {info.node_id: info.last_activated_at for info in self.grid.get_nodes()}


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
