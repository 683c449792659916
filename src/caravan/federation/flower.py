"""The one place that knows Flower: its ServerApp, ClientApp and FedAvg strategy around `rounds`, in process or on Ray.

In process, Flower's apps talk over a `Grid` (its interface to the network) that runs each client in the calling thread:
same messages, same strategy, but no threads and no polling, so the order is fixed and Ctrl-C stops a client at once.
"""

import importlib
import importlib.util
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast
from uuid import uuid4

import torch
from torch import Tensor

from caravan.errors import FederationError
from caravan.federation.rounds import Failure, RoundReport, Update, check_plan, close_round

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict, UserConfig
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp

__all__ = ["Failure", "RoundReport", "run_federation"]

_EXAMPLES = "num-examples"  # where Flower's own strategies look for a client's weight
_MESSAGE_SECONDS = 30 * 24 * 3600.0  # Flower drops a message after 12 hours, less than a long round on one machine
_CONNECT_SECONDS = 60.0  # virtual nodes register in milliseconds; stock Flower would wait for them forever
_REASON_CHARACTERS = 300  # enough for a path and a cause; a client must not be able to flood the terminal

_log = logging.getLogger(__name__)

LocalTrain = Callable[[str, dict[str, Tensor], int], Update]
OnRound = Callable[[RoundReport, dict[str, Tensor]], None]


def run_federation(
    initial: Mapping[str, Tensor],
    clients: Sequence[str],
    local_train: LocalTrain,
    *,
    rounds: int,
    first_round: int = 1,
    min_clients: int = 1,
    backend: Literal["inprocess", "ray"] = "inprocess",
    on_round: OnRound | None = None,
) -> dict[str, Tensor]:
    """Train on clients that keep their data, round by round, and average what they send (arXiv:1602.05629).

    A client that raises, or whose update `rounds.check` refuses, is reported and the round goes on with the others.

    Args:
        initial: the global tensors to start from: float64, float32 or float16, on any device, finite.
        clients: their names, distinct; Flower's partition i is `clients[i]`.
        local_train: called with a client's name, its own CPU copy of the global tensors and the round (1 is the first);
            returns the client's update. With "ray" it runs in other processes and must be picklable.
        rounds: the last round's number, counted from 1.
        first_round: where to go on, with `initial` as it stood after the round before; `rounds + 1` has nothing to do.
        min_clients: usable updates that a round needs.
        backend: "inprocess" runs the clients one after another in the calling thread; "ray" in parallel processes.
        on_round: called after each averaged round with its report and a copy of the new global tensors; what it raises
            ends the run.

    Returns:
        The global tensors after the last round, on the CPU.

    Raises:
        FederationError: a setting contradicts another, Flower or Ray is missing, or a round had fewer usable updates
            than `min_clients` (the message lists every client's reason).
    """
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in initial.items()}
    check_plan(tensors, clients, rounds=rounds, first_round=first_round, min_clients=min_clients)
    if first_round > rounds:
        return tensors
    _import_flower(backend)
    with _quiet_flower():
        server = _Server(tensors, clients, first_round, min_clients, on_round)
        client_app = _client_app(tuple(clients), local_train)
        if backend == "inprocess":
            _run_in_process(server, client_app, len(clients), rounds - first_round + 1)
        else:
            _run_on_ray(server, client_app, len(clients), rounds - first_round + 1)
    return server.tensors


@dataclass
class _Server:
    """The server's side of one run: who is who, what came back, and the global tensors."""

    tensors: dict[str, Tensor]
    clients: Sequence[str]
    first_round: int
    min_clients: int
    on_round: OnRound | None
    names: dict[int, str] = field(default_factory=dict)  # Flower's node id -> client
    started: float = 0.0
    bytes_down: int = 0

    def messages(self, server_round: int, arrays: "ArrayRecord", grid: "Grid") -> list["Message"]:
        """The messages that start a round, one to every client, in the clients' order."""
        from flwr.app import ConfigRecord, Message, MessageType, RecordDict

        if not self.names:
            self.names = _meet(grid, self.clients)
        config = ConfigRecord({"round": self.first_round + server_round - 1})
        content = RecordDict({"arrays": arrays, "config": config})
        self.started = time.perf_counter()
        self.bytes_down = _content_bytes(content) * len(self.names)
        return [Message(content, node, MessageType.TRAIN, ttl=_MESSAGE_SECONDS) for node in self.names]

    def aggregate(self, server_round: int, replies: Iterable["Message"]) -> "ArrayRecord":
        """Check and average what came back, report it, and return the new global tensors in Flower's form."""
        number = self.first_round + server_round - 1
        received = {self.names[reply.metadata.src_node_id]: reply for reply in replies}
        answers = {client: _decode_answer(client, received.get(client)) for client in self.clients}
        self.tensors, updates, failures = close_round(number, answers, self.tensors, min_clients=self.min_clients)
        arrays = _encode(self.tensors)
        report = RoundReport(
            round=number,
            clients=tuple(update.client for update in updates),
            examples=tuple(update.examples for update in updates),
            metrics=tuple(update.metrics for update in updates),
            failures=failures,
            bytes_up=sum(_content_bytes(reply.content) for reply in received.values() if reply.has_content()),
            bytes_down=self.bytes_down,
            seconds=time.perf_counter() - self.started,
        )
        if self.on_round is not None:
            self.on_round(report, {name: tensor.clone() for name, tensor in self.tensors.items()})
        return arrays


