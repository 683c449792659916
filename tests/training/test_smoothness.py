"""Curvature by power iteration against dense matrices, and the bound of the head's rows against its Hessian."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from caravan.config import HeadConfig
from caravan.errors import TrainingError
from caravan.model.head import FlatHead
from caravan.training.landscape import Landscape, inner
from caravan.training.smoothness import largest_curvature, rows_smoothness_bound, smoothness
from toy_training import EXAMPLES, UNSEEN, toy_config, toy_retriever


def dense_hessian(retriever, smoothing=0.0):
    """Over rows, bias and log scale, of a softmax regression that is written anew here, in float64."""
    head, catalogue = retriever.head, retriever.catalogue
    vectors = retriever.encoder.encode([example.text for example in EXAMPLES]).double()
    gold = torch.tensor([catalogue.gold_rows(example)[0] for example in EXAMPLES])
    count, width = head.rows.shape

    def loss(flat):
        rows, bias, log_scale = flat[: count * width].view(count, width), flat[-count - 1 : -1], flat[-1]
        scores = log_scale.exp() * vectors @ rows.T + bias
        return functional.cross_entropy(scores, gold, label_smoothing=smoothing)

    point = torch.cat([head.rows.flatten(), head.bias, head.log_scale.reshape(1)]).detach().double()
    return torch.autograd.functional.hessian(loss, point).numpy()


def test_power_iteration_finds_the_largest_magnitude_also_between_equal_opposites():
    for eigenvalues in ([3.0, 1.0, -0.5], [-4.0, 1.0, 2.0], [2.0, -2.0, 1.0]):
        frame = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
        matrix = torch.tensor(frame @ np.diag(eigenvalues) @ frame.T)
        start = {"x": torch.ones(3, dtype=torch.float64)}
        found = largest_curvature(lambda v, m=matrix: {"x": m @ v["x"]}, start, iterations=200, tolerance=1e-9)
        assert found.value == pytest.approx(max(map(abs, eigenvalues)), rel=1e-4)
        assert found.settled


def test_power_iteration_says_when_it_has_not_settled_and_refuses_what_is_not_finite():
    matrix = torch.diag(torch.tensor([1.0, 0.99]))
    start = {"x": torch.tensor([1e-3, 1.0])}
    assert not largest_curvature(lambda v: {"x": matrix @ v["x"]}, start, iterations=2, tolerance=1e-9).settled
    with pytest.raises(TrainingError, match="no finite curvature"):
        largest_curvature(lambda v: {"x": v["x"] * float("nan")}, start)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_smoothness_of_softmax_regression_is_the_largest_eigenvalue_of_its_dense_hessian(backbone, smoothing):
    retriever = toy_retriever(backbone, hold_unseen=False)
    config = toy_config(label_smoothing=smoothing)
    found = smoothness(retriever, EXAMPLES, "head", config, iterations=200, tolerance=1e-6)
    exact = np.abs(np.linalg.eigvalsh(dense_hessian(retriever, smoothing))).max()
    assert found.value == pytest.approx(exact, rel=1e-3)
    again = smoothness(retriever, EXAMPLES, "head", config, iterations=200, tolerance=1e-6)
    assert again == found


def test_the_bound_of_the_rows_holds_and_is_met_by_two_documents_of_even_chance(backbone):
    retriever = toy_retriever(backbone, hold_unseen=False)
    vectors = retriever.encoder.encode([example.text for example in EXAMPLES])
    exact = np.linalg.eigvalsh(dense_hessian(retriever)[:-1, :-1])[-1]
    limit = rows_smoothness_bound(retriever.head, vectors)
    assert exact <= limit <= 0.5 * float((25 * vectors.square().sum(dim=1) + 1).max()) + 1e-4
    even = FlatHead(torch.zeros(2, 3), HeadConfig(hidden=0, scale=2.0))
    # (diag p - p pᵀ) = [[1, -1], [-1, 1]] / 4 of eigenvalue 1/2, times x xᵀ of x = (2, 0, 0, 1), of eigenvalue 5
    assert rows_smoothness_bound(even, torch.tensor([[1.0, 0, 0]])) == pytest.approx(2.5)
    assert rows_smoothness_bound(even, torch.tensor([[1.0, 0, 0]]), torch.tensor([3.0])) == pytest.approx(7.5)


@pytest.mark.parametrize("kind", ["full", "lowrank"])
def test_curvature_through_the_frozen_blocks_is_the_change_of_the_slope(backbone, kind):
    retriever = toy_retriever(backbone, adapter=kind, hidden=8)
    landscape = Landscape(retriever, EXAMPLES, "adapter", toy_config())
    generator = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(own.shape, generator=generator) for name, own in landscape.parameters.items()}
    product = landscape.curve(direction)
    step, slopes = 1e-2, []
    state = retriever.trainable_state()
    for sign in (1, -1):
        moved = {name: own + sign * step * direction[name] for name, own in state.items()}
        retriever.load_trainable_state(moved)
        slopes.append(landscape.slope()[1])
    retriever.load_trainable_state(state)
    difference = {name: (slopes[0][name] - slopes[1][name]) / (2 * step) for name in product}
    apart = {name: difference[name] - product[name] for name in product}
    assert inner(apart, apart) < 0.05**2 * inner(product, product)


def test_what_training_holds_is_no_direction(backbone):
    retriever = toy_retriever(backbone)
    landscape = Landscape(retriever, EXAMPLES, "head", toy_config())
    everywhere = {name: torch.ones_like(own) for name, own in landscape.parameters.items()}
    for direction in (landscape.slope()[1], landscape.curve(everywhere)):
        assert not direction["head.rows"][UNSEEN].any()
        assert direction["head.rows"][0].any()


def test_a_loss_needs_examples(backbone):
    with pytest.raises(TrainingError, match="no examples"):
        Landscape(toy_retriever(backbone), [], "head", replace(toy_config()))
