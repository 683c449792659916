"""Every method trained on letters: same start, same clients, same rounds; what was sent is what was counted."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from caravan.app.communication import TRAININGS, Communication
from caravan.app.comparison import evaluate
from caravan.app.display import _share
from caravan.app.learning import Experiment
from caravan.app.payload import ADAPTERS, RIVALS, Skeleton, part_shapes
from caravan.app.rivals import LEARNING_RATES, RivalExperiment, tuned_encoder
from caravan.errors import ConfigError, DataError
from caravan.federation.codec import Codec
from caravan.training.features import FeatureStore
from command_line import Workshop, run
from toy_experiments import DATASET, toy_settings
from toy_training import Log, assert_same_bits

pytest.importorskip("flwr")
ROUNDS = 2
FRAME = 800  # bytes at the most, around the numbers of an array or the words of a message, as Flower serialises them


@pytest.fixture(scope="module")
def config(backbone):
    config = toy_settings(backbone.config, epochs=ROUNDS, federation={"clients": 3, "rounds": ROUNDS})
    return replace(config, adapter=replace(config.adapter, rank=4))


@pytest.fixture(scope="module")
def communication(config, backbone):
    made = Communication(DATASET, config, store=FeatureStore())
    vars(made)["backbone"] = backbone
    return made


@pytest.fixture(scope="module")
def trained(communication):
    return {one: communication.train(*one) for one in communication.trainings()}


def test_every_method_is_trained_with_the_codecs_it_has(trained):
    assert list(trained) == list(TRAININGS)
    assert {method for method, _ in TRAININGS} == {*ADAPTERS, *RIVALS}
    assert {method for method, codec in TRAININGS if codec == "int8"} == set(ADAPTERS)


def test_what_was_sent_is_what_the_table_says_plus_frames(communication, trained):
    first = communication.tables[communication.skeletons[0].name]
    head = 3  # rows, bias, scale
    for (method, codec), one in trained.items():
        row = next(row for row in first if (row.method, row.codec) == (method, codec.replace("none", "float32")))
        tensors = head + len(part_shapes(method, communication.skeletons[0], communication.config.adapter))
        arrays = tensors * (2 if codec == "int8" else 1)
        numbers = row.part + row.head
        assert numbers < one.up < numbers + FRAME * (arrays + 1)
        down = row.down if codec == "none" else (row.down + (ROUNDS - 1) * numbers) // ROUNDS
        assert down < one.down < down + FRAME * (arrays + 1)
        assert one.rounds == ROUNDS


def test_ours_is_the_experiment_that_train_runs(config, backbone, trained):
    for codec in ("none", "int8"):
        federation = replace(config.federation, codec=codec)
        same = replace(config, adapter=replace(config.adapter, kind="core"), federation=federation)
        retriever = Experiment(DATASET, same, backbone=backbone, store=FeatureStore()).run()
        expected = evaluate(retriever, DATASET, bootstrap=20, seed=13)["recall@1"]
        assert trained["core", codec].recall == expected


def rival(config, backbone, method, **options) -> RivalExperiment:
    return RivalExperiment(DATASET, config, method, backbone=backbone, store=FeatureStore(), **options)


@pytest.mark.parametrize("method", RIVALS)
def test_a_rival_starts_from_the_backbone_and_trains_a_copy_of_it(config, backbone, method):
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    experiment = rival(config, backbone, method)
    texts = [example.text for example in DATASET.test]
    plain = Experiment(DATASET, config, backbone=backbone, store=FeatureStore()).retriever
    assert torch.equal(experiment.retriever.encoder.encode(texts), plain.encoder.encode(texts))
    start = experiment.retriever.trainable_state()
    key = experiment.retriever.encoder.key()
    assert key == plain.encoder.key()
    retriever = experiment.run()
    assert_same_bits(dict(backbone.state_dict()), before)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    moved = {name for name, tensor in retriever.trainable_state().items() if not torch.equal(tensor, start[name])}
    assert {name for name in start if name.startswith("adapter.")} <= moved
    assert retriever.encoder.key() != key
    assert not torch.equal(retriever.encoder.encode(texts), plain.encoder.encode(texts))


@pytest.mark.parametrize("method", RIVALS)
def test_a_rival_trains_tensors_of_the_counted_shapes(backbone, config, method):
    encoder = tuned_encoder(backbone, method, seed=3)
    counted = part_shapes(method, Skeleton.of("toy", backbone.model), config.adapter)
    trained = [tuple(parameter.shape) for _, parameter in encoder.adapter.named_parameters()]
    assert sorted(trained) == sorted(counted.values())
    assert Codec("int8").expected_bytes(counted) == Codec("int8").expected_bytes(dict(enumerate(trained)))


def test_a_loras_factors_follow_from_the_seed_alone(backbone):
    pytest.importorskip("peft")
    before = torch.random.get_rng_state()
    first, again, other = (
        dict(tuned_encoder(backbone, "lora-qv", seed=seed).adapter.named_parameters()) for seed in (3, 3, 4)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("method", RIVALS)
def test_a_rivals_weights_learn_at_a_rate_of_their_own(config, backbone, method, monkeypatch):
    assert rival(config, backbone, method).config.training.adapter.learning_rate == LEARNING_RATES[method]
    monkeypatch.setitem(LEARNING_RATES, method, 0.01)
    stage = replace(config.training.adapter, epochs=4, head_learning_rate=1e-12, dropout=0.0, token_dropout=0.0)
    central = replace(config.federation, clients=0)
    still = replace(config, federation=central, training=replace(config.training, adapter=stage))
    losses = [
        one["loss"] for one in rival(still, backbone, method).run().record["history"] if one["stage"] == "adapter"
    ]
    assert losses[-1] < 0.9 * losses[0]  # the head stands still


def test_without_peft_lora_is_left_out_and_asking_for_it_is_refused_in_one_line(communication, backbone, monkeypatch):
    monkeypatch.setattr("caravan.app.communication.find_spec", lambda name: None)
    assert [method for method, _ in communication.trainings() if method.startswith("lora")] == []
    assert not communication.has_peft
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'caravan\[compare\]'"):
        tuned_encoder(backbone, "lora-qv", seed=0)


def test_where_lora_fits_no_layer_only_the_others_are_trained(config):
    other = Communication(DATASET, config, store=FeatureStore())
    other.skeletons[0] = replace(other.skeletons[0], linears={})
    assert {method for method, _ in other.trainings()} == {*ADAPTERS, "fine-tuning"}


def test_a_backbone_in_another_dtype_and_data_without_held_out_queries_are_refused_before_training(config):
    log = Log()
    narrow = replace(config, backbone=replace(config.backbone, dtype="bfloat16"))
    with pytest.raises(ConfigError, match=r"backbone\.dtype = bfloat16.*float32"):
        Communication(DATASET, narrow, report=log).train("full", "none")
    with pytest.raises(DataError, match="neither test nor validation"):
        Communication(replace(DATASET, test=(), validation=()), config, report=log).train("full", "none")
    assert log.told == []


def test_three_clients_train_where_the_settings_name_none(config):
    alone = replace(config, federation=replace(config.federation, clients=0))
    assert Communication(DATASET, alone).config.federation.clients == 3
    column = replace(config, federation=replace(config.federation, clients=0, partition="column", column="site"))
    assert Communication(DATASET, column).config.federation.clients == 0


def test_the_summary_is_plain_values(communication, trained):
    summary = json.loads(json.dumps(communication.summary(list(trained.values())), allow_nan=False))
    assert [model["model"] for model in summary["models"]][1:] == ["TinyLlama-1.1B", "Llama-3.2-3B"]
    assert summary["documents"] == 5
    assert (summary["trained"]["split"], summary["trained"]["clients"], summary["trained"]["rounds"]) == ("test", 3, 2)
    assert len(summary["trained"]["rows"]) == len(TRAININGS)
    assert "trained" not in communication.summary()


# The command


def printed(*options: object) -> dict[str, Any]:
    outcome = run("compare", "communication", *options, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    return json.loads(outcome.out)


def test_the_command_counts_for_the_documents_it_is_given(workshop: Workshop):
    found = printed(workshop.data, "-c", workshop.quick, "--rank", 3)
    assert (found["dataset"], found["documents"]) == ("letters", 5)
    rows = {(row["method"], row["codec"]): row for row in found["models"][0]["rows"]}
    assert len(rows) == 18
    assert rows["core", "float32"]["part"] == 4 * 3 * 3
    assert rows["full", "float32"]["head"] == 4 * (5 * 32 + 5 + 1)
    assert "trained" not in found


def test_the_command_prints_a_table_a_model_with_every_figure_whole(workshop: Workshop):
    outcome = run("compare", "communication", workshop.data, "-c", workshop.quick)
    assert (outcome.code, outcome.err) == (0, "")
    assert "TinyLlama-1.1B (1,034.5M numbers), a head of 5 documents" in outcome.out
    rows = [line.split() for line in outcome.out.splitlines() if line.startswith("fine-tuning")]
    found = printed(workshop.data, "-c", workshop.quick)
    theirs = [row for model in found["models"] for row in model["rows"] if row["method"] == "fine-tuning"]
    assert [row[2:4] for row in rows] == [[f"{row['numbers']:,}", f"{row['part']:,}"] for row in theirs]
    assert "R@1" not in outcome.out


def test_the_command_trains_when_asked_to(workshop: Workshop, monkeypatch):
    monkeypatch.setattr("caravan.app.communication.find_spec", lambda name: None)
    monkeypatch.setattr("caravan.app.communication.TRAININGS", (("core", "int8"), ("fine-tuning", "none")))
    options = (workshop.data, "-c", workshop.quick, "--train", "--clients", 2, "--epochs", 2, "--rounds", 2)
    trained = printed(*options)["trained"]
    assert [(row["method"], row["codec"]) for row in trained["rows"]] == [("core", "int8"), ("fine-tuning", "none")]
    assert (trained["clients"], trained["rounds"], trained["epochs"], trained["split"]) == (2, 2, 2, "test")
    outcome = run("compare", "communication", *options)
    assert outcome.code == 0, outcome.err
    line = next(line for line in outcome.out.splitlines() if line.startswith("core") and "int8" in line)
    assert line.split()[-1] == f"{100 * trained['rows'][0]['recall']['value']:.1f}"
    assert "peft not installed" in outcome.out


def test_a_folder_named_communication_can_still_be_compared(workshop: Workshop, here: Path):
    shutil.copytree(workshop.model, here / "communication")
    outcome = run("compare", "./communication", "--no-baselines", "--json")
    assert outcome.code == 0, outcome.err
    assert list(json.loads(outcome.out)["rows"]) == ["communication"]


@pytest.mark.parametrize(
    ("ratio", "said"), [(None, "-"), (1.0, "1.00"), (1 / 72, "1/72"), (1 / 2240, "1/2,240"), (306.06, "306.06")]
)
def test_a_ratio_is_said_as_people_say_it(ratio, said):
    assert _share(ratio) == said
