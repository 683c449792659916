"""A federated run on Flower, on one machine: its ServerApp and ClientApp around a `Server` and local training."""

import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from caravan.config import FederationConfig
from caravan.errors import FederationError
from caravan.federation.holding import LackingError, pack_update, receive
from caravan.federation.messages import decode, encode_failure, encode_update
from caravan.federation.rounds import Failure, RoundReport, Update, one_line
from caravan.federation.secure import mask
from caravan.federation.server import OnRound, Server, drive
from caravan.federation.simulation import run_in_process, run_on_ray
from caravan.federation.strategies import Strategy

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp

__all__ = ["Failure", "RoundReport", "run_federation"]

_log = logging.getLogger(__name__)

LocalTrain = Callable[[str, dict[str, Tensor], int], Update]


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
        initial: the global tensors to start from: float64, float32 or float16 (float32 alone with a codec), on any
            device, finite.
        clients: their names, distinct; Flower's partition i is `clients[i]`.
        local_train: called with a client's name, its own CPU copy of the global tensors and the round (1 is the first);
            returns the client's update. With the backend "ray" it runs in other processes and must be picklable.
        rounds: the last round's number, counted from 1; `settings.rounds` is not looked at.
        settings: the defaults if None. Those of the partition are not looked at.
        seed: of the draw of clients, where `settings.clients_per_round` asks for one, and of int8's rounding.
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
    server = Server(dict(initial), clients, settings, strategy or Strategy(settings), seed, first_round, on_round)

    def carry_out(left: int) -> None:
        import_flower(settings.backend)
        run = run_in_process if settings.backend == "inprocess" else run_on_ray
        run(_server_app(server, left), _client_app(tuple(clients), local_train), len(clients))

    return server.run(rounds, carry_out)


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

    @app.train(mods=[mask])
    def train(message: "Message", context: "Context") -> "Message":
        try:
            words = message.content.config_records["config"]
            start = receive(message.content, context.state)
            update = train_round(context, words, decode(start))
            if words["codec"] != "none":
                update = pack_update(update, start, context.state, words)
            content = encode_update(update)
        except Exception as error:
            # Caught here, not by the engine: Flower's error replies lose the exception's type on the way.
            _log.debug("client %s failed", name_of(context), exc_info=True)
            reason = one_line(f"{type(error).__name__}: {error}")
            content = encode_failure(reason, lacks=isinstance(error, LackingError))
        return Message(content, reply_to=message)

    return app


def _server_app(server: Server, rounds: int) -> "ServerApp":
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def main(grid: "Grid", context: "Context") -> None:
        drive(server, grid, rounds)

    return app


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
