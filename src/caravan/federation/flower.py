"""A federated run on Flower: its ServerApp, ClientApp and round loop around `rounds`, `quorum` and `strategies`."""

import importlib
import importlib.util
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from caravan.config import FederationConfig
from caravan.errors import FederationError
from caravan.federation.messages import content_bytes, decode, decode_answer, encode, encode_update, pack_update
from caravan.federation.quorum import check_settings, quorum, sample, sample_again
from caravan.federation.rounds import Failure, RoundReport, Update, check_plan, judge, list_reasons, one_line
from caravan.federation.simulation import run_in_process, run_on_ray
from caravan.federation.strategies import Strategy

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp

__all__ = ["Failure", "RoundReport", "run_federation"]

_MESSAGE_SECONDS = 30 * 24 * 3600.0  # Flower drops a message after 12 hours, less than a long round on one machine
_CONNECT_SECONDS = 60.0  # virtual nodes register in milliseconds; stock Flower would wait for them forever

_log = logging.getLogger(__name__)

LocalTrain = Callable[[str, dict[str, Tensor], int], Update]
OnRound = Callable[[RoundReport, dict[str, Tensor]], None]


def run_federation(
    initial: Mapping[str, Tensor],
    clients: Sequence[str],
    local_train: LocalTrain,
    *,
    rounds: int,
    settings: FederationConfig | None = None,
    seed: int = 0,
    first_round: int = 1,
    strategy: Strategy | None = None,
    on_round: OnRound | None = None,
) -> dict[str, Tensor]:
    """Train on clients that keep their data, round by round, and join what they send (FedAvg; arXiv:1602.05629).

    A client that raises, or whose update `rounds.check` refuses, is reported and the round goes on with the others. A
    round that misses its quorum keeps what it has and asks again, `settings.round_retries` times.

    Args:
        initial: the global tensors to start from: float64, float32 or float16, on any device, finite.
        clients: their names, distinct; Flower's partition i is `clients[i]`.
        local_train: called with a client's name, its own CPU copy of the global tensors and the round (1 is the first);
            returns the client's update. With the backend "ray" it runs in other processes and must be picklable.
        rounds: the last round's number, counted from 1; `settings.rounds` is not looked at.
        settings: the defaults if None. Those of the partition are not looked at.
        seed: of the draw of clients, where `settings.clients_per_round` asks for one.
        first_round: where to go on, with `initial` as it stood after the round before; `rounds + 1` has nothing to do.
        strategy: made of the same settings, for callers that read its state in `on_round` or have restored it.
        on_round: called after each round with its report and a copy of the new global tensors; what it raises ends the
            run.

    Returns:
        The global tensors after the last round, on the CPU.

    Raises:
        ConfigError: no round of so many clients could meet the settings.
        FederationError: an argument contradicts another, Flower or Ray is missing, or a round had fewer usable updates
            than it needs (the message lists every client's reason).
    """
    settings = settings or FederationConfig()
    strategy = strategy or Strategy(settings)
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in initial.items()}
    check_plan(tensors, clients, rounds=rounds, first_round=first_round)
    check_settings(settings, len(clients))
    if first_round > rounds:
        return tensors
    import_flower(settings.backend)
    with quiet_flower():
        server = Server(tensors, clients, settings, strategy, seed, first_round, on_round)
        run = run_in_process if settings.backend == "inprocess" else run_on_ray
        run(_server_app(server, rounds - first_round + 1), _client_app(tuple(clients), local_train), len(clients))
    return server.tensors


