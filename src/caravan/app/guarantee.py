"""Whose data a private training uses, and what each of them may spend."""

import secrets
from collections.abc import Mapping, Sequence

from caravan.config import Config
from caravan.data.records import Example
from caravan.errors import ConfigError, PrivacyError
from caravan.federation.central_noise import CentralNoise
from caravan.training.budget import Budget
from caravan.training.private import refuse_automatic_rates
from caravan.training.trainer import Stage


def plan_privacy(config: Config, owners: Mapping[str, Sequence[Example]], stages: Sequence[Stage]) -> dict[str, Budget]:
    """Plan a training for each owner of queries.

    Args:
        config: all settings.
        owners: their training queries by name; no query is two owners'.
        stages: what is trained.

    Returns:
        Budgets by name; none where the clients' own steps are not private.

    Raises:
        ConfigError: a setting outside of `[privacy]` would show what privacy is to hide.
        PrivacyError: see `Budget`; with several owners, the message begins with the name of the one it is about.
    """
    check_private(config)
    if not steps_are_private(config):
        return {}
    run = secrets.token_hex(8) if len(owners) > 1 else ""
    budgets = {}
    for owner, examples in owners.items():
        try:
            budgets[owner] = make_budget(config, examples, stages, run=run, part=owner if run else "")
        except PrivacyError as error:
            raise PrivacyError(f"client {owner}: {error}" if run else str(error)) from None
    return budgets


def make_budget(
    config: Config,
    examples: Sequence[Example],
    stages: Sequence[Stage],
    *,
    run: str = "",
    part: str = "",
) -> Budget:
    """Plan a training for one owner; see `Budget`."""
    settings = {stage: getattr(config.training, stage) for stage in stages}
    return Budget(
        examples,
        config.privacy,
        {stage: own.epochs for stage, own in settings.items()},
        run=run,
        part=part,
        paper_batch={stage: own.batch_size * config.training.gradient_accumulation for stage, own in settings.items()},
    )


def steps_are_private(config: Config) -> bool:
    """Whether each owner's own steps are clipped and noised, not only what a server makes of them."""
    return config.privacy.mode not in ("none", "client-level")


def plan_central_noise(config: Config, clients: int, stages: Sequence[Stage]) -> CentralNoise | None:
    """Plan what the server adds, in mode "client-level"; None in any other.

    Args:
        config: all settings.
        clients: how many there are, 0 for central training.
        stages: what is trained.

    Raises:
        ConfigError: there are no clients, or the updates are not averaged in the clear.
        PrivacyError: see `CentralNoise`.
    """
    if config.privacy.mode != "client-level":
        return None
    federation = config.federation
    if not clients:
        raise ConfigError('privacy.mode = "client-level" hides whole clients and needs some; set federation.clients')
    if federation.strategy not in ("fedavg", "fedprox") or federation.secure_aggregation or federation.codec != "none":
        raise ConfigError(
            'privacy.mode = "client-level" clips each update and averages: it needs federation.strategy = "fedavg" or '
            '"fedprox", no secure_aggregation and codec = "none"'
        )
    rounds = sum(min(federation.rounds, getattr(config.training, stage).epochs) for stage in stages)
    return CentralNoise(config.privacy, clients, rounds, min(federation.clients_per_round or clients, clients))


def check_private(config: Config) -> None:
    """Refuse settings that would show what privacy is to hide, if any is asked for.

    Raises:
        PrivacyError: a rate would be chosen on private queries.
        ConfigError: the start pools queries, head rows are sent sparsely or averaged by who trained them, or a round is
            chosen by validation queries that are not public.
    """
    federation = config.federation
    if config.privacy.mode == "none":
        return
    if steps_are_private(config):
        refuse_automatic_rates(config.training)
    if config.head.start == "centroids":
        raise ConfigError(
            'head.start = "centroids" is made of training queries; set it to "documents" or "auto" to train privately'
        )
    if federation.sparse_rows:
        raise ConfigError("federation.sparse_rows shows which documents were asked about; leave it out with privacy")
    if federation.rows == "trained":
        raise ConfigError(
            'federation.rows = "trained" asks which documents a client has queries for, which privacy hides; '
            'set it to "all"'
        )
    if federation.keep == "best" and not config.privacy.public_validation:
        raise ConfigError(
            'federation.keep = "best" chooses by validation queries; set it to "last", or privacy.public_validation = '
            "true if they are nobody's"
        )
