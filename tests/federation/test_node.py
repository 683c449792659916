from dataclasses import replace

import pytest
import torch

from caravan.config import Config, HeadConfig
from caravan.errors import FederationError
from caravan.federation.node import Order, Policy, check_same, release
from caravan.federation.rounds import Update

CONFIG = Config(seed=5, head=HeadConfig(hidden=3))
ORDER = Order.of(CONFIG, "head", 4, proximal_mu=0.5, catalogue="c" * 64, encoder="e" * 64)
UPDATE = Update(
    "oslo", {"head.rows": torch.ones(2), "adapter.matrix": torch.ones(3)}, 12, {"loss": 0.5, "queries": 9.0}
)


def test_only_named_tensors_the_count_and_allowed_metrics_leave():
    released = release(UPDATE, Policy(), ["head.rows"])
    assert (list(released.tensors), released.examples, released.metrics) == (["head.rows"], 12, {})
    assert release(UPDATE, Policy(metrics=frozenset({"loss"})), ["head.rows"]).metrics == {"loss": 0.5}


@pytest.mark.parametrize(
    ("policy", "count"),
    [(Policy(max_examples=10), 10), (Policy(max_examples=20), 12), (Policy(weight=1), 1), (Policy(weight=50), 50)],
)
def test_the_count_can_be_capped_or_replaced(policy, count):
    assert release(UPDATE, policy, ["head.rows"]).examples == count


def test_a_tensor_that_was_not_trained_is_our_bug():
    with pytest.raises(FederationError, match=r"tensor head\.bias was not trained"):
        release(UPDATE, Policy(), ["head.rows", "head.bias"])


def test_an_order_comes_out_of_its_words_as_it_went_in():
    assert Order.read({**ORDER.to_words(), "round": 1, "place": 0}) == ORDER


def test_words_of_another_version_are_refused():
    words = ORDER.to_words()
    del words["encoder"]
    with pytest.raises(FederationError, match="no 'encoder'; install the same caravan"):
        Order.read(words)
    with pytest.raises(FederationError, match="unknown stage"):
        Order.read({**ORDER.to_words(), "stage": "backbone"})


def test_the_server_decides_the_training_and_neither_files_nor_the_frozen_model():
    own = Config(seed=1)
    own = replace(own, backbone=replace(own.backbone, name="mine"), data=replace(own.data, text_column="q"))
    config = ORDER.settings_on(own)
    assert (config.seed, config.head.hidden) == (5, 3)
    assert (config.backbone, config.data) == (own.backbone, own.data)
    assert "minilm" not in ORDER.settings
    assert "path" not in ORDER.settings


@pytest.mark.parametrize("settings", ["{", "[]", "{}", '{"seed": -1, "adapter": {}, "head": {}, "training": {}}'])
def test_settings_that_are_not_allowed_are_refused_without_repeating_the_nodes_own(settings):
    with pytest.raises(FederationError, match="the server's settings are not allowed here"):
        replace(ORDER, settings=settings).settings_on(Config())


def test_another_catalogue_or_frozen_model_is_refused():
    check_same(ORDER, catalogue="c" * 64, encoder="e" * 64)
    with pytest.raises(FederationError, match=r"another catalogue: dddddddddddd here, cccccccccccc on the server"):
        check_same(ORDER, catalogue="d" * 64, encoder="e" * 64)
    with pytest.raises(FederationError, match=r"another frozen model: ffffffffffff here, eeeeeeeeeeee on the server"):
        check_same(ORDER, catalogue="c" * 64, encoder="f" * 64)
