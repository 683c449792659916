"""What a node is told, what it checks before it works, and the one function that decides what leaves it."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast

from caravan.config import Config, PrivacyConfig, config_from_dict
from caravan.errors import ConfigError, FederationError
from caravan.federation.rounds import Update

_SENT_SETTINGS = ("seed", "adapter", "head", "training")  # none names a file, a model or code
_OWN_PRIVACY = ("epsilon_cap", "user_column")  # the node's affair: its budget, and how its own file names users


@dataclass(frozen=True)
class Order:
    """What the server asks of every node in a stage; the round and the node's place come with the round's message.

    Attributes:
        stage: "head" or "adapter".
        rounds: the stage's rounds, over which its epochs are divided.
        settings: JSON of the settings that decide the training, and of nothing else.
        proximal_mu: how strongly a client is held to the tensors it receives.
        catalogue: fingerprint of the server's catalogue.
        encoder: key of the server's frozen encoder (backbone, pooling, length limit, dtype).
    """

    stage: Literal["head", "adapter"]
    rounds: int
    settings: str
    proximal_mu: float
    catalogue: str
    encoder: str

    @classmethod
    def of(
        cls, config: Config, stage: str, rounds: int, *, proximal_mu: float, catalogue: str, encoder: str
    ) -> "Order":
        """Write down what is asked in one stage of a training with these settings."""
        values = config.to_dict()
        privacy = {name: value for name, value in values["privacy"].items() if name not in _OWN_PRIVACY}
        sent = {name: values[name] for name in _SENT_SETTINGS} | {"privacy": privacy}
        settings = json.dumps(sent, sort_keys=True)
        return cls(cast(Literal["head", "adapter"], stage), rounds, settings, proximal_mu, catalogue, encoder)

    @classmethod
    def read(cls, words: Mapping[str, Any]) -> "Order":
        """Take an order out of a message.

        Raises:
            FederationError: the message is of another version.
        """
        try:
            order = cls(**{name: words[name] for name in cls.__dataclass_fields__})
        except KeyError as error:
            raise FederationError(f"the server's message has no {error}; install the same caravan on both") from None
        if order.stage not in ("head", "adapter"):
            raise FederationError("the server asks for an unknown stage; install the same caravan on both")
        return order

    def to_words(self) -> dict[str, str | int | float]:
        """The order as it stands in a message."""
        return asdict(self)

    def settings_on(self, own: Config) -> Config:
        """The node's own settings, with the server's where these decide the training.

        Of `[privacy]` the node keeps its own cap and column of users; where it asks for privacy itself, the server must
        ask for the same mode and unit, and for no more than the node's epsilon, if the node names one.

        Raises:
            FederationError: the server's settings are not allowed here.
        """
        try:
            asked = json.loads(self.settings)
            sent = {name: asked[name] for name in _SENT_SETTINGS}
            values = own.to_dict()
            kept = {name: values["privacy"][name] for name in _OWN_PRIVACY}
            sent["privacy"] = {**asked["privacy"], **kept}
            config = config_from_dict({**values, **sent}, source="the server's settings")
        except (ConfigError, KeyError, TypeError, ValueError):
            # Without the reason: it would name the node's own settings too.
            raise FederationError("the server's settings are not allowed here; install the same caravan") from None
        _check_privacy(own.privacy, config.privacy)
        return config


def _check_privacy(own: PrivacyConfig, asked: PrivacyConfig) -> None:
    """Refuse to train with less privacy than the node's operator has set."""
    if own.mode == "none":
        return
    if (own.mode, own.unit) != (asked.mode, asked.unit):
        raise FederationError("the node trains with another kind of privacy than the server asks for; agree on one")
    limit = own.epsilon
    if limit is not None and (asked.epsilon is None or asked.epsilon > limit):
        raise FederationError("the server asks for a larger epsilon than the node allows; agree on one")
    if own.noise_multiplier is not None and (asked.noise_multiplier or 0.0) < own.noise_multiplier:
        raise FederationError("the server asks for less noise than the node allows; agree on one")


def check_same(order: Order, *, catalogue: str, encoder: str) -> None:
    """Refuse to train on documents or a frozen model other than the server's.

    Raises:
        FederationError: they differ.
    """
    if catalogue != order.catalogue:
        raise FederationError(
            f"another catalogue: {catalogue[:12]} here, {order.catalogue[:12]} on the server; "
            f"copy the server's documents.jsonl to the node"
        )
    if encoder != order.encoder:
        raise FederationError(
            f"another frozen model: {encoder[:12]} here, {order.encoder[:12]} on the server; "
            f"use the same [backbone] settings and files"
        )


@dataclass(frozen=True)
class Policy:
    """What the node's operator lets out beside tensors.

    Attributes:
        max_examples: the example count is sent as this number where it is larger; None: as it is.
        weight: sent in place of the example count; None: the count is sent.
        metrics: names of the numbers that may be sent; none by default.
    """

    max_examples: int | None = None
    weight: int | None = None
    metrics: frozenset[str] = frozenset()


def release(update: Update, policy: Policy, allowed: Collection[str]) -> Update:
    """Decide what leaves the node: nothing but what this function returns is sent, beside one line when there is none.

    Args:
        update: what the training came to.
        policy: what the operator allows.
        allowed: names of the tensors that this stage trains.

    Returns:
        The update with these tensors alone, the example count as the policy has it, and the metrics it names.

    Raises:
        FederationError: a tensor that the stage trains is missing.
    """
    if missing := set(allowed) - update.tensors.keys():
        raise FederationError(f"tensor {', '.join(sorted(missing))} was not trained; report this as a bug")
    examples = update.examples if policy.max_examples is None else min(update.examples, policy.max_examples)
    return replace(
        update,
        tensors={name: tensor for name, tensor in update.tensors.items() if name in allowed},
        examples=examples if policy.weight is None else policy.weight,
        metrics={name: value for name, value in update.metrics.items() if name in policy.metrics},
    )
