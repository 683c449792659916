"""Rates that settings leave open: in a whole training, after a kill, on clients, with privacy, as a command."""

import json
from dataclasses import replace

import pytest

from caravan.app.learning import Experiment
from caravan.config import PrivacyConfig, changed, config_from_dict
from caravan.data.catalogue import Catalogue
from caravan.data.records import Example
from caravan.errors import ConfigError, PrivacyError, StorageError
from caravan.storage import load
from caravan.training.features import FeatureStore
from caravan.training.rate import choose_rates
from caravan.training.trainer import fit
from command_line import run
from toy_experiments import DATASET, Raising, with_wrong_queries
from toy_training import LETTERS, Log, StoppedError, assert_same_bits

pytestmark = pytest.mark.usefixtures("vectors_are_kept_here", "few_queries_are_timed")
RATES = ("training.head.learning_rate", "training.adapter.learning_rate", "training.adapter.head_learning_rate")


def opened(config, **changes):
    return config_from_dict(changed(config.to_dict(), {**dict.fromkeys(RATES, "auto"), **changes}))


def test_a_training_writes_down_the_rates_it_chose_and_equals_one_with_these_numbers(settings, prepare):
    config = opened(settings(epochs=2))
    retriever = prepare(config).run()
    chosen = retriever.record["learning_rates"]
    assert retriever.record["config"]["training"]["head"]["learning_rate"] == "auto"
    assert set(chosen) == {"head", "adapter"}
    assert {"learning_rate", "head_learning_rate", "lines", "batches", "loss"} == set(chosen["adapter"])
    assert {"learning_rate", "lines", "batches", "loss", "held_out"} == set(chosen["head"])
    assert chosen["head"]["learning_rate"] in {tried["rate"] for tried in chosen["head"]["held_out"]}
    numbers = {name: chosen[name.split(".")[1]][name.split(".")[2]] for name in RATES}
    told = prepare(config_from_dict(changed(config.to_dict(), numbers))).run()
    assert "learning_rates" not in told.record
    assert_same_bits(retriever.trainable_state(), told.trainable_state())


@pytest.mark.parametrize("stage", ["head", "adapter"])
def test_a_resumed_training_keeps_the_rate_it_began_with(settings, prepare, tmp_path, monkeypatch, stage):
    config = opened(settings(epochs=3, checkpoint_seconds=1e-9))
    whole = prepare(config).run()
    stop = Raising(f"training the {stage}", StoppedError(), after=4)
    with pytest.raises(StoppedError):
        prepare(config, checkpoint=tmp_path / "c", report=stop).run()
    if stage == "adapter":  # all have been chosen: nothing is looked at again
        monkeypatch.setattr("caravan.app.rate.choose_rates", None)
    resumed = prepare(config, checkpoint=tmp_path / "c", resume=True)
    retriever = resumed.run()
    assert_same_bits(retriever.trainable_state(), whole.trainable_state())
    assert retriever.record["learning_rates"] == whole.record["learning_rates"]
    resumed.clear_checkpoint()
    assert not (tmp_path / "c").exists()


def test_the_head_is_raced_on_the_training_queries_alone_and_without_a_cache_too(settings, prepare):
    config = opened(settings(mode="head", epochs=2))
    chosen = prepare(config).run().record["learning_rates"]["head"]
    nothing = Experiment(replace(DATASET, test=()), config, store=FeatureStore())
    assert nothing.run().record["learning_rates"]["head"]["held_out"] == chosen["held_out"]
    assert max(tried["of"] for tried in chosen["held_out"]) == len(DATASET.train)


def test_what_a_race_is_given_trains_heads_on_its_part_of_the_queries_alone(settings, prepare, monkeypatch):
    seen = []

    def race(rate, examples, trial, **_):
        monkeypatch.setattr("caravan.app.learning.fit", watched)
        some, asked = examples[:30], " ".join(LETTERS["d2"])
        others = [Example(asked, ("d0", "d2")), Example(asked, ("d0", "d1")), Example(asked, ("d2",))]
        assert trial(some, others, 1e-3, None) == [True, False, True]
        monkeypatch.undo()
        seen.append(some)

    def watched(retriever, examples, stage, training, **parts):
        seen.append((list(examples), stage, training.mode, training.head.learning_rate))
        return fit(retriever, examples, stage, training, **parts)

    monkeypatch.setattr("caravan.app.rate.race", race)
    config = opened(settings(epochs=1))
    experiment = prepare(config)
    record = experiment.run().record["learning_rates"]
    (trained, some) = seen
    assert trained == (list(some), "head", "head", 1e-3)
    assert "held_out" not in record["head"]  # there was no winner


