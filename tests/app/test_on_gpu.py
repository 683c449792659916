"""The same trainings on a GPU: they come to what they come to on the processor, but for rounding."""

from pathlib import Path

import pytest

from caravan.app.learning import Experiment
from caravan.model.backbone import Backbone
from caravan.storage import load, save
from caravan.training.features import FeatureStore
from toy_experiments import DATASET, share_found, toy_settings
from toy_privacy import private_steps
from toy_training import largest_difference, toy_backbone, toy_config, trained

pytestmark = pytest.mark.gpu
both_modes = pytest.mark.parametrize("mode", ["head", "adapter"])
CLOSE = 2e-3  # in float32, after Adam has divided small gradients by their own size


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return toy_backbone(tmp_path_factory.mktemp("gpu"), device="cuda")


def learned(backbone, **parts):
    settings = toy_settings(backbone.config, **{"dropout": 0.0, "token_dropout": 0.0, "epochs": 2, **parts})
    return Experiment(DATASET, settings, backbone=backbone, store=FeatureStore()).run()


@both_modes
@pytest.mark.parametrize(
    "federation",
    [{}, {"clients": 3}, {"clients": 3, "strategy": "fedprox", "codec": "int8"}, {"clients": 3, "strategy": "krum"}],
    ids=["central", "fedavg", "fedprox-int8", "krum"],
)
def test_a_training_on_the_gpu_comes_to_what_it_comes_to_on_the_processor(backbone, gpu, mode, federation):
    if federation.get("strategy") == "krum":
        federation = {**federation, "clients": 4, "byzantine_clients": 0}
    ours, theirs = (learned(each, mode=mode, federation=federation) for each in (gpu, backbone))
    tolerance = 0.05 if federation.get("codec") else CLOSE  # int8 rounds by chance, a step this or that way
    assert largest_difference(ours.trainable_state(), theirs.trainable_state()) < tolerance


@both_modes
@pytest.mark.parametrize("sigma", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["full", "lowrank", "core"])
def test_private_steps_on_the_gpu_are_those_of_the_processor(backbone, gpu, mode, sigma, kind):
    def state(each):
        steps = private_steps(sigma=sigma, clip=0.5, batch=20)
        return trained(each, mode, toy_config(epochs=2), head={"adapter": kind}, privacy=steps)

    assert largest_difference(state(gpu), state(backbone)) < CLOSE


def test_bfloat16_blocks_learn_the_task_on_the_gpu(gpu):
    retriever = learned(gpu, mode="adapter", epochs=8, rate=0.05, precision="auto")
    assert share_found(retriever, DATASET.test) > 0.7


def test_what_the_gpu_trained_is_saved_and_searched_on_the_processor(gpu, tmp_path: Path):
    retriever = learned(gpu, mode="adapter")
    here = load(save(retriever, tmp_path / "model"))
    assert here.encoder.device.type == "cpu"
    for text in ("a b c", "k l m"):
        ours, theirs = retriever.search(text, 5), here.search(text, 5)
        assert [hit.doc_id for hit in ours] == [hit.doc_id for hit in theirs]
        assert [hit.score for hit in ours] == pytest.approx([hit.score for hit in theirs], abs=1e-3)