@dataclass
class _Round:
    """A round under way: who was asked, and what came back so far.

    Attributes:
        arrays: the global tensors, which every client gets.
        asked: clients in the order they were asked.
        waiting: those of the latest attempt.
        used: example count and metrics of those whose updates are used.
        failures: why the others' are not, by client.
        retried: failures after which the round went on to another attempt.
        attempt: 0 at first.
    """

    number: int
    arrays: "ArrayRecord"
    started: float
    asked: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    used: dict[str, tuple[int, dict[str, float]]] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    retried: list[Failure] = field(default_factory=list)
    attempt: int = 0
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass
class Server:
    """The server's side of one run: who is who, what came back, and the global tensors."""

    tensors: dict[str, Tensor]
    clients: Sequence[str]
    settings: FederationConfig
    strategy: Strategy
    seed: int
    first_round: int
    on_round: OnRound | None
    instructions: Mapping[str, str | int | float] = field(default_factory=dict)  # told to every client with every round
    names: dict[int, str] = field(default_factory=dict)  # Flower's node id -> client
    round: _Round | None = None

    def meet(self, grid: "Grid") -> dict[int, str]:
        """Who can be asked in the next round: node ids to clients, in the clients' order."""
        return self.names or _meet(grid, self.clients)

    @property
    def seconds(self) -> float:
        """How long the clients of a round have; what comes later is dropped, and what was not begun by then too."""
        return self.settings.round_seconds or _MESSAGE_SECONDS

    def open_round(self, server_round: int, arrays: "ArrayRecord", grid: "Grid") -> list["Message"]:
        """Begin a round; give the messages that start it, in the clients' order."""
        self.names = self.meet(grid)
        number = self.first_round + server_round - 1
        self.round = _Round(number, arrays, time.perf_counter())
        return self._ask(self.round, sample(self.clients, self.settings, seed=self.seed, number=number))

    def close_round(self, replies: Iterable["Message"], grid: "Grid") -> "ArrayRecord":
        """Check what came back, ask again if it is too little, report it, and return the new global tensors."""
        under_way, self.round = self.round, None
        assert under_way is not None
        self.tensors = self.strategy.combine(under_way.number, self._usable(under_way, replies, grid), self.tensors)
        used = [client for client in self.clients if client in under_way.used]
        arrays = encode(self.tensors)
        report = RoundReport(
            round=under_way.number,
            asked=tuple(client for client in self.clients if client in under_way.asked),
            clients=tuple(used),
            examples=tuple(under_way.used[client][0] for client in used),
            metrics=tuple(under_way.used[client][1] for client in used),
            failures=tuple(under_way.failures[client] for client in self.clients if client in under_way.failures),
            retried=tuple(under_way.retried),
            bytes_up=under_way.bytes_up,
            bytes_down=under_way.bytes_down,
            seconds=time.perf_counter() - under_way.started,
        )
        if self.on_round is not None:
            self.on_round(report, {name: tensor.clone() for name, tensor in self.tensors.items()})
        return arrays

    def _ask(self, under_way: _Round, clients: list[str]) -> list["Message"]:
        from flwr.app import ConfigRecord, Message, MessageType, RecordDict

        wanted, before = set(clients), set(under_way.asked)
        under_way.waiting = clients
        under_way.asked += [client for client in clients if client not in before]
        packing = {"codec": self.settings.codec, "seed": self.seed}
        places = {client: place for place, client in enumerate(self.clients)}
        messages = []
        for node, client in self.names.items():
            if client in wanted:
                place = {"place": places[client], "clients": len(places)}
                words = ConfigRecord({**self.instructions, **place, **packing, "round": under_way.number})
                content = RecordDict({"arrays": under_way.arrays, "config": words})
                under_way.bytes_down += content_bytes(content)
                messages.append(Message(content, node, MessageType.TRAIN, ttl=self.seconds))
        return messages

    def _usable(self, under_way: _Round, replies: Iterable["Message"], grid: "Grid") -> Iterator[Update]:
        """Give the round's updates as they come; ask again where they are too few, and raise where they stay so."""
        yield from self._take(under_way, replies)
        needed, reason = quorum(self.settings)
        while len(under_way.used) < needed:
            if under_way.attempt == self.settings.round_retries:
                raise self._missed(under_way, reason)
            messages = self._ask_again(under_way)
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
        for reply in replies:
            client = self.names.get(reply.metadata.src_node_id, "")
            if client not in waiting:
                continue  # where a reply was lost on the way, Flower makes one that no client has sent
            del waiting[client]
            if reply.has_content():
                under_way.bytes_up += content_bytes(reply.content)
            answer = decode_answer(client, reply, self.settings.codec, self.tensors)
            verdict = judge(
                client,
                answer,
                self.tensors,
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


def _client_app(clients: tuple[str, ...], local_train: LocalTrain) -> "ClientApp":
    def name_of(context: "Context") -> str:
        return clients[int(context.node_config["partition-id"])]

    def train(context: "Context", words: Mapping[str, Any], received: dict[str, Tensor]) -> Update:
        return local_train(name_of(context), received, words["round"])

    return client_app(name_of, train)


def client_app(
    name_of: Callable[["Context"], str],
    train_round: Callable[["Context", Mapping[str, Any], dict[str, Tensor]], Update],
) -> "ClientApp":
    """Make the client's side: it says its name, and answers a round's message with an update or one line why not.

    Args:
        name_of: the client's name.
        train_round: called with Flower's context, the server's words (`round`, `place`, `clients` and its instructions)
            and the global tensors.
    """
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.query()  # Flower's node ids are random numbers: the server asks once who is behind each
    def introduce(message: "Message", context: "Context") -> "Message":
        return Message(RecordDict({"config": ConfigRecord({"client": name_of(context)})}), reply_to=message)

    @app.train()
    def train(message: "Message", context: "Context") -> "Message":
        try:
            arrays, words = message.content.array_records["arrays"], message.content.config_records["config"]
            update = train_round(context, words, decode(arrays))
            if words["codec"] != "none":
                update = pack_update(update, arrays, context.state, words)
            content = encode_update(update)
        except Exception as error:
            # Caught here, not by the engine: Flower's error replies lose the exception's type on the way.
            _log.debug("client %s failed", name_of(context), exc_info=True)
            reason = one_line(f"{type(error).__name__}: {error}")
            content = RecordDict({"config": ConfigRecord({"failure": reason})})
        return Message(content, reply_to=message)

    return app


def _server_app(server: Server, rounds: int) -> "ServerApp":
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def main(grid: "Grid", context: "Context") -> None:
        drive(server, grid, rounds)

    return app


def drive(server: Server, grid: "Grid", rounds: int) -> None:
    """Have Flower's loop run so many rounds; `server.tensors` are the result."""
    from flwr.serverapp.strategy import FedAvg

    class CheckedRounds(FedAvg):
        """Flower's loop over rounds, with our sampling, checks, quorum and strategies."""

        def configure_train(
            self, server_round: int, arrays: "ArrayRecord", config: "ConfigRecord", grid: "Grid"
        ) -> Iterable["Message"]:
            return server.open_round(server_round, arrays, grid)

        def aggregate_train(
            self, server_round: int, replies: Iterable["Message"]
        ) -> tuple["ArrayRecord | None", "MetricRecord | None"]:
            return server.close_round(replies, grid), None

    strategy = CheckedRounds(fraction_evaluate=0.0)  # the server validates in on_round; clients are not asked
    strategy.start(grid=grid, initial_arrays=encode(server.tensors), num_rounds=rounds, timeout=server.seconds)


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


def import_flower(backend: str = "inprocess") -> None:
    """Load Flower before anything of a run exists, so that its absence is the first thing said."""
    # Flower reads these once, while it loads. A user's own setting stands.
    for variable, value in {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }.items():
        os.environ.setdefault(variable, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of its dependencies among themselves
            for module in ("flwr.app", "flwr.clientapp", "flwr.serverapp.strategy"):
                importlib.import_module(module)
            if backend == "ray":
                importlib.import_module("flwr.simulation")
    except ImportError as error:
        raise FederationError(
            f'federated training needs Flower, which does not load ({error}); pip install "caravan[federated]"'
        ) from None
    if backend == "ray" and importlib.util.find_spec("ray") is None:
        raise FederationError(
            'backend = "ray" needs Ray, which is not installed; pip install "caravan[ray]" or use backend = "inprocess"'
        )


@contextmanager
def quiet_flower() -> Iterator[None]:
    """Keep Flower's own log lines off the user's terminal; what matters of them is in the reports and errors."""
    logger = logging.getLogger("flwr")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