def test_a_race_that_is_killed_goes_on_with_the_trainings_it_has_not_done(settings, prepare, tmp_path, monkeypatch):
    config = opened(settings(mode="head", epochs=2))
    trainings = []

    def counted(*args, **parts):
        trainings.append(args[3].head.learning_rate)
        if len(trainings) == stop:
            raise StoppedError
        return fit(*args, **parts)

    monkeypatch.setattr("caravan.app.learning.fit", counted)
    stop = 0
    whole = prepare(config).run().record["learning_rates"]
    every, trainings[:], stop = list(trainings), [], 4
    with pytest.raises(StoppedError):
        prepare(config, checkpoint=tmp_path / "c").run()
    trainings[:], stop = [], 0
    assert prepare(config, checkpoint=tmp_path / "c", resume=True).run().record["learning_rates"] == whole
    assert trainings == every[3:]


def test_a_choice_of_other_settings_or_a_damaged_one_is_refused_before_anything_else(settings, prepare, tmp_path):
    config = opened(settings(mode="head", epochs=2))
    prepare(config, checkpoint=tmp_path / "c").run()
    (tmp_path / "c" / "head.safetensors").unlink()  # as after a kill while rates were raced
    with pytest.raises(StorageError, match=r"head\.rate\.safetensors"):
        prepare(replace(config, seed=99), checkpoint=tmp_path / "c", resume=True)
    (tmp_path / "c" / "head.rate.safetensors").write_bytes(b"junk")
    with pytest.raises(StorageError, match=r"head\.rate\.safetensors"):
        prepare(config, checkpoint=tmp_path / "c", resume=True)


def test_a_head_that_is_not_trained_is_not_raced(settings, prepare):
    config = opened(settings(epochs=1))
    none = replace(config, training=replace(config.training, head=replace(config.training.head, epochs=0)))
    assert "held_out" not in prepare(none).run().record["learning_rates"]["head"]


def with_titles(dataset):
    """The same with documents that say something, so that there are passages."""
    documents = [replace(document, title=f"letters {document.text}") for document in dataset.catalogue]
    return replace(dataset, catalogue=Catalogue(documents))


@pytest.fixture
def few_passages_will_do(monkeypatch):
    monkeypatch.setattr("caravan.app.rate._FEWEST_PASSAGES", 1)


@pytest.mark.usefixtures("few_passages_will_do")
def test_a_federation_chooses_once_on_passages_and_on_no_clients_queries(settings, prepare):
    config = opened(settings(epochs=2, passages=2, federation={"clients": 2, "rounds": 2}))
    log = Log()
    one = prepare(config, with_titles(DATASET), report=log)
    start = choose_rates(one.retriever, (), "head", config.training, passages=one.passages, seed=config.seed)
    chosen = one.run().record["learning_rates"]
    assert chosen["head"]["learning_rate"] == start.rates["learning_rate"]
    other = prepare(opened(settings(mode="head", epochs=2, passages=2, federation={"clients": 2, "rounds": 2})),
                    with_titles(with_wrong_queries(DATASET))).run()  # fmt: skip
    assert other.record["learning_rates"]["head"] == chosen["head"]
    tasks = [progress.task for progress in log.told if progress.task.startswith("choosing")]
    assert set(tasks) == {"choosing the head's learning rate", "choosing the adapter's learning rate"}


@pytest.mark.parametrize("passages", [0, 2])
def test_a_federation_with_too_few_passages_has_nothing_to_choose_on(settings, prepare, passages):
    line = rf"\d are too few \(training\.passages = {passages}; at least 32\); set it to a number"
    with pytest.raises(ConfigError, match=line):
        prepare(opened(settings(passages=passages, federation={"clients": 2})), with_titles(DATASET)).run()


@pytest.mark.parametrize("name", RATES)
def test_a_private_training_refuses_to_look_at_the_queries_for_a_rate(settings, prepare, name):
    private = PrivacyConfig(mode="dp-sgd", noise_multiplier=1.0, batch=12)
    config = config_from_dict(changed(replace(settings(), privacy=private).to_dict(), {name: "auto"}))
    with pytest.raises(PrivacyError, match=rf'{name} = "auto" would be worked out from the queries'):
        prepare(config)


def test_the_command_line_sets_it_and_tells_what_was_chosen(workshop):
    train = ("train", "-c", workshop.quick, "-o", "out", "--mode", "head", "--learning-rate")
    assert run(*train, "auto").code == 0
    record = load("out").record
    assert record["config"]["training"]["head"]["learning_rate"] == "auto"
    chosen = record["learning_rates"]["head"]["learning_rate"]
    assert chosen > 0
    assert json.loads(run("info", "out", "--json").out)["learning_rates"] == {"head.learning_rate": chosen}
    assert f"{chosen}" in run("info", "out").out
    outcome = run(*train, "fast")
    assert outcome.code == 2
    assert "'fast' is neither a number nor auto" in outcome.err


def test_a_setting_that_is_neither_a_number_nor_auto_is_refused(workshop):
    outcome = run("train", "-c", workshop.quick, "-o", "out", "--set", "training.head.learning_rate=fast")
    assert outcome.code in (1, 2)
    assert "training.head.learning_rate = 'fast': input should be a valid number" in outcome.err
