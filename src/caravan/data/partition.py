"""Examples to client shards: at random, by a Dirichlet draw per label, or by a column."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from caravan.config import FederationConfig
from caravan.data.records import Example
from caravan.data.splits import select
from caravan.data.tables import listed, shown
from caravan.errors import ConfigError, DataError

_DRAWS = 100  # a Dirichlet draw that leaves a client with nothing is drawn again, this many times


@dataclass(frozen=True)
class Shard:
    """What one client holds.

    Attributes:
        name: the client's name; by column, the column's value.
        examples: one or more examples, in the order they came in.
    """

    name: str
    examples: Sequence[Example]


def partition(examples: Sequence[Example], config: FederationConfig, *, seed: int) -> list[Shard]:
    """Deal examples to clients; every example goes to exactly one, and no client gets none.

    Args:
        examples: n examples of train.
        config: `partition` says how. "iid": at random, sizes differ by at most one. "dirichlet": each label's
            examples (an example's first document is its label) are dealt in proportions drawn from
            Dirichlet(alpha, ..., alpha) over the clients (Yurochkin et al., arXiv:1905.12022, section 4).
            "column": one client per value of `column`, in sorted order; `clients` is not looked at.
        seed: of the draw; the same seed gives the same shards.

    Raises:
        ConfigError: no number of clients, or no column, is set.
        DataError: a client would be empty, or an example has no value in the column.
    """
    if config.partition == "column":
        return _by_column(examples, config.column)
    if config.clients < 1:
        raise ConfigError(f"federation.clients is {config.clients}; set it to the number of clients, 1 or more")
    if config.clients > len(examples):
        what = f"{len(examples)} training examples cannot be dealt to {config.clients} clients"
        raise DataError(f"{what} without an empty one; set fewer federation.clients")
    generator = np.random.default_rng(seed)
    if config.partition == "iid":
        owners = generator.permutation(np.arange(len(examples)) % config.clients)
    else:
        owners = _dirichlet_owners(examples, config.clients, config.alpha, generator)
    return [
        Shard(f"client-{client}", select(examples, np.flatnonzero(owners == client).tolist()))
        for client in range(config.clients)
    ]


def _dirichlet_owners(
    examples: Sequence[Example], clients: int, alpha: float, generator: np.random.Generator
) -> np.ndarray:
    """The client of each example, int64 (n,)."""
    by_label: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        by_label.setdefault(example.doc_ids[0], []).append(index)
    owners = np.zeros(len(examples), dtype=np.int64)
    for _ in range(_DRAWS):
        for members in by_label.values():
            shares = generator.dirichlet(np.full(clients, alpha))
            cuts = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
            for client, part in enumerate(np.split(generator.permutation(members), cuts)):
                owners[part] = client
        if len(np.unique(owners)) == clients:
            return owners
    what = f"{_DRAWS} Dirichlet draws with alpha {alpha:g} each left one of {clients} clients without an example"
    raise DataError(f"{what}; raise federation.alpha or set fewer federation.clients")


def _by_column(examples: Sequence[Example], column: str | None) -> list[Shard]:
    if not column:
        raise ConfigError('federation.partition = "column" needs federation.column, the name of the column')
    members: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        value = example.columns.get(column, "")
        if not value:
            where = f"example {shown(example.query_id)} has no value in the column {shown(column)}"
            raise DataError(f"{where}; its columns are: {listed(list(example.columns)) or 'none'}")
        members.setdefault(value, []).append(index)
    if not members:
        raise DataError("there are no training examples to deal to clients; give some")
    return [Shard(value, select(examples, members[value])) for value in sorted(members)]