def _client_app(clients: tuple[str, ...], local_train: LocalTrain) -> "ClientApp":
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.query()  # Flower's node ids are random numbers: the server asks once who is behind each
    def introduce(message: "Message", context: "Context") -> "Message":
        name = clients[int(context.node_config["partition-id"])]
        return Message(RecordDict({"config": ConfigRecord({"client": name})}), reply_to=message)

    @app.train()
    def train(message: "Message", context: "Context") -> "Message":
        client = clients[int(context.node_config["partition-id"])]
        try:
            number = cast(int, message.content.config_records["config"]["round"])
            content = _encode_update(local_train(client, _decode(message.content.array_records["arrays"]), number))
        except Exception as error:
            # Caught here, not by the engine: Flower's error replies lose the exception's type on the way.
            _log.debug("client %s failed", client, exc_info=True)
            reason = _one_line(f"{type(error).__name__}: {error}")
            content = RecordDict({"config": ConfigRecord({"failure": reason})})
        return Message(content, reply_to=message)

    return app


def _server_app(server: _Server, rounds: int) -> "ServerApp":
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg

    class CheckedFedAvg(FedAvg):
        """Flower's FedAvg with every client in a fixed order, and `rounds` to check and to average."""

        def configure_train(
            self, server_round: int, arrays: "ArrayRecord", config: "ConfigRecord", grid: "Grid"
        ) -> Iterable["Message"]:
            return server.messages(server_round, arrays, grid)

        def aggregate_train(
            self, server_round: int, replies: Iterable["Message"]
        ) -> tuple["ArrayRecord | None", "MetricRecord | None"]:
            return server.aggregate(server_round, replies), None

    app = ServerApp()

    @app.main()
    def main(grid: "Grid", context: "Context") -> None:
        strategy = CheckedFedAvg(fraction_evaluate=0.0)  # the server validates in on_round; clients are not asked
        strategy.start(grid=grid, initial_arrays=_encode(server.tensors), num_rounds=rounds)

    return app


def _run_in_process(server: _Server, client_app: "ClientApp", clients: int, rounds: int) -> None:
    from flwr.app import Context, Message, RecordDict
    from flwr.serverapp import Grid
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity

    # Flower's runtimes set this in every process they start; a Message is stamped with it.
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1

    def context_of(node: int, node_config: "UserConfig") -> Context:  # node 1 is the server
        return Context(run_id=1, node_id=node, node_config=node_config, state=RecordDict(), run_config={})

    class InProcessGrid(Grid):
        """A network of nodes that answer a message while it is sent, one after another, in the calling thread."""

        def __init__(self) -> None:
            self._run = Run.create_empty(run_id=1)
            self._replies: dict[str, Message] = {}
            self._contexts = {
                2 + partition: context_of(2 + partition, {"partition-id": partition, "num-partitions": clients})
                for partition in range(clients)
            }

        def set_run(self, run: Run) -> None:
            self._run = run

        @property
        def run(self) -> Run:
            return self._run

        def create_message(
            self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
        ) -> Message:
            return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

        def get_node_ids(self) -> Iterable[int]:
            return list(self._contexts)

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            pushed = []
            for message in messages:
                pushed.append(uuid4().hex)
                self._replies[pushed[-1]] = client_app(message, self._contexts[message.metadata.dst_node_id])
            return pushed

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
            return self.pull_messages(self.push_messages(messages))

    _server_app(server, rounds)(InProcessGrid(), context_of(1, {}))


