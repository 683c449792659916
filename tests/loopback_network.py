"""A network in one process: Flower's messages, but no sockets; a coordinator on one side, real nodes on the other."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from caravan.app.learning import Experiment
from caravan.app.nodes import coordinator, node
from caravan.app.nodes.deployment import Deployment, init_deployment
from caravan.app.nodes.operation import client_command
from caravan.config import Config, read_toml
from caravan.data.dataset import Dataset
from caravan.model.retriever import Retriever
from command_line import write_table
from toy_experiments import DATASET, SITES, make_place


@dataclass
class Loopback:
    """A federation's folder, a file of queries a site, and Flower's apps called directly."""

    deployment: Deployment
    files: dict[str, Path]
    monkeypatch: Any
    lets_out: dict[str, dict[str, object]] = field(default_factory=dict)
    offline: set[str] = field(default_factory=set)
    replies: list[Any] = field(default_factory=list)  # all that left a node
    forms: list[str] = field(default_factory=list)  # the record of tensors in each message to a node
    folders: dict[str, Deployment] = field(default_factory=dict)  # of nodes that have a copy of their own
    states: dict[str, Any] = field(default_factory=dict)  # what Flower keeps for each node until it is restarted

    def run(self, out: Path, *, resume: bool = False) -> None:
        from flwr.app import Context, RecordDict
        from flwr.supercore.task_identity import TaskIdentity

        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
        self.monkeypatch.setenv("CARAVAN_FEDERATION", str(self.deployment.folder))
        run = {"out": str(out), "resume": resume}
        coordinator.app(_Grid(self), Context(1, 1, {}, RecordDict(), run))

    def own(self, site: str) -> dict[str, Any]:
        """A node's configuration, as `federate client` writes it."""
        deployment = self.folders.get(site, self.deployment)
        command = client_command(deployment, site, self.files[site], lets_out=self.lets_out.get(site))
        return read_toml(command.words[-1])


class _Grid:
    def __init__(self, network: Loopback) -> None:
        self.network, self.answers = network, {}

    def get_nodes(self) -> list[Any]:
        sites = self.network.deployment.config.deployment.nodes
        return [_Info(100 + n, site) for n, site in enumerate(sites) if site not in self.network.offline]

    def push_messages(self, messages: Any) -> list[str]:
        from flwr.app import Context, RecordDict

        questions = []
        for message in messages:
            number = message.metadata.dst_node_id
            site = self.network.deployment.config.deployment.nodes[number - 100]
            self.network.forms += message.content.array_records
            message.metadata.__dict__["_message_id"] = uuid4().hex
            questions.append(message.metadata.message_id)
            state = self.network.states.setdefault(site, RecordDict())
            self.answers[questions[-1]] = node.app(message, Context(1, number, self.network.own(site), state, {}))
        return questions

    def pull_messages(self, questions: list[str]) -> list[Any]:
        replies = [self.answers.pop(question) for question in questions]
        self.network.replies += replies
        return replies


@dataclass
class _Info:
    node_id: int
    name: str
    last_activated_at: str = ""


def make_loopback(root: Path, monkeypatch: Any, **parts: Any) -> Loopback:
    """A federation of the toy sites; `parts` are those of `toy_settings`."""
    place = make_place(root)
    settings = place.config(**{"federation": {"rounds": 2}, **parts})
    data = replace(settings.data, validation=str(place.data / "validation.csv"))
    settings = replace(settings, data=data, deployment=replace(settings.deployment, insecure=True, connect_seconds=0.1))
    return Loopback(
        init_deployment(root / "fed", str(place.data / "documents.csv"), sorted(SITES), settings),
        {site: write_queries(root / f"{site}.csv", DATASET, site) for site in SITES},
        monkeypatch,
    )


def write_queries(path: Path, dataset: Dataset, site: str) -> Path:
    """A node's own file."""
    rows = [(example.text, example.doc_ids[0]) for example in dataset.train if example.columns["site"] == site]
    return write_table(path, ("text", "label"), rows)


def simulated(config: Config, **options: Any) -> Retriever:
    """The same federation, simulated."""
    federation = replace(config.federation, partition="column", column="site")
    return Experiment(DATASET, replace(config, federation=federation), **options).run()
