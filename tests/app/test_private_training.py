"""Training with privacy from the settings to the saved retriever, centrally and on simulated clients."""

import json
from dataclasses import replace

import pytest

from caravan.app.experiment import run_experiment
from caravan.config import PrivacyConfig
from caravan.errors import ConfigError, PrivacyError
from caravan.training.ledger import read_ledger
from toy_experiments import Raising
from toy_training import StoppedError, assert_same_bits, differ

pytestmark = pytest.mark.usefixtures("few_queries_are_timed", "ledger_folder")
PRIVATE = {"mode": "dp-sgd", "batch": 12, "noise_multiplier": 1.0}


def private(config, **settings):
    return replace(config, privacy=PrivacyConfig(**{**PRIVATE, **settings}))


def entries(folder):
    return [(entry.stage, entry.mechanism.steps) for _, own in read_ledger(folder) for entry in own]


def mechanisms(folder):
    return [entry.mechanism for _, own in read_ledger(folder) for entry in own]


def test_a_central_training_spends_what_its_record_says(settings, prepare, ledger_folder):
    retriever = prepare(private(settings(epochs=2))).run()
    assert entries(ledger_folder) == [("head", 4), ("head", 4), ("adapter", 4), ("adapter", 4)]
    facts = retriever.record["guarantees"]["all"]
    assert facts["steps"] == {"head": 8, "adapter": 8}
    assert facts["epsilon"] == pytest.approx(facts["all_runs"]["epsilon"])
    assert retriever.record["privacy"].startswith("Trained with differential privacy for each training query")
    history = retriever.record["history"]
    assert [epoch["loss"] for epoch in history] == [None] * 4  # of private data, and not noised
    assert [epoch["validation_recall"] for epoch in history] == [None] * 4
    spent = [epoch["epsilon"] for epoch in history]
    assert spent == sorted(spent)
    assert spent[-1] >= facts["epsilon"]


def test_two_trainings_on_the_same_data_add_up(settings, prepare):
    first = prepare(private(settings(mode="head", epochs=2))).run()
    second = prepare(private(settings(mode="head", epochs=2, seed=14))).run()
    one, two = (each.record["guarantees"]["all"] for each in (first, second))
    assert one["epsilon"] == two["epsilon"]
    assert two["all_runs"]["epsilon"] > 1.2 * one["all_runs"]["epsilon"]


def test_noise_is_not_repeated_with_the_seed(settings, prepare):
    config = private(settings(mode="head", epochs=1))
    assert differ(prepare(config).run().trainable_state(), prepare(config).run().trainable_state())


def test_clients_have_a_guarantee_each_and_weigh_the_same(settings, prepare):
    federation = {"partition": "column", "column": "site", "rounds": 2}
    retriever = prepare(private(settings(mode="head", epochs=2, federation=federation), batch=4)).run()
    guarantees = retriever.record["guarantees"]
    assert set(guarantees) == {"east", "north", "west"}
    assert guarantees["west"]["sampling"] == 0.5  # 8 queries, where east has 24
    assert guarantees["west"]["epsilon"] > guarantees["east"]["epsilon"]
    assert all(each["epsilon"] == pytest.approx(each["all_runs"]["epsilon"]) for each in guarantees.values())
    assert "client west's, the weakest of 3" in retriever.record["privacy"]
    assert all(
        report["examples"] == [1, 1, 1] for report in json.loads(json.dumps(retriever.record))["federation"]["rounds"]
    )


@pytest.mark.slow
def test_a_target_epsilon_is_each_clients_own(settings, prepare):
    federation = {"partition": "column", "column": "site", "rounds": 2}
    config = private(settings(mode="head", epochs=2, federation=federation), noise_multiplier=None, epsilon=4.0)
    facts = prepare(config).run().record["guarantees"]
    assert all(3.9 < each["epsilon"] <= 4.0 for each in facts.values())


def test_a_cap_stops_before_anything_is_trained(settings, prepare, ledger_folder):
    experiment = prepare(private(settings(mode="head", epochs=2), epsilon_cap=0.5))
    before = experiment.retriever.trainable_state()
    with pytest.raises(PrivacyError, match=r"epsilon_cap is 0\.5; nothing was done"):
        experiment.run()
    assert_same_bits(experiment.retriever.trainable_state(), before)
    assert entries(ledger_folder) == []


