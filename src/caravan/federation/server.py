"""The server's side of a federated run: Flower's loop over rounds around our checks, quorum, strategies and codec."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from caravan.config import FederationConfig
from caravan.errors import FederationError
from caravan.federation.broadcast import Broadcast
from caravan.federation.codec import add
from caravan.federation.drift import Drift
from caravan.federation.messages import content_bytes, decode_answer, needs_whole_tensors
from caravan.federation.quorum import check_settings, quorum, sample, sample_again
from caravan.federation.rounds import Failure, RoundReport, Update, check_plan, judge, list_reasons, one_line
from caravan.federation.secure import secure_sum
from caravan.federation.strategies import Strategy

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
    from flwr.serverapp import Grid

_MESSAGE_SECONDS = 30 * 24 * 3600.0  # Flower drops a message after 12 hours, less than a long round on one machine
_CONNECT_SECONDS = 60.0  # virtual nodes register in milliseconds; stock Flower would wait for them forever

OnRound = Callable[[RoundReport, dict[str, Tensor]], None]


@dataclass
class _Round:
    """A round under way: who was asked, and what came back so far.

    Attributes:
        asked: clients in the order they were asked.
        waiting: those of the latest messages; to some of them only a change was sent.
        changed: these.
        lacking: those of them that say they cannot use it; they get whole tensors at once.
        used: example count and metrics of those whose updates are used.
        failures: why the others' are not, by client.
        retried: failures after which the round went on to another attempt.
        attempt: 0 at first.
        masked: messages of which secure aggregation makes its own.
        up: bytes that came, by client.
        down: bytes that were sent, by client.
    """

    number: int
    started: float
    asked: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    changed: set[str] = field(default_factory=set)
    lacking: list[str] = field(default_factory=list)
    used: dict[str, tuple[int, dict[str, float]]] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    retried: list[Failure] = field(default_factory=list)
    attempt: int = 0
    masked: "list[Message]" = field(default_factory=list)
    up: Counter[str] = field(default_factory=Counter)
    down: Counter[str] = field(default_factory=Counter)


@dataclass
class Server:
    """The server's side of one run: who is who, what came back, and the global tensors.

    Attributes:
        tensors: the global tensors; at first those to start from.
        clients: their names; the order decides each one's place.
        settings: of the federation.
        strategy: made of the same settings.
        seed: of the draw of clients and of rounding.
        first_round: where to go on.
        on_round: called after each round with its report and a copy of the global tensors.
        instructions: told to every client with every round.
        names: Flower's node ids of those that can be asked, and which client each is.
    """

    tensors: dict[str, Tensor]
    clients: Sequence[str]
    settings: FederationConfig
    strategy: Strategy
    seed: int
    first_round: int
    on_round: OnRound | None
    instructions: Mapping[str, str | int | float] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    round: _Round | None = None

    def __post_init__(self) -> None:
        self.tensors = {name: tensor.detach().cpu().clone() for name, tensor in self.tensors.items()}
        self.broadcast = Broadcast(self.tensors, self.settings, seed=self.seed)

    def run(self, rounds: int, carry_out: Callable[[int], None]) -> dict[str, Tensor]:
        """Go on to the last round.

        Args:
            rounds: its number, counted from 1.
            carry_out: has `drive` run so many rounds; not called where none is left.

        Returns:
            The global tensors after it, on the CPU.

        Raises:
            ConfigError: no round of so many clients could meet the settings.
            FederationError: an argument contradicts another, or a round had fewer usable updates than it needs.
        """
        check_plan(self.tensors, self.clients, rounds=rounds, first_round=self.first_round)
        check_settings(self.settings, len(self.clients))
        if left := rounds - self.first_round + 1:
            with quiet_flower():
                carry_out(left)
        return self.tensors

    def meet(self, grid: "Grid") -> dict[int, str]:
        """Who can be asked in the next round: node ids to clients, in the clients' order."""
        return self.names or _meet(grid, self.clients)

    @property
    def seconds(self) -> float:
        """How long the clients of a round have; what comes later is dropped, and what was not begun by then too."""
        return self.settings.round_seconds or _MESSAGE_SECONDS

    def open_round(self, server_round: int, grid: "Grid") -> list["Message"]:
        """Begin a round; give the messages that start it, in the clients' order."""
        self.names = self.meet(grid)
        number = self.first_round + server_round - 1
        self.round = _Round(number, time.perf_counter())
        messages = self._ask(self.round, sample(self.clients, self.settings, seed=self.seed, number=number))
        if self.settings.secure_aggregation:
            self.round.masked, messages = messages, []
        return messages

    def close_round(self, replies: Iterable["Message"], grid: "Grid") -> None:
        """Check what came back, ask again if it is too little, make the new global tensors, and report."""
        under_way, self.round = self.round, None
        assert under_way is not None
        updates, drift = self._usable(under_way, replies, grid), Drift(self.broadcast.start)
        told = self.strategy.noise is None and not self.settings.secure_aggregation
        watched = drift.watch(updates) if told else updates
        combined = self.strategy.combine(under_way.number, watched, self.broadcast.start)
        used = [client for client in self.clients if client in under_way.used]
        self.tensors = self.broadcast.advance(under_way.number, combined, used)
        were_asked = set(under_way.asked)
        asked = [client for client in self.clients if client in were_asked]
        report = RoundReport(
            round=under_way.number,
            asked=tuple(asked),
            clients=tuple(used),
            examples=tuple(under_way.used[client][0] for client in used),
            metrics=tuple(under_way.used[client][1] for client in used),
            failures=tuple(under_way.failures[client] for client in self.clients if client in under_way.failures),
            retried=tuple(under_way.retried),
            bytes_up=under_way.up.total(),
            bytes_down=under_way.down.total(),
            traffic={client: {"up": under_way.up[client], "down": under_way.down[client]} for client in asked},
            seconds=time.perf_counter() - under_way.started,
            norms=tuple(drift.norms[client] for client in used) if told else (),
            agreement=drift.agreement,
        )
        if self.on_round is not None:
            self.on_round(report, {name: tensor.clone() for name, tensor in self.tensors.items()})

    def _ask(self, under_way: _Round, clients: list[str]) -> list["Message"]:
        from flwr.app import ConfigRecord, Message, MessageType, RecordDict

        wanted, before = set(clients), set(under_way.asked)
        under_way.waiting, under_way.changed = clients, set()
        under_way.asked += [client for client in clients if client not in before]
        words = {**self.instructions, **self.broadcast.words(under_way.number), "round": under_way.number}
        if self.settings.max_examples is not None:
            words["max_examples"] = self.settings.max_examples  # what a masked weight is a share of
        places = {client: place for place, client in enumerate(self.clients)}
        messages = []
        for node, client in self.names.items():
            if client in wanted:
                arrays = self.broadcast.arrays_for(client)
                place = {"place": places[client], "clients": len(places)}
                content = RecordDict({**arrays, "config": ConfigRecord({**words, **place})})
                under_way.down[client] += content_bytes(content)
                if "change" in arrays:
                    under_way.changed.add(client)
                messages.append(Message(content, node, MessageType.TRAIN, ttl=self.seconds))
        return messages

    def _usable(self, under_way: _Round, replies: Iterable["Message"], grid: "Grid") -> Iterator[Update]:
        """Give the round's updates as they come; ask again where they are too few, and raise where they stay so."""
        if self.settings.secure_aggregation:
            yield self._summed(under_way, grid)
            return
        yield from self._answers(under_way, replies, grid)
        needed, reason = quorum(self.settings)
        while len(under_way.used) < needed:
            if under_way.attempt == self.settings.round_retries:
                raise self._missed(under_way, reason)
            messages = self._ask_again(under_way)
            yield from self._answers(under_way, grid.send_and_receive(messages, timeout=self.seconds), grid)

    def _summed(self, under_way: _Round, grid: "Grid") -> Update:
        """Have a round's updates summed under masks: what the server sees is their mean, as one update."""
        needed, reason = quorum(self.settings)
        start, most, messages = self.broadcast.start, self.settings.max_examples, under_way.masked
        assert most is not None  # `check_settings`
        while True:
            summed = secure_sum(grid, messages, start, number=under_way.number, max_examples=most, timeout=self.seconds)
            nodes = {client: node for node, client in self.names.items()}
            under_way.up.update({self.names[node]: count for node, count in summed.sent.items()})
            left = [client for client in under_way.waiting if nodes.get(client) not in summed.nodes]
            under_way.failures = {
                client: Failure(client, summed.failures.get(nodes.get(client, 0)) or self._silence(client, set(nodes)))
                for client in left
            }
            under_way.used = {client: (0, {}) for client in under_way.waiting if client not in under_way.failures}
            if summed.change is not None and len(under_way.used) >= needed:
                return Update("the sum", add(start, summed.change), 1)
            if under_way.attempt == self.settings.round_retries:
                raise self._missed(under_way, reason)
            under_way.attempt += 1
            under_way.retried += under_way.failures.values()
            messages = self._ask(under_way, under_way.waiting)

    def _answers(self, under_way: _Round, replies: Iterable["Message"], grid: "Grid") -> Iterator[Update]:
        """Give one attempt's updates; whoever could not use a change, as after a restart, gets whole tensors in it."""
        yield from self._take(under_way, replies)
        if under_way.lacking:
            clients, under_way.lacking = under_way.lacking, []
            messages = self._ask(under_way, clients)
            yield from self._take(under_way, grid.send_and_receive(messages, timeout=self.seconds))

    def _ask_again(self, under_way: _Round) -> list["Message"]:
        under_way.attempt += 1
        under_way.retried += [failure for failure in under_way.failures.values() if failure not in under_way.retried]
        clients = sample_again(
            self.clients,
            under_way.asked,
            under_way.failures,
            seed=self.seed,
            number=under_way.number,
            attempt=under_way.attempt,
        )
        return self._ask(under_way, clients)

    def _take(self, under_way: _Round, replies: Iterable["Message"]) -> Iterator[Update]:
        connected, waiting = set(self.names.values()), dict.fromkeys(under_way.waiting)
        codec, start = self.broadcast.codec, self.broadcast.start
        for reply in replies:
            client = self.names.get(reply.metadata.src_node_id, "")
            if client not in waiting:
                continue  # where a reply was lost on the way, Flower makes one that no client has sent
            del waiting[client]
            if reply.has_content():
                under_way.up[client] += content_bytes(reply.content)
            if client in under_way.changed and needs_whole_tensors(reply):
                under_way.lacking.append(client)
                continue
            verdict = judge(
                client,
                decode_answer(client, reply, codec, start),
                start,
                max_update_norm=self.settings.max_update_norm,
                max_examples=self.settings.max_examples,
            )
            if isinstance(verdict, Failure):
                under_way.failures[client] = verdict
                continue
            under_way.used[client] = (verdict.examples, verdict.metrics)
            under_way.failures.pop(client, None)
            yield verdict
        for client in waiting:
            under_way.failures[client] = Failure(client, self._silence(client, connected))

    def _silence(self, client: str, connected: set[str]) -> str:
        if client not in connected:
            return "it is not connected"
        if self.settings.round_seconds is not None:
            return f"it did not answer in round_seconds = {self.settings.round_seconds:g}"
        return "it did not answer"

    def _missed(self, under_way: _Round, reason: str) -> FederationError:
        attempts = f" in {under_way.attempt + 1} attempts" if under_way.attempt else ""
        failures = [under_way.failures[client] for client in self.clients if client in under_way.failures]
        return FederationError(
            f"round {under_way.number}: {len(under_way.used)} of {len(under_way.asked)} clients sent a usable "
            f"update{attempts}, {reason} ({list_reasons(failures)}); repair those clients or ask less of a round"
        )


