from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from caravan.config import FederationConfig
from caravan.data.partition import partition
from caravan.data.records import Example
from caravan.errors import ConfigError, DataError


def made(n: int, *, labels: int = 4, **columns: str) -> list[Example]:
    return [Example(f"text {i}", (f"label{i % labels}",), f"train-{i}", dict(columns)) for i in range(n)]


def positions(examples, shards) -> list[list[int]]:
    return [[examples.index(example) for example in shard.examples] for shard in shards]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 60),
    clients=st.integers(1, 6),
    how=st.sampled_from(["iid", "dirichlet"]),
    alpha=st.sampled_from([0.05, 1.0, 100.0]),
    seed=st.integers(0, 5),
)
def test_every_example_goes_to_exactly_one_client_and_no_client_is_empty(n, clients, how, alpha, seed):
    examples = made(n)
    config = FederationConfig(clients=clients, partition=how, alpha=alpha)
    if clients > n:
        with pytest.raises(DataError, match="set fewer"):
            partition(examples, config, seed=seed)
        return
    try:
        shards = partition(examples, config, seed=seed)
    except DataError:
        # Uneven draws over few examples may leave a client empty however often they are repeated.
        assume(how == "iid")
        raise
    assert [shard.name for shard in shards] == [f"client-{number}" for number in range(clients)]
    dealt = positions(examples, shards)
    assert sorted(index for shard in dealt for index in shard) == list(range(n))
    assert all(shard and shard == sorted(shard) for shard in dealt)
    if how == "iid":
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_the_same_seed_gives_the_same_shards_and_another_seed_others():
    for how in ("iid", "dirichlet"):
        config = FederationConfig(clients=3, partition=how)
        first, again, other = (positions(made(60), partition(made(60), config, seed=seed)) for seed in (1, 1, 2))
        assert first == again != other


def test_a_large_alpha_deals_each_label_evenly_and_a_small_one_to_one_client():
    examples = made(400)

    def shares(alpha: float) -> list[float]:
        shards = partition(examples, FederationConfig(clients=2, partition="dirichlet", alpha=alpha), seed=3)
        counts = Counter(example.doc_ids[0] for example in shards[0].examples)
        return [counts[f"label{number}"] / 100 for number in range(4)]

    assert all(0.45 < share < 0.55 for share in shares(10_000.0))
    assert all(share < 0.05 or share > 0.95 for share in shares(0.001))


def test_dirichlet_shares_have_the_mean_and_variance_of_the_distribution():
    # Dirichlet(a, a, a): mean 1/3, variance (1/3)(2/3) / (3a + 1) = 0.0556 for a = 1.
    examples = made(3000, labels=300)
    shards = partition(examples, FederationConfig(clients=3, partition="dirichlet", alpha=1.0), seed=0)
    counts = Counter(example.doc_ids[0] for example in shards[0].examples)
    shares = [counts[f"label{number}"] / 10 for number in range(300)]
    mean = sum(shares) / 300
    assert mean == pytest.approx(1 / 3, abs=0.05)
    assert sum((share - mean) ** 2 for share in shares) / 300 == pytest.approx(0.0556, abs=0.015)


def test_a_column_gives_one_client_per_value_in_sorted_order():
    examples = [Example("a", ("x",), "1", {"site": "south"}), Example("b", ("x",), "2", {"site": "north"})]
    shards = partition(examples * 2, FederationConfig(partition="column", column="site"), seed=0)
    assert [(shard.name, [example.text for example in shard.examples]) for shard in shards] == [
        ("north", ["b", "b"]),
        ("south", ["a", "a"]),
    ]


@pytest.mark.parametrize(
    ("examples", "settings", "error", "said"),
    [
        (made(2), {"clients": 3}, DataError, "2 training examples cannot be dealt to 3 clients"),
        (made(2), {"clients": 0}, ConfigError, "federation.clients is 0"),
        (made(2), {"partition": "column"}, ConfigError, "needs federation.column"),
        (
            made(2, site="n"),
            {"partition": "column", "column": "shop"},
            DataError,
            "'train-0' has no value in the column 'shop'",
        ),
        (made(2, site=""), {"partition": "column", "column": "site"}, DataError, "its columns are: 'site'"),
        ([], {"partition": "column", "column": "site"}, DataError, "no training examples"),
        (
            made(40, labels=1),
            {"clients": 20, "partition": "dirichlet", "alpha": 0.001},
            DataError,
            "raise federation.alpha or set fewer federation.clients",
        ),
    ],
)
def test_an_impossible_partition_is_refused_with_the_remedy(examples, settings, error, said):
    with pytest.raises(error) as caught:
        partition(examples, FederationConfig(**settings), seed=0)
    assert said in str(caught.value)
