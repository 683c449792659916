"""A node of a real federation: one round's work on its own file, in a process that Flower starts for it."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from caravan.app.guarantee import check_private, make_budget, steps_are_private
from caravan.app.nodes.deployment import Deployment
from caravan.config import Config
from caravan.data.catalogue import Catalogue
from caravan.data.dataset import Dataset
from caravan.data.passages import document_passages
from caravan.data.records import Example
from caravan.errors import BackboneError, CaravanError, DataError, FederationError, PrivacyError
from caravan.federation.local import Part, train_client, trained_names
from caravan.federation.network import make_client_app
from caravan.federation.node import Order, Policy, check_same, release
from caravan.federation.rounds import Update
from caravan.model.adapter import IdentityAdapter
from caravan.model.backbone import load_backbone
from caravan.model.encoder import Encoder
from caravan.model.retriever import Retriever
from caravan.training.budget import Budget
from caravan.training.features import FeatureStore
from caravan.training.trainer import Stage

_log = logging.getLogger(__name__)


def work(own: Mapping[str, Any], words: Mapping[str, Any], received: dict[str, Tensor]) -> Update:
    """Train for one round; called by Flower's ClientApp.

    Args:
        own: the node's configuration: `name`, `folder`, `data`, `cache`, and what its operator lets out.
        words: the server's: an `Order`, `round`, `place` and `clients`.
        received: the global tensors.

    Raises:
        FederationError: the node does not work; the message goes to the server and says nothing of the node's data.
    """
    try:
        return _work(own, words, received)
    except FederationError as error:
        _log.error("%s: not trained: %s", own.get("name"), error)
        raise
    except Exception as error:
        # A message could hold a path, a label or a query: it stays here, and the server is told the kind only.
        _log.error("%s: not trained: %s: %s", own.get("name"), type(error).__name__, error, exc_info=_trace(error))
        raise FederationError(_public_reason(error)) from None


def _work(own: Mapping[str, Any], words: Mapping[str, Any], received: dict[str, Tensor]) -> Update:
    deployment, order = Deployment.read(str(own["folder"])), Order.read(words)
    config = order.settings_on(deployment.config)
    catalogue = Catalogue.read(deployment.documents)
    backbone = load_backbone(config.backbone, seed=config.seed)
    encoder = Encoder(backbone, IdentityAdapter(backbone.embedding_width))
    check_same(order, catalogue=catalogue.fingerprint, encoder=encoder.key())
    dataset = read_queries(Path(str(own["data"])), deployment, config)
    # Rows only give the form: the received tensors take their place before anything is computed.
    rows = torch.zeros(len(catalogue), encoder.width, device=encoder.device)
    retriever = Retriever.start(backbone, catalogue, rows, adapter=config.adapter, head=config.head)
    allowed = trained_names(retriever, order.stage)
    if set(received) != set(allowed):
        raise FederationError(f"the server sent other tensors than the {order.stage} stage trains; install the same")
    budget = _budget(config, dataset.train, order)
    part = Part(order.stage, int(words["round"]), order.rounds, int(words["place"]), int(words["clients"]))
    update = train_client(
        retriever,
        str(own["name"]),
        dataset.train,
        config,
        received,
        part=part,
        passages=document_passages(catalogue, config.training.passages),
        proximal_mu=order.proximal_mu,
        store=FeatureStore(str(own["cache"])),
        privacy=budget.steps(order.stage) if budget else None,
    )
    if budget:
        update = replace(update, metrics=update.metrics | budget.spent_metrics())
    return release(update, policy_of(own), allowed)


def _budget(config: Config, examples: Sequence[Example], order: Order) -> Budget | None:
    """The node's budget, planned over both stages of the training, of which this is a round of one."""
    check_private(config)
    if not steps_are_private(config):
        return None
    stages: tuple[Stage, ...] = ("head", "adapter") if config.training.mode == "adapter" else ("head",)
    if order.stage not in stages:
        raise FederationError("the server asks for a stage that its own settings leave out; install the same caravan")
    return make_budget(config, examples, stages)


def read_queries(path: Path, deployment: Deployment, config: Config) -> Dataset:
    """Read one file of queries against the shared catalogue; its examples are `train`, whatever the file is named.

    Raises:
        DataError: it cannot be read, has no query, or names a document that is not shared.
    """
    data = replace(config.data, path=str(path), documents=str(deployment.documents), validation=None, test=None)
    return Dataset.from_config(replace(data, validation_fraction=0.0), seed=config.seed)


def policy_of(own: Mapping[str, Any]) -> Policy:
    """What the node's operator lets out, from the node's configuration."""
    return Policy(
        max_examples=int(own["max-examples"]) if "max-examples" in own else None,
        weight=int(own["weight"]) if "weight" in own else None,
        metrics=frozenset(str(own.get("metrics", "")).split()),
    )


def _public_reason(error: Exception) -> str:
    if isinstance(error, DataError):
        return "its data cannot be used; the node's own log says why"
    if isinstance(error, PrivacyError):
        return "its privacy budget or settings do not allow it; the node's own log says why"
    if isinstance(error, BackboneError):
        return "its frozen model cannot be loaded; the node's own log says why"
    return f"it failed with {type(error).__name__}; the node's own log says why"


def _trace(error: Exception) -> bool:
    return not isinstance(error, CaravanError)  # only our own bugs need one


app = make_client_app(work)
