"""Every fault that the doctor knows is built into a real training and found, the right remedy first."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from caravan.app.doctor import examine
from caravan.app.wording import read_texts
from caravan.config import AdapterConfig, DataConfig, PrivacyConfig
from caravan.data.catalogue import Catalogue
from caravan.data.dataset import Dataset
from caravan.data.records import Document, Example
from caravan.model import encoder
from caravan.training.progress import Progress
from command_line import check_refused, run
from toy_experiments import toy_dataset
from toy_training import Log

pytestmark = pytest.mark.usefixtures("ledger_folder")
LETTERS = toy_dataset(96)
MANY = toy_dataset(1000)
FEW = toy_dataset(24, noise=0.7, validation=60)
CLIENTS = {"clients": 3, "rounds": 10}
UNEVEN = {"clients": 4, "partition": "dirichlet", "alpha": 0.05, "rounds": 2}
PRIVATE = PrivacyConfig(mode="dp-sgd", noise_multiplier=0.8, batch=250)


def mixed_lengths() -> Dataset:
    """Every eighth query is twenty letters long, the others one or two; so few that batches cannot be sorted."""
    examples = [replace(each, text=each.text[:3]) for each in LETTERS.train[:28]]
    for place in range(0, len(examples), 8):
        examples[place] = replace(examples[place], text=" ".join("abcdefghijklmnopqrst"))
    return replace(LETTERS, train=examples)


def words() -> Dataset:
    """Words, of which a tokenizer of letters makes pieces."""
    names = ("bicycle", "invoice", "password", "delivery")
    catalogue = Catalogue([Document(name, f"about the {name} section") for name in names])
    train = [Example(f"question number {place} {names[place % 4]}", (names[place % 4],)) for place in range(40)]
    return Dataset("words", catalogue, train, train[:8], ())


@pytest.fixture
def record(settings, prepare):
    """Trains for real and gives the record as it would be read from disk."""

    def record(dataset=LETTERS, *, privacy=None, adapter=None, **parts):
        config = settings(**{"mode": "head", "epochs": 20, **parts})
        config = config if privacy is None else replace(config, privacy=privacy)
        config = config if adapter is None else replace(config, adapter=AdapterConfig(kind=adapter, rank=4))
        return json.loads(json.dumps(prepare(config, dataset).run().record))

    return record


FAULTS = {
    "the learning rate is too high": ({"rate": 5.0}, "training.head.learning_rate=0.5"),
    "the learning rate is too low": ({"rate": 1e-6}, "training.head.learning_rate=0.001"),
    "too few epochs": ({"epochs": 2, "rate": 0.02}, "training.head.epochs=6"),
    "nearly all gradients are cut": (
        {"optimizer": "sgd", "rate": 0.5, "max_gradient_norm": 1e-4},
        "training.max_gradient_norm=1.7",
    ),
    "over-fitting": ({"dataset": FEW, "epochs": 60, "dropout": 0.0, "rate": 0.1}, "training.patience=2"),
    "noise drowns the gradients": (
        {"privacy": replace(PRIVATE, noise_multiplier=8.0, batch=16), "epochs": 5},
        "privacy.batch=64",
    ),
    "the clip is too large": ({"dataset": MANY, "privacy": replace(PRIVATE, clip=1000.0), "epochs": 5}, "privacy.clip"),
    "clients drift apart": (
        {"epochs": 60, "dropout": 0.0, "rate": 0.1, "federation": UNEVEN},
        "federation.rounds=6",
    ),
    "padding": (
        {"dataset": mixed_lengths(), "mode": "adapter", "batch_size": 28, "epochs": 6, "token_dropout": 0.0},
        "training.adapter.batch_size=7",
    ),
    "the tokenizer shreds the words": ({"dataset": words()}, None),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_provoked_fault_is_found_with_its_remedy_first(record, name, monkeypatch):
    parts, remedy = FAULTS[name]
    if name == "padding":  # as on a GPU: a processor sends the few long ones through by themselves
        monkeypatch.setitem(encoder._ALONE, "cpu", encoder._ALONE["cuda"])
    found = [each for each in examine(record(**parts)) if each.name.endswith(name)]
    assert len(found) == 1, found
    assert all((found[0].evidence, found[0].cause, found[0].remedy))
    assert remedy is None or found[0].settings[0].startswith(remedy)


SPOILING = [name for name in FAULTS if name not in ("padding", "the tokenizer shreds the words")]


@pytest.mark.slow
@pytest.mark.parametrize("name", SPOILING)
def test_a_provoked_fault_comes_first(record, name):
    """What spoils a training may bring other findings with it; they stand behind."""
    assert examine(record(**FAULTS[name][0]))[0].name.endswith(name)


def test_slow_lines_are_found_where_the_work_is_little(record):
    federated = record(epochs=10, federation=CLIENTS)
    assert examine(federated, mbit=100) == []
    (found,) = examine(federated, mbit=0.056)
    assert found.name == "head: the line takes longer than the work"
    assert found.settings[0] == "federation.codec=int8"


def test_a_real_vocabulary_of_512_pieces_shreds_english_and_minilms_does_not():
    from caravan.app.wording import shredded
    from caravan.config import BackboneConfig
    from caravan.model.backbone import load_backbone

    place = Path(os.environ.get("CARAVAN_MODELS", "../shared/models")) / "stories260K"
    if not place.is_dir():
        pytest.skip(f"{place} is not there")
    data = Dataset.from_config(DataConfig(), seed=13)
    texts = [document.content for document in data.catalogue]
    for name, ill in ((str(place), True), ("minilm", False)):
        config = BackboneConfig(name=name)
        wording = {"documents": read_texts(load_backbone(config), texts)}
        assert (shredded(wording, config) is not None) == ill, wording


def test_texts_that_are_cut_are_found(backbone):
    from caravan.app.wording import cut_off

    texts = ["a b c", " ".join("abcdefghij" * 5)]
    wording = {"queries": read_texts(backbone, texts)}
    assert wording["queries"]["cut"] == 0.5
    found = cut_off(wording, backbone.config)
    assert found is not None
    assert found.settings == ("backbone.max_tokens=48",)
    assert cut_off({"queries": read_texts(backbone, texts[:1])}, backbone.config) is None


HEALTHY = {
    "head": {},
    "head by SGD": {"optimizer": "sgd", "rate": 0.2},
    "adapter": {"mode": "adapter", "epochs": 12},
    "clients": {"federation": CLIENTS},
    "sites": {"federation": {"partition": "column", "column": "site", "rounds": 10}},
    "fedprox": {"federation": {**CLIENTS, "strategy": "fedprox"}},
    "private": {"dataset": MANY, "privacy": PRIVATE, "epochs": 10},
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_raises_nothing(record, name):
    assert examine(record(**HEALTHY[name])) == []


def test_the_remedies_for_a_rate_heal(record):
    for fault in ("the learning rate is too high", "the learning rate is too low"):
        parts, remedy = FAULTS[fault]
        better = float(remedy.split("=")[1])
        before, after = record(**parts), record(**{**parts, "rate": better})
        assert after["history"][-1]["loss"] < before["history"][-1]["loss"]


def test_what_privacy_hides_is_not_in_the_record(record):
    private = record(MANY, privacy=PRIVATE, epochs=2)
    assert set(private["wording"]) == {"documents"}  # these are public
    for epoch in private["history"]:
        for name in ("loss", "first_loss", "clipped", "predicted_decrease", "padding", "validation_loss"):
            assert epoch[name] is None
        assert epoch["gradient_norm"] > 0 < epoch["noise_norm"]


def test_what_hides_whole_clients_lets_nothing_out_beside_tensors(record):
    hidden = PrivacyConfig(mode="client-level", noise_multiplier=1.0)
    for each in record(privacy=hidden, federation={"clients": 3, "rounds": 2})["federation"]["rounds"]:
        assert each["metrics"] == [{}, {}, {}]
        assert (each["norms"], each["agreement"]) == ([], None)


def test_private_clients_say_no_loss(record):
    private = record(privacy=replace(PRIVATE, batch=16), epochs=2, federation={"clients": 3, "rounds": 2})
    for each in private["federation"]["rounds"]:
        assert all(set(metrics) == {"seconds", "gradient_norm", "noise_norm"} for metrics in each["metrics"])


def test_a_rate_that_is_too_high_is_told_while_training(settings, prepare):
    log = Log()
    prepare(settings(mode="head", epochs=20, rate=5.0), LETTERS, report=log).run()
    warned = [place for place, told in enumerate(log.told) if isinstance(told, Progress) and told.warning]
    assert len(warned) == 1
    assert warned[0] < len(log.told) / 2
    assert "training.head.learning_rate=0.5" in (log.told[warned[0]].warning or "")


def test_the_command_says_evidence_cause_and_change_in_that_order(workshop, here):
    outcome = run("train", "-c", workshop.quick, "-o", "wild", "--epochs", "8", "--learning-rate", "5")
    assert "the learning rate is too high" in outcome.err
    assert "caravan doctor wild says more." in outcome.err
    told = run("doctor", "wild")
    assert (told.code, told.err) == (0, "")
    lines = [line.strip().split(":")[0] for line in told.out.splitlines()[1:5]]
    assert lines == ["evidence", "likely cause", "change", "first"]
    assert "--set training.head.learning_rate=0.5" in told.out
    found = json.loads(run("doctor", "wild", "--json").out)["findings"][0]
    assert found["settings"] == ["training.head.learning_rate=0.5"]


def test_a_healthy_run_is_called_healthy(workshop, here):
    run("train", "-c", workshop.quick, "-o", "sound", "--epochs", "15")
    outcome = run("doctor", "sound")
    assert outcome.out.startswith("sound: healthy.")
    assert json.loads(run("doctor", "sound", "--json").out)["findings"] == []


def test_a_folder_that_is_no_run_is_refused(here):
    check_refused(run("doctor", "nowhere"), "nowhere", "no such folder")


def test_a_damaged_record_is_refused(workshop, here):
    run("train", "-c", workshop.quick, "-o", "sound")
    (here / "sound" / "training.json").write_text('{"config": {}, "dataset": 3, "history": []}', encoding="utf-8")
    check_refused(run("doctor", "sound"), "training.json")