def drive(server: Server, grid: "Grid", rounds: int) -> None:
    """Have Flower's loop run so many rounds; `server.tensors` are the result."""
    from flwr.app import ArrayRecord
    from flwr.serverapp.strategy import FedAvg

    class CheckedRounds(FedAvg):
        """Flower's loop over rounds, with our sampling, checks, quorum and strategies."""

        def configure_train(
            self, server_round: int, arrays: "ArrayRecord", config: "ConfigRecord", grid: "Grid"
        ) -> Iterable["Message"]:
            return server.open_round(server_round, grid)

        def aggregate_train(
            self, server_round: int, replies: Iterable["Message"]
        ) -> tuple["ArrayRecord | None", "MetricRecord | None"]:
            server.close_round(replies, grid)
            return None, None

    strategy = CheckedRounds(fraction_evaluate=0.0)  # the server validates in on_round; clients are not asked
    # The loop's own tensors are not looked at: what a client gets depends on what it holds.
    strategy.start(grid=grid, initial_arrays=ArrayRecord(), num_rounds=rounds, timeout=server.seconds)


def _meet(grid: "Grid", clients: Sequence[str]) -> dict[int, str]:
    """Ask every node which client it is: node ids to names, in the clients' order."""
    deadline = time.monotonic() + _CONNECT_SECONDS
    while len(nodes := sorted(grid.get_node_ids())) < len(clients):
        if time.monotonic() > deadline:
            raise FederationError(f"only {len(nodes)} of {len(clients)} nodes came up; start the run again")
        time.sleep(0.02)
    names = ask_names(grid, nodes)
    return dict(sorted(names.items(), key=lambda item: clients.index(item[1])))


def ask_names(grid: "Grid", nodes: Iterable[int], *, strict: bool = True) -> dict[int, str]:
    """Have nodes introduce themselves: node ids to the names they say.

    Raises:
        FederationError: one of them cannot start its client, and `strict` is set; otherwise it is left out.
    """
    from flwr.app import Message, MessageType, RecordDict

    questions = [Message(RecordDict(), node, MessageType.QUERY, ttl=_MESSAGE_SECONDS) for node in nodes]
    names: dict[int, str] = {}
    for reply in grid.send_and_receive(questions):
        if reply.has_error() and not strict:
            continue
        if reply.has_error():
            raise FederationError(f"a client's process does not start: {one_line(str(reply.error.reason))}; repair it")
        names[reply.metadata.src_node_id] = str(reply.content.config_records["config"]["client"])
    return names


@contextmanager
def quiet_flower() -> Iterator[None]:
    """Keep Flower's own log lines off the user's terminal; what matters of them is in the reports and errors."""
    logger = logging.getLogger("flwr")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
