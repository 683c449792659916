"""The federated and the private experiments from a tiny corpus to their tables, and what their arithmetic must give."""

import math
import os
from dataclasses import replace

import numpy as np
import pytest

from caravan.app.communication import TRAININGS
from caravan.app.reproduction import central_vs_federated, communication
from caravan.app.reproduction.alone import own_places
from caravan.app.reproduction.clients import Presence, worst_fall
from caravan.app.reproduction.communication import Link
from caravan.app.reproduction.federations import difference, packed, settled, thinned, unpacked
from caravan.app.reproduction.frame import read_results, read_settings
from caravan.app.reproduction.ledgers import own_ledger
from caravan.app.reproduction.privacy_sweep import Point, Setting, front, grid
from caravan.app.reproduction.runner import Request, reproduce
from caravan.config import BackboneConfig, changed, config_from_dict
from caravan.errors import FederationError, TrainingError
from caravan.federation.local import train_client
from caravan.training.ledger import default_folder
from command_line import write_table
from tiny_models import make_tiny_bert
from toy_experiments import DATASET, toy_dataset
from toy_training import CATALOGUE

_SHORT = {"federation.rounds": 2, "training.head.epochs": 2, "federation.strategy": "fedavgm"}
_TINY = {
    "central-vs-federated": {
        **{"datasets": ["letters"], "classes": 4, "train": 30, "test": 20, "epochs": 2, "rounds": 2},
        **{"clients": [1, 2, 3], "adapter_clients": [2]},
    },
    "privacy": {
        **{"datasets": ["letters"], "train": 40, "test": 20, "epochs": {"head": 2, "adapter": 1}, "paper_warmup": 1},
        **{"accounted_epochs": {"head": 2, "adapter": 1}, "epsilons": [1, 8]},
    },
    "privacy-sweep": {
        **{"datasets": ["letters"], "train": 40, "test": 20, "noise": [0.5, 2.0], "clip": [1.0], "epochs": [2]},
        **{"paper_noise": [0.5], "paper_epochs": [2], "paper_warmup": [0, 1], "passages": [0]},
    },
    "communication": {
        **{"datasets": ["letters"], "classes": 4, "train": 20, "test": 20, "head_epochs": 1, "adapter_epochs": 2},
        **{"methods": ["full/none", "core/int8"], "drawn": ["full/none"], "counted_clients": [1, 3]},
    },
    "heterogeneity": {
        "own_queries": 10,
        "local_test": 10,
        "methods": {"short": _SHORT},
        "cases": [
            {
                **{"data": "letters", "column": "site", "epochs": 2},
                "methods": ["central", "fedavg", "short", "local", "personal"],
            },
            {"data": "letters", "alpha": 0.5, "clients": 3, "epochs": 2, "methods": ["central", "fedavg", "local"]},
            {"data": "not_here", "column": "site", "epochs": 2, "methods": ["central"]},
        ],
    },
    "clients": {
        **{"datasets": ["letters"], "classes": 4, "train": 40, "test": 20, "clients": 3, "rounds": 4},
        "presences": {"all": {}, "away 30%": {"chance": 0.3}, "one comes at half time": {"late": 1}},
        "servers": {"fedadam": {}},
    },
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Request:
    """A request for the quick form on a data set of letters with three sites."""
    root = tmp_path_factory.mktemp("tiny")
    dataset = toy_dataset(72, test=30)
    sites = [example.columns["site"] for example in dataset.train]
    for split in ("train", "test"):
        examples = getattr(dataset, split)
        rows = [(example.text, example.doc_ids[0], sites[place]) for place, example in enumerate(examples)]
        write_table(root / "data" / "letters" / f"{split}.csv", ("text", "label", "site"), rows)
    documents = [(document.doc_id, document.text) for document in CATALOGUE]
    write_table(root / "data" / "letters" / "documents.csv", ("doc_id", "text"), documents)
    backbone = BackboneConfig(name=str(make_tiny_bert(root / "bert")), max_tokens=24)
    return Request(out=root / "out", quick=True, data=root / "data", backbone=backbone)


@pytest.fixture(scope="module")
def chapters(tiny: Request) -> dict:
    found = {}
    for name, changes in _TINY.items():
        (found[name],) = reproduce([name], replace(tiny, changes=changes))
    return found


@pytest.mark.parametrize("name", _TINY)
def test_an_experiment_runs_from_a_tiny_corpus_to_its_files(name, tiny, chapters):
    findings = chapters[name].findings
    assert findings.charts
    for table in findings.tables:
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.columns)}
    for chart in findings.charts:
        assert (tiny.out / name / f"{chart.name}.png").stat().st_size > 1000


