"""What is dropped while training: from the seed alone, never in validation, the same after a stop."""

import pytest
import torch

from caravan.training.batches import noise_source
from caravan.training.checkpoint import Checkpoint
from caravan.training.inputs import TokenInputs, VectorInputs
from caravan.training.trainer import fit
from toy_training import (
    EXAMPLES,
    VALIDATION,
    Log,
    StoppedError,
    assert_same_bits,
    differ,
    largest_difference,
    move,
    recall,
    toy_config,
    toy_examples,
    toy_retriever,
    trained,
)

both_stages = pytest.mark.parametrize("stage", ["head", "adapter"])


def noisy_config(**changes):
    return toy_config(**{"dropout": 0.3, "token_dropout": 0.3, **changes})


@both_stages
def test_dropout_follows_from_the_seed_alone(backbone, stage):
    first = trained(backbone, stage, noisy_config())
    torch.manual_seed(99)
    assert_same_bits(first, trained(backbone, stage, noisy_config()))
    assert "head.rows" in differ(first, trained(backbone, stage, toy_config()))
    # One batch of all examples: the order cannot tell the seeds apart, what is dropped does.
    whole = {"batch_size": 99, "epochs": 1}
    with_noise = [trained(backbone, stage, noisy_config(**whole), seed=seed) for seed in (0, 1)]
    assert move(*with_noise, ["head.rows"]) > 1e-3
    without = [trained(backbone, stage, toy_config(**whole), seed=seed) for seed in (0, 1)]
    assert largest_difference(*without) < 1e-5


@both_stages
def test_every_step_drops_something_else(backbone, stage, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "caravan.training.trainer.noise_source",
        lambda *numbers: (asked.append(numbers), noise_source(*numbers))[1],
    )
    trained(backbone, stage, noisy_config(epochs=4, batch_size=20), seed=7, epochs=range(1, 3))
    assert asked == [(7, epoch, step) for epoch in (1, 2) for step in range(3)]


@both_stages
def test_validation_is_measured_without_dropout(backbone, stage, monkeypatch):
    noises = []
    for inputs in (VectorInputs, TokenInputs):
        original = inputs.queries

        def queries(self, batch, noise=None, original=original):
            noises.append((min(batch) >= len(EXAMPLES), noise is not None))
            return original(self, batch, noise)

        monkeypatch.setattr(inputs, "queries", queries)
    retriever = toy_retriever(backbone)
    config = noisy_config(dropout=0.9, token_dropout=0.9)
    history = fit(retriever, EXAMPLES, stage, config, seed=0, validation=VALIDATION)
    assert set(noises) == {(False, True), (True, False)}
    assert history[-1].validation_recall == pytest.approx(recall(retriever, VALIDATION))


@both_stages
def test_training_with_dropout_goes_on_after_a_stop_at_any_step_as_if_nothing_had_happened(backbone, stage, tmp_path):
    config = noisy_config(epochs=2, gradient_accumulation=2, patience=2, checkpoint_seconds=1e-9)
    options = {"validation": VALIDATION[:10]}
    whole = trained(backbone, stage, config, EXAMPLES[:40], **options)
    for stop in range(1, 7):  # 2 epochs of 16, 16 and 8 queries
        checkpoint = Checkpoint(tmp_path / f"{stop}.safetensors", "print")
        with pytest.raises(StoppedError):
            trained(backbone, stage, config, EXAMPLES[:40], checkpoint=checkpoint, report=Log(stop), **options)
        assert checkpoint.path.exists() == (stop > 1)  # the stop comes before its step is saved
        resumed = trained(backbone, stage, config, EXAMPLES[:40], checkpoint=checkpoint, **options)
        assert_same_bits(resumed, whole)


@both_stages
def test_rounds_with_dropout_continue_one_training(backbone, stage):
    config = noisy_config(epochs=4, optimizer="sgd", rate=0.3)
    whole = trained(backbone, stage, config)
    half = trained(backbone, stage, config, epochs=range(2))
    assert_same_bits(trained(backbone, stage, config, start=half, epochs=range(2, 4)), whole)


@pytest.mark.parametrize("adapter", ["full", "none"])
def test_dropped_tokens_still_let_the_task_be_learned(backbone, adapter):
    retriever = toy_retriever(backbone, adapter=adapter)
    before = recall(retriever, VALIDATION)
    config = noisy_config(epochs=8, rate=0.1, token_dropout=0.2)
    fit(retriever, toy_examples(120, noise=0.2), "adapter", config, seed=0)
    assert recall(retriever, VALIDATION) > before + 0.15
