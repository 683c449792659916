"""Which clients a round asks, how many usable updates it needs, and which settings can never be met: no engine."""

from collections.abc import Collection, Sequence
from itertools import count

import numpy as np

from caravan.config import FederationConfig
from caravan.errors import ConfigError

_OF_A_SUM = ("fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi")
_LEAST_SUMMED = 3  # of two, each would know the other's update from the sum
_MOST_SUMMED = 1024  # so many steps of 22 bits fit the 32 bits that masked numbers have: see `secure`


def check_settings(settings: FederationConfig, clients: int) -> None:
    """Refuse settings that no round of so many clients could meet.

    Raises:
        ConfigError: more clients are asked for than there are, or fewer than the quorum or the strategy needs; or rows
            are to be left out of whole tensors.
    """
    # Training with differential privacy, once there is one, must refuse sparse_rows here: which rows are sent is a
    # function of the queries that no noise hides.
    if settings.sparse_rows and settings.codec == "none":
        raise ConfigError(
            'federation.sparse_rows leaves rows out of packed changes, federation.codec is "none"; '
            'set codec to "float32", "float16" or "int8", or sparse_rows to false'
        )
    asked = clients if settings.clients_per_round is None else settings.clients_per_round
    if asked > clients:
        raise ConfigError(f"federation.clients_per_round is {asked}, there are {clients} clients; lower it")
    if settings.min_clients > asked:
        there = f"there are {clients} clients" if asked == clients else f"federation.clients_per_round is {asked}"
        raise ConfigError(f"federation.min_clients is {settings.min_clients}, {there}; lower it")
    if settings.secure_aggregation:
        _check_secure(settings, asked)
    needed, reason = quorum(settings)
    if needed > asked:
        raise ConfigError(
            f"{reason}, a round asks {asked}; set more federation.clients or clients_per_round, or lower "
            f"{_remedy(settings)}"
        )


def _check_secure(settings: FederationConfig, asked: int) -> None:
    """Refuse what cannot be had where the server sees a sum alone."""
    needs = "federation.secure_aggregation shows the server the sum of a round's updates alone"
    if settings.strategy not in _OF_A_SUM:
        raise ConfigError(f'{needs}, strategy = "{settings.strategy}" needs each; use {", ".join(_OF_A_SUM)}')
    if settings.max_update_norm is not None:
        raise ConfigError(f"{needs}, max_update_norm is about each; leave it out")
    if settings.codec != "none":
        raise ConfigError(f'{needs}, as whole numbers; set codec to "none", not "{settings.codec}"')
    if settings.rows == "trained":
        raise ConfigError(f'{needs}, rows = "trained" needs to see who changed a row; set it to "all"')
    if settings.max_examples is None:
        raise ConfigError(f"{needs}, weighted by shares of max_examples; set it to the largest client's example count")
    if not _LEAST_SUMMED <= asked <= _MOST_SUMMED:
        raise ConfigError(f"{needs}, of {_LEAST_SUMMED} to {_MOST_SUMMED} clients; a round asks {asked}")


def quorum(settings: FederationConfig) -> tuple[int, str]:
    """Give the number of usable updates that a round needs, and where that number comes from.

    With n updates of which f are byzantine, krum and multi_krum need n >= 2f + 3 (Blanchard et al., NeurIPS 2017,
    proposition 1), bulyan n >= 4f + 3 (arXiv:1802.07927, section 4), the median n >= 2f + 1, and a trimmed mean must
    cut at least f on each side (arXiv:1803.01498, theorem 4).
    """
    needed = _needed(settings)
    if needed <= settings.min_clients:
        return settings.min_clients, f"min_clients is {settings.min_clients}"
    reason = f'strategy = "{settings.strategy}" with byzantine_clients = {settings.byzantine_clients}'
    if settings.strategy == "trimmed_mean":
        reason += f" and trimmed_share = {settings.trimmed_share:g}"
    if settings.strategy == "multi_krum" and settings.krum_selected is not None:
        reason += f" and krum_selected = {settings.krum_selected}"
    return needed, f"{reason} needs {needed} usable updates a round"


def sample(
    clients: Sequence[str], settings: FederationConfig, *, seed: int, number: int, attempt: int = 0
) -> list[str]:
    """Draw the clients that a round asks; the same seed and round give the same clients.

    Args:
        clients: all, distinct.
        settings: `clients_per_round` says how many.
        seed: of the draw, 0 or more.
        number: the round's.
        attempt: 0 at first.

    Returns:
        Clients in the order they have in `clients`.
    """
    if settings.clients_per_round is None:
        return list(clients)
    drawn = set(_shuffled(clients, seed, number, attempt)[: settings.clients_per_round])
    return [client for client in clients if client in drawn]


def sample_again(
    clients: Sequence[str], asked: Collection[str], failed: Collection[str], *, seed: int, number: int, attempt: int
) -> list[str]:
    """Draw clients in the place of those that failed: first such as were not asked, then the failed ones again.

    Args:
        clients: all, distinct.
        asked: those that the round has asked already.
        failed: those of them whose work cannot be used.
        seed: of the draw, 0 or more.
        number: the round's.
        attempt: 1 for the first retry.

    Returns:
        As many clients as failed, in the order they have in `clients`.
    """
    order = _shuffled(clients, seed, number, attempt)
    fresh = [client for client in order if client not in asked]
    again = [client for client in order if client in failed]
    drawn = set([*fresh, *again][: len(failed)])
    return [client for client in clients if client in drawn]


def safe_selection(settings: FederationConfig, updates: int) -> int:
    """Give the number of updates that multi_krum averages: of n, at most n - f - 2 (AggregaThor; SysML 2019)."""
    return settings.krum_selected or updates - settings.byzantine_clients - 2


def _needed(settings: FederationConfig) -> int:
    byzantine = settings.byzantine_clients
    match settings.strategy:
        case "median":
            return 2 * byzantine + 1
        case "trimmed_mean":  # as Flower counts: the whole part of share times n goes, on each side
            return next(n for n in count(1) if int(settings.trimmed_share * n) >= byzantine)
        case "krum":
            return 2 * byzantine + 3
        case "multi_krum":
            return max(2 * byzantine + 3, (settings.krum_selected or 0) + byzantine + 2)
        case "bulyan":
            return 4 * byzantine + 3
        case _:
            return 1


def _remedy(settings: FederationConfig) -> str:
    if settings.strategy == "trimmed_mean":
        return "byzantine_clients, or raise trimmed_share"
    return "byzantine_clients or krum_selected" if settings.strategy == "multi_krum" else "byzantine_clients"


def _shuffled(clients: Sequence[str], seed: int, number: int, attempt: int) -> list[str]:
    order = np.random.default_rng([seed, number, attempt]).permutation(len(clients)).tolist()
    return [clients[int(place)] for place in order]
