import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from caravan.config import BackboneConfig
from caravan.data.records import Example
from caravan.errors import DataError, TrainingError
from caravan.model.backbone import load_backbone
from caravan.model.encoder import Encoder
from caravan.training.batches import epoch_batches
from caravan.training.features import FeatureStore
from caravan.training.trainer import fit
from tiny_models import make_tiny_llama
from toy_training import (
    CATALOGUE,
    EXAMPLES,
    UNSEEN,
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


# Learning


@both_stages
def test_training_lowers_the_loss_and_learns_the_task(backbone, stage):
    retriever = toy_retriever(backbone)
    examples = toy_examples(120, noise=0.2)
    before = recall(retriever, VALIDATION)
    history = fit(retriever, examples, stage, toy_config(epochs=8, rate=0.1), seed=0, validation=VALIDATION)
    assert [record.epoch for record in history] == list(range(8))
    assert {record.stage for record in history} == {stage}
    assert history[-1].loss < 0.5 * history[0].loss
    assert recall(retriever, VALIDATION) > before + 0.2
    assert history[-1].validation_recall == pytest.approx(recall(retriever, VALIDATION))


@both_stages
def test_each_epoch_is_told_as_it_ends(backbone, stage):
    told, log = [], Log()
    history = fit(
        toy_retriever(backbone),
        EXAMPLES,
        stage,
        toy_config(epochs=3),
        seed=0,
        report=log,
        on_epoch=lambda epoch: told.append((epoch, len(log.steps))),
    )
    assert [epoch for epoch, _ in told] == history
    seen = [count for _, count in told]
    assert seen == sorted(set(seen))  # between two epochs there were steps


# The core is 4 x 4 numbers here: it cannot do much.
@pytest.mark.parametrize(
    ("adapter", "rate", "left"), [("full", 0.02, 0.8), ("lowrank", 0.02, 0.8), ("core", 0.5, 0.97)]
)
def test_the_adapter_learns_by_itself_when_the_head_hardly_moves(backbone, adapter, rate, left):
    retriever = toy_retriever(backbone, adapter=adapter)
    config = toy_config(epochs=8)
    config = replace(config, adapter=replace(config.adapter, learning_rate=rate, head_learning_rate=1e-9))
    history = fit(retriever, EXAMPLES, "adapter", config, seed=0)
    assert history[-1].loss < left * history[0].loss


def test_a_decoder_is_trained_through_its_blocks(tmp_path):
    backbone = load_backbone(BackboneConfig(name=str(make_tiny_llama(tmp_path)), max_tokens=40))
    retriever = toy_retriever(backbone)
    history = fit(retriever, EXAMPLES, "adapter", toy_config(epochs=6), seed=0)
    assert history[-1].loss < 0.7 * history[0].loss


def test_without_an_adapter_the_adapter_stage_trains_the_head(backbone):
    retriever = toy_retriever(backbone, adapter="none")
    history = fit(retriever, EXAMPLES, "adapter", toy_config(), seed=0)
    assert history[-1].loss < history[0].loss


def test_one_full_batch_step_equals_a_step_written_by_hand(backbone):
    # Independent of the trainer: torch's own loss with probabilities and smoothing, and autograd on two tensors.
    examples = [*EXAMPLES[:7], Example("a b p q", ("d0", "d3"))]
    config = toy_config(epochs=1, batch_size=99, rate=0.5, label_smoothing=0.1, optimizer="sgd", max_gradient_norm=None)
    retriever = toy_retriever(backbone, hold_unseen=False)
    start = retriever.trainable_state()
    vectors = retriever.encoder.encode([example.text for example in examples])
    rows, bias = start["head.rows"].clone().requires_grad_(), start["head.bias"].clone().requires_grad_()
    gold = torch.zeros(8, 5)
    for index, example in enumerate(examples):
        gold[index, [CATALOGUE.row(doc_id) for doc_id in example.doc_ids]] = 1 / len(example.doc_ids)
    loss = functional.cross_entropy(5.0 * vectors @ rows.T + bias, gold, label_smoothing=0.1)
    loss.backward()
    (record,) = fit(retriever, examples, "head", config, seed=0)
    after = retriever.trainable_state()
    assert record.loss == pytest.approx(float(loss.detach()), abs=1e-6)
    torch.testing.assert_close(after["head.rows"], (rows - 0.5 * rows.grad).detach())
    torch.testing.assert_close(after["head.bias"], (bias - 0.5 * bias.grad).detach())
    assert differ(after, start) == {"head.rows", "head.bias", "head.log_scale"}


def test_the_proximal_term_pulls_as_in_two_steps_written_by_hand(backbone):
    # Independent of the trainer: autograd on the whole objective, cross-entropy + mu/2 ||theta - theta_0||^2.
    config = toy_config(epochs=2, batch_size=99, rate=0.5, optimizer="sgd", max_gradient_norm=None, warmup=0.0)
    retriever = toy_retriever(backbone, hold_unseen=False)
    start = {name: tensor for name, tensor in retriever.trainable_state().items() if name.startswith("head.")}
    vectors = retriever.encoder.encode([example.text for example in EXAMPLES[:8]])
    gold = torch.tensor([CATALOGUE.row(example.doc_ids[0]) for example in EXAMPLES[:8]])
    theta = {name: tensor.clone() for name, tensor in start.items()}
    for rate in (0.5, 0.25):  # the cosine's first two values of two
        moving = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
        scores = moving["head.log_scale"].exp() * vectors @ moving["head.rows"].T + moving["head.bias"]
        far = sum((moving[name] - start[name]).square().sum() for name in moving)
        loss = functional.cross_entropy(scores, gold)
        gradients = torch.autograd.grad(loss + 3.0 / 2 * far, list(moving.values()))
        theta = {name: theta[name] - rate * g for name, g in zip(moving, gradients, strict=True)}
    history = fit(retriever, EXAMPLES[:8], "head", config, seed=0, proximal_mu=3.0)
    after = retriever.trainable_state()
    for name, tensor in theta.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-5, atol=1e-6)
    assert history[1].loss == pytest.approx(float(loss.detach()), abs=1e-5)  # without the proximal term
    free = trained(backbone, "head", config, EXAMPLES[:8], head={"hold_unseen": False})
    assert move(start, after, start) < 0.8 * move(start, free, start)