def test_a_killed_training_goes_on_and_its_ledger_never_falls(settings, prepare, ledger_folder, tmp_path):
    config = private(settings(mode="head", epochs=3, checkpoint_seconds=1e-9))
    with pytest.raises(StoppedError):
        prepare(config, checkpoint=tmp_path / "c", report=Raising("training the head", StoppedError(), after=6)).run()
    assert entries(ledger_folder) == [("head", 4), ("head", 4)]
    retriever = prepare(config, checkpoint=tmp_path / "c", resume=True).run()
    # Stopped in the second epoch after the snapshot of its first step: the three that are done anew are paid for again.
    assert entries(ledger_folder) == [("head", 4), ("head", 4), ("head", 3), ("head", 4)]
    facts = retriever.record["guarantees"]["all"]
    assert facts["all_runs"]["epsilon"] > facts["epsilon"]


def test_rivals_that_look_at_private_queries_are_not_measured(place, tmp_path):
    config = private(place.config(mode="head", epochs=1, evaluation={"baselines": True}))
    comparison, _ = run_experiment(config, tmp_path / "out")
    assert comparison is not None
    assert [row.name for row in comparison.rows] == ["BM25", "MIPS", "head"]
    record = json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))
    assert set(record["metrics"]) == {"BM25", "MIPS", "head"}
    assert "differential privacy" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        ({"head": {"start": "centroids"}}, "head.start"),
        ({"federation": {"clients": 2, "rows": "trained"}}, "federation.rows"),
        ({"federation": {"clients": 2, "codec": "int8", "sparse_rows": True}}, "federation.sparse_rows"),
        ({"federation": {"clients": 2, "keep": "best"}}, "federation.keep"),
    ],
)
def test_settings_that_show_what_privacy_hides_are_refused_before_the_work(settings, prepare, parts, what):
    with pytest.raises(ConfigError, match=what.replace(".", r"\.")):
        prepare(private(settings(**parts)))


@pytest.mark.parametrize(
    ("parts", "what"), [({"class_weights": "sqrt"}, "class_weights"), ({"patience": 2}, "patience")]
)
def test_statistics_of_private_queries_are_refused(settings, prepare, parts, what):
    with pytest.raises(PrivacyError, match=what):
        prepare(private(settings(mode="head", **parts))).run()


def test_a_client_without_a_plan_is_named(settings, prepare):
    config = private(settings(federation={"clients": 2}), noise_multiplier=None)
    with pytest.raises(PrivacyError, match=r"client client-0: privacy\.mode"):
        prepare(config)


def test_the_papers_mode_is_called_what_it_is(settings, prepare, ledger_folder):
    config = replace(settings(mode="head", epochs=3), privacy=PrivacyConfig(mode="paper", paper_warmup=1))
    record = prepare(config).run().record
    assert "no guarantee" in record["privacy"]
    assert record["guarantees"]["all"]["epsilon"] is None
    # What is not noised as accounted for is spent without limit: no cap holds on this data from now on.
    assert [(mechanism.noise_multiplier, mechanism.steps) for mechanism in mechanisms(ledger_folder)] == [(0.0, 18)]
    with pytest.raises(PrivacyError, match="infinity"):
        prepare(private(settings(mode="head", epochs=1), epsilon_cap=100.0)).run()


def client_level(config, **settings):
    return replace(config, privacy=PrivacyConfig(**{"mode": "client-level", "noise_multiplier": 0.1, **settings}))


def test_whole_clients_are_hidden_by_noise_of_the_servers(settings, prepare, ledger_folder):
    federation = {"partition": "column", "column": "site", "rounds": 2}
    config = settings(mode="adapter", epochs=2, federation=federation)
    first, second = (prepare(client_level(config)).run() for _ in range(2))
    assert differ(first.trainable_state(), second.trainable_state())
    assert "for each client as a whole" in first.record["privacy"]
    assert "4 rounds" in first.record["privacy"]  # two of each stage
    assert first.record["guarantees"]["clients"]["epsilon"] > 1
    assert not ledger_folder.exists()


@pytest.mark.parametrize("federation", [{}, {"clients": 5, "strategy": "median"}, {"clients": 2, "codec": "int8"}])
def test_whole_clients_are_hidden_in_an_average_of_clients_alone(settings, prepare, federation):
    with pytest.raises(ConfigError, match="client-level"):
        prepare(client_level(settings(mode="head", federation=federation)))