@pytest.mark.parametrize("name", _TINY)
def test_running_again_measures_nothing_and_finds_the_same(name, tiny, chapters, monkeypatch):
    before = read_results(tiny.out / name)

    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr("caravan.app.learning.Experiment.run", refuse)
    (again,) = reproduce([name], replace(tiny, changes=_TINY[name]))
    assert again.findings == chapters[name].findings
    assert read_results(tiny.out / name)["measures"] == before["measures"]


def test_one_client_loses_nothing_and_times_of_all_clients_are_there(tiny, chapters):
    table = chapters["central-vs-federated"].findings.tables[0]
    by_cell = {(row[1], row[2]): row for row in table.rows}
    assert set(by_cell) == {("head", "1"), ("head", "2"), ("adapter", "2"), ("head", "3")}
    measures = read_results(tiny.out / "central-vs-federated")["measures"]
    rounds = next(one["value"]["head"]["rounds"] for key, one in measures.items() if "/3 clients/" in key)
    assert [len(each["local"]) for each in rounds] == [3, 3]
    claims = chapters["central-vs-federated"].findings.claims
    assert [claim.paper for claim in claims] == ["< 0.5 points", "1.75x", "2.62x"]


def test_the_papers_noise_is_never_called_private(chapters):
    loss, guarantee = chapters["privacy"].findings.claims
    assert guarantee.verdict == "not confirmed"
    assert guarantee.ours.startswith("epsilon infinity")
    assert loss.verdict == "not testable here"
    assert "AG News is not here" in loss.reason
    rows = {row[2]: row for row in chapters["privacy"].findings.tables[0].rows}
    assert rows["paper"][3] == "infinity"
    assert float(rows["dp-sgd, 1"][3]) <= 1
    assert float(rows["dp-sgd-adaptive, 8"][3]) <= 8


def test_private_experiments_leave_no_trace_in_the_users_ledger(tiny, chapters, monkeypatch, tmp_path):
    monkeypatch.setenv("CARAVAN_LEDGER", str(tmp_path / "ledger"))
    reproduce(["privacy"], replace(tiny, changes=_TINY["privacy"] | {"epsilons": [4]}))
    assert not (tmp_path / "ledger").exists()
    with own_ledger():
        assert default_folder() != tmp_path / "ledger"
        assert default_folder().is_dir()
    assert os.environ["CARAVAN_LEDGER"] == str(tmp_path / "ledger")


def test_the_bytes_of_a_round_grow_with_the_clients_and_shrink_with_the_codec(chapters):
    sent, _, by_clients, _ = chapters["communication"].findings.tables
    one, three = ([int(cell.replace(",", "")) for cell in row[1:3]] for row in by_clients.rows)
    assert three == [3 * count for count in one]
    full, core = (int(row[6].replace(",", "")) for row in sent.rows)
    assert core < full


def test_data_that_are_not_here_are_left_out_and_named(chapters):
    findings = chapters["heterogeneity"].findings
    assert len(findings.tables) == 2
    assert any("not_here" in note for note in findings.notes)


def test_local_training_and_personal_heads_have_their_rows(chapters):
    table = chapters["heterogeneity"].findings.tables[0]
    rows = {row[0]: row for row in table.rows}
    assert list(rows) == ["central", "fedavg", "short", "local", "personal"]
    assert rows["personal"][1] == ""  # a head for one client's queries is not asked others'
    assert all(rows[method][5] for method in rows)  # each has recall on clients' own queries
    assert rows["central"][3] == ""


