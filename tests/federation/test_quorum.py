import pytest

from caravan.config import FederationConfig
from caravan.errors import ConfigError
from caravan.federation.quorum import check_settings, quorum, safe_selection, sample, sample_again

CLIENTS = [f"c{index}" for index in range(20)]


# Who is asked


def test_all_clients_are_asked_unless_a_number_is_set():
    assert sample(CLIENTS, FederationConfig(), seed=3, number=1) == CLIENTS


def test_the_draw_depends_on_seed_and_round_alone_and_keeps_the_clients_order():
    settings = FederationConfig(clients_per_round=6)
    draws = {
        (seed, number): sample(CLIENTS, settings, seed=seed, number=number) for seed in (0, 13) for number in (1, 2, 3)
    }
    for (seed, number), drawn in draws.items():
        assert drawn == sample(CLIENTS, settings, seed=seed, number=number)
        assert len(set(drawn)) == 6
        assert drawn == sorted(drawn, key=CLIENTS.index)
    assert len({tuple(drawn) for drawn in draws.values()}) == 6


def test_every_client_is_drawn_about_equally_often():
    settings = FederationConfig(clients_per_round=5)
    drawn = [client for number in range(400) for client in sample(CLIENTS, settings, seed=1, number=number)]
    counts = [drawn.count(client) for client in CLIENTS]
    assert sum(counts) == 2000
    assert min(counts) > 70  # 100 is expected, 8.7 its standard deviation
    assert max(counts) < 130


def test_a_retry_asks_others_first_and_the_failed_again_when_there_are_no_others():
    def again(asked, failed):
        return sample_again(CLIENTS, asked, failed, seed=1, number=2, attempt=1)

    others = again(CLIENTS[:10], CLIENTS[:3])
    assert len(others) == 3
    assert set(others) <= set(CLIENTS[10:])
    mixed = again(CLIENTS[:19], CLIENTS[:3])
    assert "c19" in mixed
    assert len(set(mixed) & set(CLIENTS[:3])) == 2
    assert again(CLIENTS, ["c4", "c2"]) == ["c2", "c4"]
    assert others == again(CLIENTS[:10], CLIENTS[:3])


# How many are needed


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({"strategy": "fedavg"}, 1),
        ({"strategy": "fedyogi", "min_clients": 4}, 4),
        ({"strategy": "median", "byzantine_clients": 2}, 5),
        ({"strategy": "median", "byzantine_clients": 2, "min_clients": 6}, 6),
        ({"strategy": "trimmed_mean", "byzantine_clients": 2, "trimmed_share": 0.2}, 10),
        ({"strategy": "trimmed_mean", "byzantine_clients": 1, "trimmed_share": 0.3}, 4),
        ({"strategy": "trimmed_mean", "byzantine_clients": 0}, 1),
        ({"strategy": "krum", "byzantine_clients": 2}, 7),
        ({"strategy": "multi_krum", "byzantine_clients": 2}, 7),
        ({"strategy": "multi_krum", "byzantine_clients": 2, "krum_selected": 6}, 10),
        ({"strategy": "bulyan", "byzantine_clients": 2}, 11),
    ],
)
def test_a_round_needs_what_the_user_asks_or_what_the_strategys_proof_asks(settings, needed):
    config = FederationConfig(**settings)
    assert quorum(config)[0] == needed
    check_settings(config, needed)
    with pytest.raises(ConfigError) as caught:
        check_settings(config, needed - 1)
    assert "\n" not in str(caught.value)


def test_multi_krum_averages_as_many_as_are_safe_or_as_are_asked_for():
    assert safe_selection(FederationConfig(strategy="multi_krum", byzantine_clients=2), 10) == 6
    assert safe_selection(FederationConfig(strategy="multi_krum", byzantine_clients=2, krum_selected=3), 10) == 3


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"clients_per_round": 9}, "federation.clients_per_round is 9, there are 8 clients; lower it"),
        ({"min_clients": 9}, "federation.min_clients is 9, there are 8 clients; lower it"),
        ({"clients_per_round": 4, "min_clients": 5}, "min_clients is 5, federation.clients_per_round is 4; lower it"),
        (
            {"strategy": "bulyan", "byzantine_clients": 2},
            'strategy = "bulyan" with byzantine_clients = 2 needs 11 usable updates a round, a round asks 8; '
            "set more federation.clients or clients_per_round, or lower byzantine_clients",
        ),
        (
            {"strategy": "krum", "clients_per_round": 4},
            'strategy = "krum" with byzantine_clients = 1 needs 5 usable updates a round, a round asks 4',
        ),
        (
            {"strategy": "trimmed_mean", "byzantine_clients": 2},
            "byzantine_clients = 2 and trimmed_share = 0.2 needs 10 usable .* or raise trimmed_share",
        ),
        ({"strategy": "multi_krum", "krum_selected": 6}, "and krum_selected = 6 needs 9 usable"),
    ],
)
def test_settings_that_eight_clients_can_never_meet_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        check_settings(FederationConfig(**settings), 8)


# Where the server sees a sum alone


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"strategy": "krum"}, 'strategy = "krum" needs each; use fedavg, fedprox'),
        ({"max_update_norm": 1.0}, "max_update_norm is about each; leave it out"),
        ({"rows": "trained"}, 'needs to see who changed a row; set it to "all"'),
        ({"codec": "int8"}, 'set codec to "none", not "int8"'),
        ({"max_examples": None}, "set it to the largest client's example count"),
        ({"clients_per_round": 2}, "of 3 to 1024 clients; a round asks 2"),
    ],
)
def test_what_needs_single_updates_is_refused_with_secure_aggregation(changes, reason):
    settings = {"secure_aggregation": True, "max_examples": 100}
    check_settings(FederationConfig(**settings), 20)
    with pytest.raises(ConfigError, match=reason):
        check_settings(FederationConfig(**{**settings, **changes}), 20)
