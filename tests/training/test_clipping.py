import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from caravan.config import AdapterConfig, BackboneConfig, HeadConfig
from caravan.errors import PrivacyError
from caravan.model.backbone import Backbone, load_backbone
from caravan.model.encoder import pad
from caravan.model.factors import Factors
from caravan.model.head import OutputAdapterHead
from caravan.model.retriever import Retriever
from caravan.training.clipping import (
    by_unit,
    clip_weights,
    example_factors,
    joint_norms,
    squared_norms,
    weighted_sums,
)
from caravan.training.inputs import TokenInputs, Traced, VectorInputs
from tiny_models import make_tiny_albert, make_tiny_bert, make_tiny_llama
from toy_training import CATALOGUE, toy_config

TEXTS = ["a", "b c d e f g", "k l m", "u v w x y a b c d e f g h", "p q"]
GOLD = torch.tensor([0, 1, 2, 4, 3])
BACKBONES = {
    "bert, mean": (make_tiny_bert, "mean"),
    "bert, cls": (make_tiny_bert, "cls"),
    "albert, mean": (make_tiny_albert, "mean"),
    "llama, mean": (make_tiny_llama, "mean"),
    "llama, last": (make_tiny_llama, "last"),
}
ADAPTERS = {
    "full": {},
    "full and bias": {"kind": "full", "bias": True},
    "lowrank": {},
    "lowrank and bias": {"kind": "lowrank", "bias": True},
    "core": {},
    "none": {},
}


@pytest.fixture(scope="session")
def named(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Backbone]:
    root: Path = tmp_path_factory.mktemp("clipping")

    @cache
    def named(name: str) -> Backbone:
        make, pooling = BACKBONES[name]
        return load_backbone(BackboneConfig(name=str(make(root / name)), pooling=pooling, max_tokens=40))

    return named


def moved(backbone: Backbone, adapter: str, hidden: int) -> Retriever:
    """A retriever none of whose parameters is as at the start, so that none of the gradients is 0."""
    settings = AdapterConfig(**{"kind": adapter, "rank": 3, "seed": 1, **ADAPTERS[adapter]})
    rows = torch.randn(5, backbone.hidden_width, generator=torch.Generator().manual_seed(2))
    head = HeadConfig(hidden=hidden, scale=3.0)
    retriever = Retriever.start(backbone, CATALOGUE, rows, adapter=settings, head=head)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in retriever.named_trainables():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return retriever


def losses_of(scores: Tensor) -> Tensor:
    return functional.cross_entropy(scores, GOLD[: len(scores)], reduction="none")


def one_by_one(retriever: Retriever) -> dict[str, Tensor]:
    """Each example's gradients by themselves: one text, no padding, one backward pass."""
    gradients: dict[str, list[Tensor]] = {name: [] for name, _ in retriever.named_trainables()}
    for ids, gold in zip(retriever.encoder.tokenize(TEXTS), GOLD, strict=True):
        retriever.zero_grad()
        vectors = retriever.encoder(*pad([ids], device=torch.device("cpu")))
        functional.cross_entropy(retriever.head(vectors), gold.unsqueeze(0)).backward()
        for name, parameter in retriever.named_trainables():
            gradients[name].append(torch.as_tensor(parameter.grad).clone())
    return {name: torch.stack(each) for name, each in gradients.items()}


def traced_factors(retriever: Retriever) -> tuple[Tensor, dict[str, Factors]]:
    inputs = TokenInputs(retriever.encoder, TEXTS, toy_config())
    return example_factors(retriever, inputs.traced(range(len(TEXTS))), losses_of)


@pytest.mark.parametrize("hidden", [0, 7])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", BACKBONES)
def test_gradients_and_norms_are_those_of_a_loop_over_examples(named, name, adapter, hidden):
    retriever = moved(named(name), adapter, hidden)
    expected = one_by_one(retriever)
    retriever.zero_grad(set_to_none=True)
    losses, factors = traced_factors(retriever)
    assert factors.keys() == expected.keys()
    squares = torch.stack([each.double().reshape(5, -1).square().sum(dim=1) for each in expected.values()]).sum(dim=0)
    torch.testing.assert_close(joint_norms(factors), squares.sqrt(), rtol=1e-5, atol=0)
    for row in range(len(TEXTS)):
        alone = weighted_sums(factors, functional.one_hot(torch.tensor(row), len(TEXTS)))
        for part, each in expected.items():
            assert alone[part].shape == each[row].shape
            assert float((alone[part] - each[row]).norm()) <= 1e-5 * float(squares[row].sqrt()), part
    with torch.no_grad():
        torch.testing.assert_close(losses, losses_of(retriever.head(vectors_of(retriever))))
    assert all(parameter.grad is None for _, parameter in retriever.named_trainables())