def test_away_clients_are_counted_and_missing_rounds_are_no_failure_of_the_run(chapters):
    rows = {(row[0], row[1]): row for row in chapters["clients"].findings.tables[0].rows}
    assert rows["all", "fedavg"][2] == "0"
    assert rows["one comes at half time", "fedavg"][2] == "2"  # rounds 1 and 2 of 4
    assert rows["away 30%", "fedavg"][2] == rows["away 30%", "fedadam"][2]


def test_a_client_that_fails_is_no_client_that_is_away(tiny, monkeypatch):
    def train_all_but_one(retriever, client, *rest, **options):
        if client == "client-1":
            raise TrainingError("the loss is nan")
        return train_client(retriever, client, *rest, **options)

    monkeypatch.setattr("caravan.app.learning.train_client", train_all_but_one)
    changes = _TINY["clients"] | {"presences": {"all": {}}, "servers": {}, "presences_by_server": []}
    with pytest.raises(FederationError, match="round 1, client-1: TrainingError: the loss is nan; repair it"):
        reproduce(["clients"], replace(tiny, out=tiny.out / "broken", changes=changes))


# By hand.


def test_amdahls_share_is_found_again():
    speeds = [(clients, 1 / (0.2 + 0.8 / clients)) for clients in (1, 2, 3, 8)]
    assert central_vs_federated.serial_share(speeds) == pytest.approx(0.2)
    # 1 / 1.6 - 1/2 = 0.125 over 1 - 1/2: a quarter.
    assert central_vs_federated.serial_share([(2, 1.6)]) == pytest.approx(0.25)
    assert central_vs_federated.serial_share([(2, 2.0), (4, 4.0)]) == pytest.approx(0.0, abs=1e-12)
    assert central_vs_federated.serial_share([(1, 1.0)]) is None
    assert central_vs_federated.amdahl(0.25, 2) == pytest.approx(1.6)


def test_a_critical_path_is_each_rounds_slowest_client_and_all_of_the_server():
    rounds = [{"local": [1.0, 3.0], "server": 0.5}, {"local": [2.0, 1.0], "server": 0.25}]
    assert central_vs_federated.critical_path(rounds) == (5.75, 0.75)


def test_a_link_takes_bits_by_rate_and_two_latencies():
    assert Link(1e6, 50).seconds(125_000, 125_000) == pytest.approx(2.1)  # 2,000,000 bits and 0.1 s
    assert Link(56e3, 0).seconds(7_000, 0) == pytest.approx(1.0)
    assert str(Link(56e3, 10)) == "56 kbit/s, 10 ms"
    assert str(Link(100e6, 200)) == "100 Mbit/s, 200 ms"
    parts = [{"up": 100_000, "down": 150_000, "seconds": 12.0, "rounds": 2}]
    sent = communication.Sent("full", "none", parts, clients=3)
    assert sent.round_seconds(Link(1e6, 50)) == pytest.approx(12 / 6 + 2.0 + 0.1)


def test_a_front_has_what_nothing_beats_and_only_what_is_proved():
    def point(epsilon, recall, mode="dp-sgd"):
        return Point(Setting(mode, 1.0, 1.0, 1, 0), epsilon, (recall,), (recall,))

    best = [point(1.0, 80.0), point(3.0, 90.0), point(9.0, 95.0)]
    beaten = [point(2.0, 79.0), point(3.0, 85.0), point(10.0, 95.0), point(math.inf, 99.0)]
    unproved = [point(0.5, 99.0, "paper")]
    assert front([*beaten, *unproved, *reversed(best)]) == best


def test_the_grid_holds_every_setting_but_those_without_any_noise():
    settings = {"noise": [0.1, 1.0], "clip": [1.0], "epochs": [2], "passages": [0, 8]}
    settings |= {"paper_noise": [0.1], "paper_clipping": ["batch"], "paper_epochs": [2], "paper_warmup": [0, 1, 2]}
    found = list(grid(settings))
    assert [each.mode for each in found] == ["dp-sgd"] * 4 + ["paper"] * 2
    assert max(each.warmup for each in found if each.mode == "paper") == 1