@both_stages
def test_a_proximal_term_of_zero_is_none_and_a_larger_one_holds_nearer(backbone, stage):
    start = toy_retriever(backbone).trainable_state()
    plain = trained(backbone, stage, toy_config())
    assert_same_bits(trained(backbone, stage, toy_config(), proximal_mu=0.0), plain)
    near, nearer = (trained(backbone, stage, toy_config(), proximal_mu=mu) for mu in (0.3, 30.0))
    assert move(start, plain) > move(start, near) > move(start, nearer) > 0


def test_class_weights_reach_the_loss(backbone):
    examples = [example for example in EXAMPLES if example.doc_ids == ("d0",)][:6]
    examples += [example for example in EXAMPLES if example.doc_ids == ("d1",)][:2]
    config = toy_config(epochs=1, batch_size=99, rate=1e-9, class_weights="balanced")
    retriever = toy_retriever(backbone)
    (record,) = fit(retriever, examples, "head", config, seed=0)
    scores = retriever.head(retriever.encoder.encode([example.text for example in examples])).detach()
    each = functional.cross_entropy(scores, torch.tensor([0] * 6 + [1] * 2), reduction="none")
    assert record.loss == pytest.approx(float((each[:6].mean() + each[6:].mean()) / 2), abs=1e-5)


def test_an_epochs_loss_is_the_mean_over_its_queries_also_when_the_last_batch_is_small(backbone):
    retriever = toy_retriever(backbone)
    scores = retriever.head(retriever.encoder.encode([example.text for example in EXAMPLES[:11]]))
    gold = torch.tensor([CATALOGUE.row(example.doc_ids[0]) for example in EXAMPLES[:11]])
    expected = float(functional.cross_entropy(scores, gold).detach())
    (record,) = fit(retriever, EXAMPLES[:11], "head", toy_config(epochs=1, rate=1e-9, batch_size=10), seed=0)
    assert record.loss == pytest.approx(expected, abs=1e-5)


# Same in, same out


@both_stages
def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(backbone, stage):
    config = toy_config()
    first = trained(backbone, stage, config)
    torch.manual_seed(99)  # the library draws nothing from the global generator
    assert_same_bits(first, trained(backbone, stage, config))
    assert "head.rows" in differ(first, trained(backbone, stage, config, seed=1))


@both_stages
def test_what_is_frozen_keeps_its_bits(backbone, stage):
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    start = toy_retriever(backbone).trainable_state()
    after = trained(backbone, stage, toy_config())
    assert_same_bits(dict(backbone.state_dict()), before)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in backbone.parameters())
    assert not any(module.training for module in backbone.model.modules())
    moved = differ(start, after)
    assert moved == {"head.rows", "head.bias", "head.log_scale"} | ({"adapter.matrix"} if stage == "adapter" else set())


@both_stages
def test_activation_checkpointing_does_not_change_the_result(backbone, stage):
    plain = trained(backbone, stage, toy_config(), validation=VALIDATION)
    thrifty = trained(backbone, stage, toy_config(activation_checkpointing=True), validation=VALIDATION)
    assert_same_bits(plain, thrifty)