def vectors_of(retriever: Retriever) -> Tensor:
    return retriever.encoder.encode(TEXTS)


def test_vectors_straight_to_the_head_give_its_gradients(named):
    retriever = moved(named("bert, mean"), "full", 7)
    expected = one_by_one(retriever)
    _, factors = example_factors(retriever, VectorInputs(vectors_of(retriever)).traced(range(5)), losses_of)
    assert set(factors) == {name for name in expected if name.startswith("head.")}
    weights = torch.tensor([0.5, 0.0, 1.0, 0.25, 2.0])
    for name, total in weighted_sums(factors, weights).items():
        torch.testing.assert_close(total, torch.einsum("b,b...->...", weights, expected[name]), rtol=1e-4, atol=1e-6)


def test_blocks_in_bfloat16_give_gradients_that_match_those_of_autograd_through_them(named):
    retriever = moved(named("bert, mean"), "full", 0)
    inputs = TokenInputs(retriever.encoder, TEXTS, toy_config(precision="bfloat16"))
    losses_of(retriever.head(inputs.queries(range(5)))).sum().backward()
    expected = {name: torch.as_tensor(parameter.grad).clone() for name, parameter in retriever.named_trainables()}
    _, factors = example_factors(retriever, inputs.traced(range(5)), losses_of)
    for name, total in weighted_sums(factors, torch.ones(5)).items():
        torch.testing.assert_close(total, expected[name], rtol=1e-4, atol=1e-5)


def test_activations_that_are_computed_again_change_nothing(named):
    retriever = moved(named("llama, mean"), "full", 0)
    _, factors = traced_factors(retriever)
    inputs = TokenInputs(retriever.encoder, TEXTS, toy_config(activation_checkpointing=True))
    _, again = example_factors(retriever, inputs.traced(range(5)), losses_of)
    inputs.close()
    torch.testing.assert_close(joint_norms(again), joint_norms(factors), rtol=1e-5, atol=0)


def test_dropout_leaves_the_same_out_as_without_privacy(named):
    retriever = moved(named("llama, last"), "core", 0)
    inputs = TokenInputs(retriever.encoder, TEXTS, toy_config(dropout=0.3, token_dropout=0.5))
    plain = inputs.queries(range(5), torch.Generator().manual_seed(5))
    assert torch.equal(inputs.traced(range(5), torch.Generator().manual_seed(5)).vectors, plain)
    assert not torch.equal(inputs.traced(range(5), torch.Generator().manual_seed(6)).vectors, plain)


# Norms, whichever way they are computed


@pytest.mark.parametrize(("places", "p", "q"), [(1, 5, 7), (3, 6, 8), (9, 2, 3), (40, 4, 1), (64, 96, 96)])
def test_a_norm_is_that_of_the_gradient_written_out(places, p, q):
    generator = torch.Generator().manual_seed(places)
    left = torch.randn(6, places, p, generator=generator)
    right = torch.randn(6, places, q, generator=generator)
    written = torch.einsum("btp,btq->bpq", left.double(), right.double()).flatten(1).square().sum(dim=1)
    torch.testing.assert_close(squared_norms(Factors(left, right, torch.Size([p, q]))), written, rtol=1e-6, atol=0)


def test_terms_that_cancel_do_not_make_a_norm_too_small():
    # Two places whose outer products cancel up to one part in 10,000: float32 would be wrong by several percent.
    left = torch.ones(1, 2, 64)
    right = torch.ones(1, 2, 64)
    right[0, 1] = -(1 - 1e-4)
    exact = (64 * float(right[0, 0, 0].double() + right[0, 1, 0].double())) ** 2
    assert float(squared_norms(Factors(left, right, torch.Size([64, 64])))) == pytest.approx(exact, rel=1e-9)


