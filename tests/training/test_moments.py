"""Variance, clipping bias and diversity of gradients: by hand, and against one autograd pass an example."""

import pytest
import torch

from caravan.errors import TrainingError
from caravan.training.landscape import Landscape
from caravan.training.moments import gradient_diversity, gradient_moments
from toy_training import EXAMPLES, toy_config, toy_retriever

FEW = EXAMPLES[:10]


@pytest.mark.parametrize("stage", ["head", "adapter"])
def test_moments_are_those_of_gradients_made_one_by_one(backbone, stage):
    retriever = toy_retriever(backbone, hidden=8, hold_unseen=False)
    config = toy_config(label_smoothing=0.1)
    rows = []
    for example in FEW:
        landscape = Landscape(retriever, [example], stage, config)
        rows.append(torch.cat([part.flatten() for part in landscape.slope()[1].values()]).double())
    each = torch.stack(rows)
    mean, clip = each.mean(dim=0), float(each.norm(dim=1).median())
    cut = torch.stack([row * min(1.0, clip / float(row.norm())) for row in each])
    found = gradient_moments(retriever, FEW, stage, config, clip=clip)
    assert found.count == 10
    assert found.squared_norm == pytest.approx(float(mean.square().sum()), rel=1e-4)
    assert found.variance == pytest.approx(float(each.var(dim=0).sum()), rel=1e-4)
    assert sorted(found.norms.tolist()) == pytest.approx(sorted(each.norm(dim=1).tolist()), rel=1e-4)
    assert 0.4 <= found.clipped_share <= 0.6
    assert found.clipping_bias == pytest.approx(float((cut.mean(dim=0) - mean).norm()), rel=1e-3)


def test_without_a_clip_nothing_is_biased_and_one_example_has_no_variance(backbone):
    found = gradient_moments(toy_retriever(backbone), FEW[:1], "head", toy_config())
    assert (found.variance, found.clipped_share, found.clipping_bias) == (0.0, 0.0, 0.0)


def test_diversity_is_that_worked_out_by_hand():
    one, other = {"x": torch.tensor([1.0, 0.0])}, {"x": torch.tensor([0.0, 1.0])}
    found = gradient_diversity([one, other], [1, 1])  # mean (1/2, 1/2): Σ w ||.||² = 1, ||mean||² = 1/2
    assert (found.dissimilarity, found.diversity, found.squared_norm) == pytest.approx((0.5, 2.0, 0.5))
    found = gradient_diversity([one, other], [30, 10])  # mean (3/4, 1/4): 3/4 · 1/8 + 1/4 · 9/8 = 3/8
    assert (found.dissimilarity, found.diversity) == pytest.approx((0.375, 1.6))
    alike = gradient_diversity([one, one, one], [1, 2, 3])
    assert (alike.dissimilarity, alike.diversity) == pytest.approx((0.0, 1.0))


def test_weights_that_are_not_one_each_are_refused():
    with pytest.raises(TrainingError, match="give one above 0 for each"):
        gradient_diversity([{"x": torch.ones(1)}], [1, 1])
