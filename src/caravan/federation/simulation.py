"""Flower's apps on one machine: in this process, or on Flower's own simulation with Ray.

In process, the apps talk over a `Grid` (Flower's interface to the network) that runs each client in the calling thread:
same messages, same strategy, but no threads and no polling, so the order is fixed and Ctrl-C stops a client at once.
"""

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

from caravan.errors import FederationError
from caravan.federation.rounds import one_line

if TYPE_CHECKING:
    from flwr.app import Context, Message, UserConfig
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp


def run_in_process(server_app: "ServerApp", client_app: "ClientApp", clients: int) -> None:
    """Run the apps in the calling thread: the server's, and inside its messages the clients', one after another.

    A client is never cut short: while it works nobody else does, so there is nobody whom it could keep waiting.
    """
    from flwr.app import Context, Message, RecordDict
    from flwr.serverapp import Grid
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity

    # Flower's runtimes set this in every process they start; a Message is stamped with it.
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1

    def context_of(node: int, node_config: "UserConfig") -> Context:  # node 1 is the server
        return Context(run_id=1, node_id=node, node_config=node_config, state=RecordDict(), run_config={})

    class InProcessGrid(Grid):
        """A network of nodes that answer one after another, in the calling thread."""

        def __init__(self) -> None:
            self._run = Run.create_empty(run_id=1)
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
            raise NotImplementedError("here a message is answered while it is sent; use send_and_receive")

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            raise NotImplementedError("here a message is answered while it is sent; use send_and_receive")

        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
            """Have a client work when its reply is asked for: of a thousand replies one is in memory at a time."""
            for message in messages:
                yield client_app(message, self._contexts[message.metadata.dst_node_id])

    server_app(InProcessGrid(), context_of(1, {}))


def run_on_ray(server_app: "ServerApp", client_app: "ClientApp", clients: int) -> None:
    """Run the apps on Flower's simulation, its clients in processes of Ray.

    Raises:
        FederationError: the simulation failed or ended too early.
        Exception: what the server's app raised, as it was.
    """
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    outer = ServerApp()
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
            server_app(grid, context)
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
            f'Flower\'s simulation on Ray failed: {one_line(str(error.__cause__ or error))}; try backend = "inprocess"'
        ) from error
    finally:
        ended.set()
    if errors:
        raise errors[0]