def test_a_batch_in_many_chunks_gives_the_norms_of_one_chunk(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    for places, p in ((3, 8), (20, 2)):
        left, right = (torch.randn(7, places, p, generator=generator) for _ in range(2))
        factors = Factors(left, right, torch.Size([p, p]))
        whole = squared_norms(factors)
        with monkeypatch.context() as patch:
            patch.setattr("caravan.training.clipping._CHUNK", 2 * places * 2 * p)
            torch.testing.assert_close(squared_norms(factors), whole, rtol=1e-12, atol=0)


# Clipping


def test_a_gradient_is_cut_to_the_clip_and_a_shorter_one_is_left():
    norms = torch.tensor([0.0, 0.5, 2.0, 8.0], dtype=torch.float64)
    assert clip_weights(norms, 2.0).tolist() == [1.0, 1.0, 1.0, 0.25]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_example_whose_gradient_is_not_finite_adds_nothing(bad):
    left, right = torch.ones(3, 1, 2), torch.ones(3, 1, 2)
    right[1, 0, 0] = bad
    factors = {"x": Factors(left, right, torch.Size([2, 2]))}
    weights = clip_weights(joint_norms(factors), 1.0)
    assert weights.tolist() == pytest.approx([0.5, 0.0, 0.5])
    torch.testing.assert_close(weighted_sums(factors, weights)["x"], torch.ones(2, 2))


def test_the_clipped_sum_never_moves_more_than_the_clip_by_one_example(named):
    retriever = moved(named("llama, mean"), "lowrank", 7)
    _, factors = traced_factors(retriever)
    norms, clip = joint_norms(factors), 0.3
    assert float(norms.min()) > clip
    weights = clip_weights(norms, clip)
    whole = weighted_sums(factors, weights)
    for row in range(len(TEXTS)):
        without = weights.clone()
        without[row] = 0
        rest = weighted_sums(factors, without)
        distance = math.sqrt(sum(float((whole[name] - rest[name]).double().square().sum()) for name in whole))
        assert distance == pytest.approx(clip, rel=1e-4)


# Users


def test_the_gradient_of_a_unit_is_the_sum_of_its_examples(named):
    retriever = moved(named("bert, mean"), "full", 7)
    expected = one_by_one(retriever)
    _, factors = traced_factors(retriever)
    units = by_unit(factors, [30, 10, 30, 10, 30])  # the first and third and fifth text are of one user
    members = torch.tensor([[1, 0, 1, 0, 1], [0, 1, 0, 1, 0]], dtype=torch.float32)
    sums = {name: torch.einsum("ub,b...->u...", members, each) for name, each in expected.items()}
    squares = sum(each.double().reshape(len(each), -1).square().sum(dim=1) for each in sums.values())
    torch.testing.assert_close(joint_norms(units), torch.as_tensor(squares).sqrt(), rtol=1e-5, atol=0)
    weights = torch.tensor([0.5, 0.1])
    for name, total in weighted_sums(units, weights).items():
        torch.testing.assert_close(total, torch.einsum("u,u...->...", weights, sums[name]), rtol=1e-4, atol=1e-6)


# Peers


def test_sums_and_norms_of_a_head_are_those_of_opacus(named):
    from opacus.grad_sample import GradSampleModule

    retriever = moved(named("bert, mean"), "full", 0)
    head = retriever.head
    vectors = vectors_of(retriever)
    linear = nn.Linear(head.rows.shape[1], 5)
    scale = float(head.log_scale.detach().exp())
    with torch.no_grad():
        linear.weight.copy_(head.rows * scale)
        linear.bias.copy_(head.bias)
    peer = GradSampleModule(linear, loss_reduction="sum")
    losses_of(peer(vectors.clone().requires_grad_())).sum().backward()  # its hooks warn about inputs without gradient
    theirs = {"head.rows": linear.weight.grad_sample * scale, "head.bias": linear.bias.grad_sample}
    _, factors = example_factors(retriever, Traced(vectors), losses_of)
    for name, each in theirs.items():
        norms = each.double().flatten(1).norm(dim=1)
        torch.testing.assert_close(squared_norms(factors[name]).sqrt(), norms, rtol=1e-5, atol=0)
        weights = clip_weights(norms, 0.5)
        clipped = torch.einsum("b,b...->...", weights.float(), each)
        torch.testing.assert_close(weighted_sums({name: factors[name]}, weights)[name], clipped, rtol=1e-5, atol=1e-6)


def test_a_head_without_closed_form_is_refused(named):
    retriever = moved(named("bert, mean"), "full", 0)
    retriever.head = OutputAdapterHead(retriever.head.rows, HeadConfig())
    with pytest.raises(PrivacyError, match="OutputAdapterHead has no per-example gradients"):
        example_factors(retriever, Traced(vectors_of(retriever)), losses_of)