def test_a_difference_is_paired_by_query():
    ours, theirs = [True, True, True, False], [True, False, True, False]
    assert unpacked(packed(ours)).tolist() == [1, 1, 1, 0]
    mean, low, high = difference([packed(ours)], [packed(theirs)])
    # 0, 100, 0, 0 points: mean 25, standard deviation 50, standard error 25.
    assert mean == pytest.approx(25)
    assert (low, high) == (pytest.approx(25 - 1.96 * 25), pytest.approx(25 + 1.96 * 25))
    same = difference([packed(ours), packed(theirs)], [packed(theirs), packed(ours)])
    assert same == (0, 0, 0)  # over seeds each query's mean
    assert unpacked(packed([True] * 9)).shape == np.ones(9).shape
    assert "do not settle" in settled(-0.1, 0.6, 0.5)
    assert "one side" in settled(0.6, 0.9, 0.5)


def test_presence_is_drawn_once_and_never_leaves_a_round_empty():
    late = Presence(4, 10, late=1, leaving=1)
    there = {number: [place for place in range(4) if not late.away(place, number)] for number in range(1, 11)}
    assert all(there[number] == [0, 1, 2] for number in range(1, 6))
    assert all(there[number] == [1, 2, 3] for number in range(6, 11))
    often = Presence(3, 50, chance=0.95, seed=7)
    counted = [sum(not often.away(place, number) for place in range(3)) for number in range(1, 51)]
    assert min(counted) == 1
    again = Presence(3, 50, chance=0.95, seed=7)
    assert counted == [sum(not again.away(place, number) for place in range(3)) for number in range(1, 51)]
    half = Presence(10, 200, chance=0.5)
    missed = sum(half.away(place, number) for place in range(10) for number in range(1, 201))
    assert 900 < missed < 1100


def test_the_worst_fall_is_between_neighbours():
    assert worst_fall([10.0, 30.0, 25.0, 26.0, 18.0, 40.0]) == 8.0
    assert worst_fall([10.0, 20.0]) == 0.0


def test_a_long_curve_keeps_its_last_point_and_marks_that_can_be_told_apart():
    assert thinned(list(range(1, 101)), 20) == list(range(5, 101, 5))
    assert thinned([1, 2, 3, 4, 5, 6, 7], 3) == [1, 4, 7]
    assert thinned([1, 2, 3], 20) == [1, 2, 3]
    assert thinned([]) == []


def test_own_queries_are_of_clients_with_enough_in_train():
    asked = replace(DATASET, test=[replace(example, columns={"site": site}) for example, site in _asked()])
    # 48 in train: 24 of the east, 16 of the north, 8 of the west.
    assert own_places(asked, "site", 16) == {"east": [0, 2], "north": [1]}
    assert own_places(asked, None, 1) == {}


def _asked():
    return zip(DATASET.test[:4], ("east", "north", "east", "west"), strict=True)


@pytest.mark.parametrize("quick", [True, False])
def test_shipped_settings_name_only_what_there_is(quick):
    uneven, presences, sent = (
        read_settings(name, quick=quick) for name in ("heterogeneity", "clients", "communication")
    )
    for changes in (*uneven["methods"].values(), *presences["servers"].values()):
        config_from_dict(changed({}, changes))
    known = {"central", "fedavg", "local", "personal", *uneven["methods"]}
    for case in uneven["cases"]:
        assert known.issuperset(case["methods"])
        assert case["methods"][0] == "central"  # what the others are held against
    for changes in presences["presences"].values():
        Presence(presences["clients"], presences["rounds"], **changes)
    assert set(presences["presences_by_server"]) <= set(presences["presences"])
    trainings = {f"{method}/{codec}" for method, codec in TRAININGS}
    assert trainings.issuperset(sent["methods"])
    drawn = [method for method in sent["methods"] if method in sent["drawn"]]
    assert drawn
    assert len(drawn) <= 7  # colours that can be told apart
