"""Which clients a run asks round by round, and what happens when too few of them answer."""

import pytest

from caravan.config import FederationConfig
from caravan.errors import ConfigError, FederationError
from caravan.federation.flower import Failure, run_federation
from caravan.federation.quorum import sample
from toy_federation import SITES, assert_same_bits, plain_loop, start_tensors, toy_train

TEN = [f"client {index}" for index in range(10)]


def test_a_drawn_part_of_the_clients_is_asked_and_reported_and_a_resumed_run_draws_the_same():
    calls, reports = [], []

    def note(client, tensors, round_number):
        calls.append((round_number, client))
        return toy_train(client, tensors, round_number)

    def run(tensors, first_round):
        reports.clear()
        settings = FederationConfig(clients_per_round=4)
        kept = {}
        run_federation(
            tensors,
            TEN,
            note,
            rounds=3,
            settings=settings,
            seed=7,
            first_round=first_round,
            on_round=lambda report, after: (reports.append(report), kept.update({report.round: after})),
        )
        return kept

    whole, asked = run(start_tensors(), 1), []
    asked = [report.asked for report in reports]
    assert [(number, client) for number, drawn in enumerate(asked, start=1) for client in drawn] == calls
    assert [report.clients for report in reports] == asked
    assert {len(drawn) for drawn in asked} == {4}
    assert len(set(asked)) > 1
    assert_same_bits(run(whole[1], 2)[3], whole[3])
    assert [report.asked for report in reports] == asked[1:]


def failing(*names, rounds=(1,), times=1):
    """Training that fails for these clients, the first times they are asked in these rounds."""
    left = {(name, number): times for name in names for number in rounds}

    def local_train(client, tensors, round_number):
        if left.get((client, round_number), 0):
            left[client, round_number] -= 1
            raise ConnectionError("gone")
        return toy_train(client, tensors, round_number)

    return local_train


def test_a_round_that_misses_its_quorum_keeps_what_it_has_and_asks_the_failed_again():
    calls = []
    local_train = failing("lima")

    def note(client, tensors, round_number):
        calls.append(client)
        return local_train(client, tensors, round_number)

    reports = []
    tensors = run_federation(
        start_tensors(),
        SITES,
        note,
        rounds=1,
        settings=FederationConfig(min_clients=3),
        on_round=lambda report, _: reports.append(report),
    )
    assert calls == ["oslo", "lima", "pune", "lima"]
    assert_same_bits(tensors, plain_loop(SITES, range(1, 2)))
    (report,) = reports
    assert (report.asked, report.clients, report.failures) == (tuple(SITES), tuple(SITES), ())
    assert report.retried == (Failure("lima", "ConnectionError: gone"),)
    assert report.traffic["lima"]["down"] == 2 * report.traffic["pune"]["down"]


def test_a_round_of_drawn_clients_asks_others_in_the_place_of_those_that_failed():
    settings = FederationConfig(clients_per_round=4, min_clients=4)
    drawn = sample(TEN, settings, seed=7, number=1)
    reports = []
    run_federation(
        start_tensors(),
        TEN,
        failing(*drawn[:2], times=9),
        rounds=1,
        settings=settings,
        seed=7,
        on_round=lambda report, _: reports.append(report),
    )
    (report,) = reports
    assert len(report.clients) == 4
    assert set(report.clients) & set(drawn) == set(drawn[2:])
    assert set(report.asked) == set(report.clients) | set(drawn)
    assert [failure.client for failure in report.failures] == drawn[:2]
    assert report.retried == report.failures


def test_a_round_that_has_its_quorum_asks_nobody_again():
    reports = []
    run_federation(start_tensors(), SITES, failing("lima"), rounds=1, on_round=lambda report, _: reports.append(report))
    assert reports[0].clients == ("oslo", "pune")
    assert reports[0].retried == ()


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_after_the_last_retry_the_run_ends_with_every_reason(retries):
    settings = FederationConfig(min_clients=2, round_retries=retries)
    with pytest.raises(FederationError) as caught:
        run_federation(start_tensors(), SITES, failing("lima", "pune", times=retries + 1), rounds=1, settings=settings)
    attempts = f" in {retries + 1} attempts" if retries else ""
    assert str(caught.value) == (
        f"round 1: 1 of 3 clients sent a usable update{attempts}, min_clients is 2 "
        "(lima, pune: ConnectionError: gone); repair those clients or ask less of a round"
    )


def test_a_robust_strategy_does_not_go_below_the_number_that_it_can_defend():
    settings = FederationConfig(strategy="krum", byzantine_clients=3, round_retries=0)
    with pytest.raises(FederationError, match=r"8 of 10 .* with byzantine_clients = 3 needs 9 usable updates a round"):
        run_federation(start_tensors(), TEN, failing(*TEN[:2]), rounds=1, settings=settings)


def test_settings_that_no_round_can_meet_are_refused_before_a_client_is_asked():
    def never(client, tensors, round_number):
        raise AssertionError("nobody is to be asked")

    with pytest.raises(ConfigError, match='strategy = "krum"'):
        run_federation(start_tensors(), SITES, never, rounds=1, settings=FederationConfig(strategy="krum"))


def test_in_process_no_client_is_cut_short():
    settings = FederationConfig(round_seconds=1e-9)
    assert_same_bits(
        run_federation(start_tensors(), SITES, toy_train, rounds=2, settings=settings), plain_loop(SITES, range(1, 3))
    )
