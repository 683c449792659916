"""The server's side of a real federation: the same stages as in simulation, over nodes that train elsewhere."""

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from caravan.app.guarantee import check_private
from caravan.app.learning import Experiment, OnRound
from caravan.app.nodes.deployment import Deployment
from caravan.app.nodes.node import read_queries
from caravan.app.separation import check_separation
from caravan.app.standing import Standing
from caravan.data.catalogue import Catalogue
from caravan.data.dataset import Dataset
from caravan.errors import ConfigError
from caravan.federation.network import Network, make_server_app, run_on_network
from caravan.federation.node import Order
from caravan.federation.quorum import check_settings
from caravan.federation.strategies import Strategy, proximal_mu
from caravan.model.adapter import IdentityAdapter
from caravan.model.encoder import Encoder
from caravan.storage import check_destination, save
from caravan.training.budget import Budget
from caravan.training.features import FeatureStore
from caravan.training.trainer import Stage

FOLDER_VARIABLE = "CARAVAN_FEDERATION"  # the folder's place is the server's own affair: not sent with a run
MARK = "caravan: "  # begins the lines of Flower's log that are meant for people

_log = logging.getLogger("caravan.coordinator")


class Coordination(Experiment):
    """A training whose clients are the nodes of a network; the server has no queries but those of validation."""

    def __init__(self, deployment: Deployment, network: Network, *, resume: bool = False) -> None:
        """Prepare the training.

        Args:
            deployment: the federation's folder.
            network: what Flower gave to the ServerApp.
            resume: take up the snapshots of the run before.
        """
        self.network = network
        self.nodes = deployment.config.deployment.nodes
        cache = os.environ.get("CARAVAN_CACHE") or deployment.folder / "cache"
        catalogue, path = Catalogue.read(deployment.documents), deployment.validation()
        queries = read_queries(path, deployment, deployment.config).train if path else ()
        super().__init__(
            Dataset(deployment.folder.name, catalogue, train=(), validation=queries, test=()),
            deployment.config,
            store=FeatureStore(cache),
            checkpoint=deployment.folder / "checkpoint",
            resume=resume,
        )

    @property
    def federated(self) -> bool:
        """Always."""
        return True

    def _deal(self) -> list[Any]:
        check_separation(self.config, validation=bool(self.dataset.validation))
        check_settings(self.config.federation, len(self.nodes))
        return []  # every node has its own file

    def _plan_privacy(self) -> dict[str, Budget]:
        """Every node plans for its own queries; the server sees to the settings that are its."""
        check_private(self.config)
        return {}

    @property
    def _client_count(self) -> int:
        return len(self.nodes)

    def _run_rounds(self, stage: Stage, standing: Standing, rounds: int, strategy: Strategy, on_round: OnRound) -> None:
        encoder = Encoder(self.backbone, IdentityAdapter(self.backbone.embedding_width))
        order = Order.of(
            self.settled,
            stage,
            rounds,
            proximal_mu=proximal_mu(self.config.federation),
            catalogue=self.dataset.catalogue.fingerprint,
            encoder=encoder.key(),
        )
        if standing.round:
            _log.info("%s stage: resumed after round %d/%d", stage, standing.round, rounds)
        run_on_network(
            self.network,
            standing.tensors,
            self.nodes,
            rounds=rounds,
            settings=self.config.federation,
            seed=self.config.seed,
            first_round=standing.round + 1,
            strategy=strategy,
            instructions=order.to_words(),
            connect_seconds=self.config.deployment.connect_seconds,
            on_round=on_round,
        )

    def _tell(self, report: dict[str, Any], rounds: int) -> None:
        recall = report["validation_recall"]
        found = "" if recall is None else f", validation recall@1 {recall:.1%}"
        up, down = (report[f"bytes_{direction}"] / 2**20 for direction in ("up", "down"))
        taken = f"{len(report['clients'])} of {len(report['asked'])} nodes, {report['seconds']:.1f} s"
        taken += f", {up:.2f} MiB up, {down:.2f} MiB down{found}"
        _log.info("%s stage, round %d/%d: %s", report["stage"], report["round"], rounds, taken)
        for failure in report["failures"]:
            _log.info("  without %s: %s", failure["client"], failure["reason"])

    def _clients(self, rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
        counts: dict[str, int] = {}
        for report in rounds:
            counts.update(zip(report["clients"], report["examples"], strict=True))
        return [{"name": node, "examples": counts.get(node, 0)} for node in self.nodes]


def coordinate(network: Network, run: Mapping[str, Any]) -> None:
    """Train over a network and save the result; called by Flower's ServerApp.

    Args:
        network: what Flower gave.
        run: `out`, the folder of the saved retriever, and `resume`.

    Raises:
        CaravanError: the training could not start or go on; what was averaged so far is kept for `resume`.
    """
    _speak()
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        raise ConfigError(f"{FOLDER_VARIABLE} is not set; start the server with `caravan federate server DIR`")
    deployment = Deployment.read(folder)
    out = Path(str(run.get("out") or deployment.folder / "model"))
    check_destination(out)
    coordination = Coordination(deployment, network, resume=bool(run.get("resume")))
    retriever = coordination.run()
    save(retriever, out)
    coordination.clear_checkpoint()
    _log.info("saved to %s", out)


def _speak() -> None:
    """Have our own lines stand in Flower's log, which is what the ServerApp writes to standard output."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(f"{MARK}%(message)s"))
    for name in ("caravan.coordinator", "caravan.federation.network"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


app = make_server_app(coordinate)