def test_blocks_in_bfloat16_come_loosely_close_and_leave_the_retriever_in_float32(backbone):
    retriever = toy_retriever(backbone)
    start = retriever.trainable_state()
    history = fit(retriever, EXAMPLES, "adapter", toy_config(precision="bfloat16"), seed=0)
    narrow, wide = retriever.trainable_state(), trained(backbone, "adapter", toy_config())
    assert backbone.blocks_dtype == torch.float32
    assert {tensor.dtype for tensor in narrow.values()} == {torch.float32}
    assert history[-1].loss < history[0].loss
    assert differ(narrow, wide)
    gap = move(narrow, wide)
    assert 0 < gap < 0.2 * move(start, wide)


# Vectors


def test_the_head_stage_encodes_each_distinct_text_once_and_a_second_run_none(backbone, tmp_path, monkeypatch):
    encoded = []
    original = Encoder.encode

    def encode(self, texts, **options):
        encoded.extend(texts)
        return original(self, texts, **options)

    retriever, again = toy_retriever(backbone), toy_retriever(backbone)
    monkeypatch.setattr(Encoder, "encode", encode)
    examples = [*EXAMPLES, *EXAMPLES[:5]]
    validation = [*VALIDATION, *EXAMPLES[:5]]
    options = {"seed": 0, "validation": validation, "store": FeatureStore(tmp_path)}
    fit(retriever, examples, "head", toy_config(), **options)
    assert sorted(encoded) == sorted({example.text for example in examples + validation})
    fit(again, examples, "head", toy_config(), **options)
    assert len(encoded) == len(set(encoded))
    assert_same_bits(retriever.trainable_state(), again.trainable_state())


def test_a_store_does_not_change_the_result(backbone, tmp_path):
    plain = trained(backbone, "head", toy_config())
    for _ in ("computed", "read"):
        assert_same_bits(plain, trained(backbone, "head", toy_config(), store=FeatureStore(tmp_path)))


# Steps


@both_stages
@pytest.mark.parametrize("clip", [None, 0.5])
def test_accumulated_micro_batches_equal_one_large_batch(backbone, stage, clip):
    examples = EXAMPLES[:22]  # steps of 12 and 10: micro-batches 4, 4, 4 and 4, 4, 2
    shared = {"epochs": 2, "rate": 0.5, "optimizer": "sgd", "max_gradient_norm": clip}
    large = trained(backbone, stage, toy_config(batch_size=12, **shared), examples)
    small = trained(backbone, stage, toy_config(batch_size=4, gradient_accumulation=3, **shared), examples)
    assert largest_difference(small, large) < 1e-6
    assert move(toy_retriever(backbone).trainable_state(), large) > 0.01


def test_accumulation_holds_no_more_than_a_micro_batch_at_a_time(backbone, monkeypatch):
    sizes = []
    original = Encoder.vectors

    def vectors(self, soft, mask, **options):
        sizes.append(len(soft))
        return original(self, soft, mask, **options)

    retriever = toy_retriever(backbone)
    monkeypatch.setattr(Encoder, "vectors", vectors)
    config = toy_config(epochs=1, batch_size=4, gradient_accumulation=3)
    fit(retriever, EXAMPLES[:22], "adapter", config, seed=0)
    assert sorted(sizes) == [2, 4, 4, 4, 4, 4]


@both_stages
def test_every_step_goes_at_the_schedules_rate(backbone, stage, monkeypatch):
    rates = []
    original = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD,
        "step",
        lambda self: (rates.append([group["lr"] for group in self.param_groups]), original(self))[1],
    )
    # 2 epochs of 5 steps; the warm-up takes 2 of the 10: factors 1/2, then (1 + cos(18 degrees * step)) / 2
    trained(backbone, stage, toy_config(epochs=2, batch_size=10, rate=0.2, warmup=0.2, optimizer="sgd"))
    expected = [0.5] + [(1 + math.cos(math.pi * step / 10)) / 2 for step in range(1, 10)]
    assert [each[-1] for each in rates] == pytest.approx([0.2 * factor for factor in expected])
    if stage == "adapter":
        assert [each[0] for each in rates] == pytest.approx([0.02 * factor for factor in expected])


@both_stages
def test_the_gradients_norm_is_clipped_over_all_that_is_trained(backbone, stage):
    start = toy_retriever(backbone).trainable_state()
    config = toy_config(epochs=1, batch_size=99, rate=1.0, optimizer="sgd", max_gradient_norm=0.01)
    config = replace(config, adapter=replace(config.adapter, learning_rate=1.0))
    assert move(start, trained(backbone, stage, config)) == pytest.approx(0.01, rel=1e-3)