def _run_on_ray(server: _Server, client_app: "ClientApp", clients: int, rounds: int) -> None:
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    inner, outer = _server_app(server, rounds), ServerApp()
    ended = threading.Event()
    errors: list[Exception] = []

    @outer.main()
    def main(grid: "Grid", context: "Context") -> None:
        pull = grid.pull_messages

        def pull_while_running(message_ids: Iterable[str]) -> Iterable["Message"]:
            # Stock Flower waits for replies for ever when its simulation has died.
            if ended.is_set():
                raise FederationError("Flower's simulation ended before the round was over; start the run again")
            return pull(message_ids)

        grid.pull_messages = pull_while_running
        try:
            inner(grid, context)
        except Exception as error:  # raised below: on its way through the simulation it would cost seconds
            errors.append(error)

    try:
        run_simulation(
            outer,
            client_app,
            num_supernodes=clients,
            backend_config={
                "init_args": {"logging_level": "ERROR", "log_to_driver": False},
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},  # Flower's own 2 would leave one core unused
            },
        )
    except Exception as error:
        raise FederationError(
            f'Flower\'s simulation on Ray failed: {_one_line(str(error.__cause__ or error))}; try backend = "inprocess"'
        ) from error
    finally:
        ended.set()
    if errors:
        raise errors[0]


def _meet(grid: "Grid", clients: Sequence[str]) -> dict[int, str]:
    """Ask every node which client it is: node ids to names, in the clients' order."""
    from flwr.app import Message, MessageType, RecordDict

    deadline = time.monotonic() + _CONNECT_SECONDS
    while len(nodes := sorted(grid.get_node_ids())) < len(clients):
        if time.monotonic() > deadline:
            raise FederationError(f"only {len(nodes)} of {len(clients)} nodes came up; start the run again")
        time.sleep(0.02)
    questions = [Message(RecordDict(), node, MessageType.QUERY, ttl=_MESSAGE_SECONDS) for node in nodes]
    names: dict[int, str] = {}
    for reply in grid.send_and_receive(questions):
        if reply.has_error():
            raise FederationError(f"a client's process does not start: {_one_line(str(reply.error.reason))}; repair it")
        names[reply.metadata.src_node_id] = str(reply.content.config_records["config"]["client"])
    return dict(sorted(names.items(), key=lambda item: clients.index(item[1])))


def _encode(tensors: Mapping[str, Tensor]) -> "ArrayRecord":
    from flwr.app import Array, ArrayRecord

    return ArrayRecord({name: Array(tensor.detach().cpu().contiguous().numpy()) for name, tensor in tensors.items()})


def _decode(arrays: "ArrayRecord") -> dict[str, Tensor]:
    return {name: torch.from_numpy(array.numpy()) for name, array in arrays.items()}


def _encode_update(update: Update) -> "RecordDict":
    from flwr.app import MetricRecord, RecordDict

    if not isinstance(update, Update):
        raise FederationError(f"local_train returned {type(update).__name__}; return a rounds.Update")
    if type(update.examples) is not int:  # a bool or a NumPy number would not survive the journey
        raise FederationError(f"the example count is {update.examples!r}; a whole number from 1 on is needed")
    if _EXAMPLES in update.metrics:
        raise FederationError(f"a metric is named {_EXAMPLES}, which Flower reserves; rename it")
    metrics = {name: float(value) for name, value in update.metrics.items()}
    return RecordDict(
        {"arrays": _encode(update.tensors), "metrics": MetricRecord({**metrics, _EXAMPLES: update.examples})}
    )


def _decode_answer(client: str, reply: "Message | None") -> Update | str:
    """The client's update, or one line that says why there is none."""
    if reply is None:
        return "it did not answer"
    if reply.has_error():
        return _one_line(str(reply.error.reason))
    try:
        if "config" in reply.content.config_records:
            return _one_line(str(reply.content.config_records["config"]["failure"]))
        metrics = dict(reply.content.metric_records["metrics"])
        examples = cast(int, metrics.pop(_EXAMPLES))
        return Update(client, _decode(reply.content.array_records["arrays"]), examples, cast(dict[str, float], metrics))
    except Exception as error:  # whatever a client sends, it must not end the run of the others
        return _one_line(f"its reply cannot be read: {type(error).__name__}: {error}")


def _content_bytes(content: "RecordDict") -> int:
    return sum(len(array.data) for arrays in content.array_records.values() for array in arrays.values())


def _import_flower(backend: str) -> None:
    """Load Flower before anything of a run exists, so that its absence is the first thing said."""
    if backend not in ("inprocess", "ray"):
        raise FederationError(f'backend is {backend!r}; it must be "inprocess" or "ray"')
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
def _quiet_flower() -> Iterator[None]:
    """Keep Flower's own log lines off the user's terminal; what matters of them is in the reports and errors."""
    logger = logging.getLogger("flwr")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _one_line(text: str) -> str:
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= _REASON_CHARACTERS else f"{line[: _REASON_CHARACTERS - 3]}..."
