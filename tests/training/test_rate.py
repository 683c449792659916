"""The automatic learning rate against a line search, and what it leaves alone."""

from dataclasses import replace

import pytest
import torch

from caravan.data.records import Example
from caravan.errors import TrainingError
from caravan.training.landscape import Landscape
from caravan.training.rate import automatic, choose_rates, with_rates
from toy_training import EXAMPLES, assert_same_bits, toy_config, toy_examples, toy_retriever, trained

MANY = toy_examples(300, noise=0.2)
SAME = [Example("a b c f", ("d0",))] * 32  # all batches are alike, so the direction is the sign of the gradient


def auto(config, **rates):
    """All rates open but those given."""
    every = {"learning_rate": "auto", "head_learning_rate": "auto", **rates}
    head = replace(config.head, learning_rate=every["learning_rate"])
    return replace(config, head=head, adapter=replace(config.adapter, **every))


def searched(retriever, stage, config, moved):
    """The step along the steepest coordinate signs that a parabola through three losses has its minimum at."""
    landscape = Landscape(retriever, SAME, stage, config)
    slope = {name: own for name, own in landscape.slope()[1].items() if moved(name)}
    if config.optimizer == "adamw":
        slope = {name: own.sign() * (own.abs() > 1e-9) for name, own in slope.items()}
    state, step = retriever.trainable_state(), 1e-3
    losses = []
    for along in (-step, 0.0, step):
        retriever.load_trainable_state({**state, **{name: state[name] - along * own for name, own in slope.items()}})
        with torch.no_grad():
            losses.append(float(landscape.losses(range(32)).double().mean()))
    retriever.load_trainable_state(state)
    before, here, after = losses
    return step * (before - after) / (2 * (before - 2 * here + after))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_rate_is_half_of_the_step_that_a_line_search_finds(backbone, optimizer):
    config = auto(toy_config(optimizer=optimizer, epochs=20))
    retriever = toy_retriever(backbone)
    found = choose_rates(retriever, SAME, "head", config)
    best = searched(retriever, "head", config, lambda name: True)
    assert found.rates["learning_rate"] == pytest.approx(best / 2, rel=0.05)
    retriever = toy_retriever(backbone, scale=20.0)
    found = choose_rates(retriever, SAME, "adapter", config)
    for name, in_head in (("learning_rate", False), ("head_learning_rate", True)):
        best = searched(retriever, "adapter", config, lambda own, head=in_head: own.startswith("head.") == head)
        assert found.rates[name] == pytest.approx(best / 2, rel=0.2)  # losses in float32, through the blocks


def test_a_sharper_loss_has_a_smaller_rate(backbone):
    config = auto(toy_config(batch_size=32, epochs=40))
    rates = [
        choose_rates(toy_retriever(backbone, scale=scale), MANY, "head", config).rates["learning_rate"]
        for scale in (2.0, 20.0)
    ]
    assert rates[0] > 2 * rates[1]


def test_choosing_is_the_same_for_a_seed_and_changes_nothing(backbone):
    config, retriever = auto(toy_config()), toy_retriever(backbone)
    before = retriever.trainable_state()
    first, again = (choose_rates(retriever, EXAMPLES, "adapter", config, seed=3) for _ in range(2))
    assert first == again
    assert_same_bits(retriever.trainable_state(), before)
    assert choose_rates(retriever, EXAMPLES, "adapter", config, seed=4) != first
    assert all(parameter.grad is None for _, parameter in retriever.named_trainables())


def test_only_what_is_open_is_chosen_and_the_record_says_from_what(backbone):
    config = auto(toy_config(), head_learning_rate=0.5)
    assert automatic(config, "adapter") == ["learning_rate"]
    found = choose_rates(toy_retriever(backbone), EXAMPLES, "adapter", config)
    settled = with_rates(config, "adapter", found.rates)
    assert settled.adapter.learning_rate == found.rates["learning_rate"]
    assert (settled.adapter.head_learning_rate, settled.head.learning_rate) == (0.5, "auto")
    assert automatic(settled, "adapter") == []
    line = found.to_dict()["lines"]["learning_rate"]
    assert found.to_dict()["learning_rate"] == pytest.approx(line["slope"] / line["curvature"] / 2, rel=1e-3)


def test_where_there_is_nothing_to_move_the_default_stays(backbone):
    config = auto(toy_config(batch_size=32, epochs=40))
    found = choose_rates(toy_retriever(backbone, adapter="none"), MANY, "adapter", config)
    assert (found.rates["learning_rate"], found.lines["learning_rate"].found) == (1e-3, False)
    assert found.lines["head_learning_rate"].found


def test_passages_alone_are_enough_and_nothing_is_not(backbone):
    config, retriever = auto(toy_config()), toy_retriever(backbone)
    assert choose_rates(retriever, (), "head", config, passages=EXAMPLES[:1]).lines["learning_rate"].found
    with pytest.raises(TrainingError, match="no examples"):
        choose_rates(retriever, (), "head", config)


@pytest.mark.parametrize("stage", ["head", "adapter"])
def test_training_with_the_automatic_rate_is_training_with_the_number(backbone, stage):
    config = auto(toy_config(dropout=0.2, token_dropout=0.1))
    rates = choose_rates(toy_retriever(backbone), EXAMPLES, stage, config).rates
    assert_same_bits(
        trained(backbone, stage, config, EXAMPLES), trained(backbone, stage, with_rates(config, stage, rates), EXAMPLES)
    )