def test_every_example_is_trained_on_once_an_epoch_in_the_order_of_the_seed(backbone, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "caravan.training.steps.epoch_batches",
        lambda lengths, size, *, seed, epoch: (
            asked.append((len(lengths), size, seed, epoch)),
            epoch_batches(lengths, size, seed=seed, epoch=epoch),
        )[1],
    )
    trained(backbone, "head", toy_config(epochs=3), seed=7)
    assert asked == [(48, 8, 7, 0), (48, 8, 7, 1), (48, 8, 7, 2)]


# Documents without queries


@both_stages
def test_rows_of_documents_without_queries_are_held_if_so_set(backbone, stage):
    config = toy_config(weight_decay=0.1)
    start = toy_retriever(backbone).trainable_state()
    held = trained(backbone, stage, config, head={"hold_unseen": True})
    free = trained(backbone, stage, config, head={"hold_unseen": False})
    for name in ("head.rows", "head.bias"):
        assert torch.equal(held[name][UNSEEN], start[name][UNSEEN])
        assert (held[name][:UNSEEN] != start[name][:UNSEEN]).all()
        assert (free[name][UNSEEN] != start[name][UNSEEN]).all()


# Refusals


@both_stages
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_loss_that_is_no_longer_finite_names_the_setting_to_lower(backbone, stage, optimizer):
    config = toy_config(rate=1e30, optimizer=optimizer, max_gradient_norm=None)
    with pytest.raises(TrainingError, match=rf"lower training\.{stage}\.learning_rate \(now 1") as caught:
        trained(backbone, stage, config)
    assert "the loss is" in str(caught.value)
    assert ("training.adapter.head_learning_rate (now 1e+30)" in str(caught.value)) == (stage == "adapter")
    assert "\n" not in str(caught.value)


@both_stages
def test_weights_that_diverge_in_the_very_last_step_are_refused_too(backbone, stage):
    config = toy_config(epochs=1, batch_size=99, rate=3e38, optimizer="sgd", max_gradient_norm=None)
    with pytest.raises(TrainingError, match=r"a weight is no longer finite in epoch 1 .* lower training"):
        trained(backbone, stage, config, head={"scale": 50.0})


@pytest.mark.parametrize("split", ["examples", "validation"])
@both_stages
def test_a_gold_document_that_is_not_in_the_catalogue_is_refused_before_any_work(backbone, stage, split):
    log = Log()
    bad = [*EXAMPLES, Example("a", ("d9",))]
    splits = {"examples": EXAMPLES, "validation": VALIDATION} | {split: bad}
    with pytest.raises(DataError, match="d9"):
        trained(backbone, stage, toy_config(), splits["examples"], validation=splits["validation"], report=log)
    assert log.told == []


def test_no_examples_are_refused(backbone):
    with pytest.raises(TrainingError, match="no training examples"):
        trained(backbone, "head", toy_config(), [])


@both_stages
@pytest.mark.parametrize("epochs", [range(2, 5), range(-1, 2)])
def test_epochs_outside_the_whole_training_are_refused(backbone, stage, epochs):
    with pytest.raises(TrainingError, match=rf"training\.{stage}\.epochs is 4"):
        trained(backbone, stage, toy_config(epochs=4), epochs=epochs)


def test_no_epochs_train_nothing(backbone):
    retriever = toy_retriever(backbone)
    start = retriever.trainable_state()
    assert fit(retriever, EXAMPLES, "head", toy_config(epochs=0), seed=0) == []
    assert_same_bits(retriever.trainable_state(), start)


# Reports


@both_stages
@pytest.mark.parametrize("epochs", [None, range(1, 3)])
def test_reports_never_fall_and_end_at_the_total(backbone, stage, epochs):
    log = Log()
    trained(backbone, stage, toy_config(epochs=3, batch_size=10), epochs=epochs, validation=VALIDATION, report=log)
    steps = 5 * len(epochs or range(3))
    assert [progress.done for progress in log.steps] == list(range(1, steps + 1))
    assert {progress.total for progress in log.steps} == {steps}
    assert {progress.task for progress in log.steps} == {f"training the {stage}"}
    assert all(math.isfinite(progress.loss) and progress.rate > 0 for progress in log.steps)
    encoding = [(progress.task, progress.done, progress.total) for progress in log.told if progress.loss is None]
    assert len(encoding) + len(log.steps) == len(log.told)
    tasks = [("encoding", 48), ("encoding validation queries", 40)] if stage == "head" else []
    assert encoding == [(task, done, total) for task, total in tasks for done in (0, total)]


def test_a_blocks_switch_is_turned_off_again_when_training_breaks_off(backbone):
    with pytest.raises(StoppedError):
        trained(backbone, "adapter", toy_config(activation_checkpointing=True), report=Log(stop_after=1))
    assert not [module for module in backbone.model.modules() if "forward" in vars(module)]
