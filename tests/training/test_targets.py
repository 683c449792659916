import math

import pytest
import torch
from torch.nn import functional

from caravan.config import HeadConfig
from caravan.model.head import FlatHead
from caravan.training.targets import HeldRows, Targets

CPU = torch.device("cpu")


def targets(gold: list[list[int]], weighting: str = "none", documents: int = 5) -> Targets:
    return Targets(gold, queries=len(gold), document_count=documents, weighting=weighting, device=CPU)


def random_scores(queries: int, documents: int = 5) -> torch.Tensor:
    return torch.randn(queries, documents, generator=torch.Generator().manual_seed(0))


def test_the_loss_by_hand():
    scores = torch.tensor([[math.log(1.0), math.log(3.0)], [math.log(1.0), math.log(1.0)]])
    loss = targets([[0], [1]], documents=2).loss(scores, [0, 1], 0.0)
    assert float(loss) == pytest.approx((math.log(4) + math.log(2)) / 2, abs=1e-7)  # p = 1/4 and 1/2


def test_two_gold_documents_share_the_target_evenly_by_hand():
    scores = torch.log(torch.tensor([[1.0, 3.0, 4.0]]))
    loss = targets([[0, 2]], documents=3).loss(scores, [0], 0.0)
    assert float(loss) == pytest.approx((math.log(8) + math.log(2)) / 2, abs=1e-7)  # p = 1/8 and 4/8


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_the_loss_equals_torchs_cross_entropy_with_label_smoothing(smoothing):
    scores, gold = random_scores(6), [0, 4, 4, 2, 1, 3]
    ours = targets([[row] for row in gold]).loss(scores, range(6), smoothing)
    torch.testing.assert_close(ours, functional.cross_entropy(scores, torch.tensor(gold), label_smoothing=smoothing))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_several_gold_documents_equal_torchs_cross_entropy_with_probabilities(smoothing):
    gold = [[0], [1, 3], [4, 2, 0], [2]]
    probability = torch.tensor([[1, 0, 0, 0, 0], [0, 0.5, 0, 0.5, 0], [1 / 3, 0, 1 / 3, 0, 1 / 3], [0, 0, 1.0, 0, 0]])
    ours = targets(gold).loss(random_scores(4), range(4), smoothing)
    expected = functional.cross_entropy(random_scores(4), probability, label_smoothing=smoothing)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(("weighting", "power"), [("sqrt", 0.5), ("balanced", 1.0)])
def test_class_weights_equal_torchs_weighted_cross_entropy(weighting, power):
    gold = [0, 0, 0, 0, 1, 2, 2, 2, 2]
    frequency = torch.tensor([4.0, 1.0, 4.0, 1.0, 1.0])  # rows 3 and 4 never come: their weight must not matter
    each = functional.cross_entropy(random_scores(9), torch.tensor(gold), weight=frequency**-power, reduction="none")
    mean_weight = (frequency**-power)[gold].mean()
    ours = targets([[row] for row in gold], weighting).loss(random_scores(9), range(9), 0.0)
    torch.testing.assert_close(ours, each.mean() / mean_weight)


def test_balanced_weights_by_hand():
    assert targets([[0], [0], [0], [1]], "balanced").weights.tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2])
    assert targets([[0], [0], [0], [0], [1]], "sqrt").weights.tolist() == pytest.approx([5 / 6] * 4 + [5 / 3])
    assert targets([[0], [0], [1]]).weights.tolist() == [1, 1, 1]


def test_a_batch_looks_up_its_own_examples():
    whole = targets([[0], [1, 2], [3], [4]], "sqrt")
    scores = random_scores(4)
    parts = [whole.loss(scores[[index]], [index], 0.1) for index in range(4)]
    torch.testing.assert_close(whole.loss(scores[[3, 1]], [3, 1], 0.1), (parts[3] + parts[1]) / 2)


def test_gold_rows_of_all_examples_are_seen():
    assert targets([[3], [1, 3], [1]]).seen.tolist() == [1, 3]


def head_after_a_step(seen: list[int], *, weight_decay: float) -> tuple[FlatHead, FlatHead]:
    """A head before and after an AdamW step with the rows not in `seen` held."""
    start = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    before, head = FlatHead(start, HeadConfig(hidden=0)), FlatHead(start, HeadConfig(hidden=0))
    held = HeldRows(head, torch.tensor(seen))
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1, weight_decay=weight_decay)
    head(random_scores(2, 3)).square().sum().backward()
    held.drop_gradients()
    optimizer.step()
    held.put_back()
    return before, head


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_held_rows_keep_their_bits_and_the_others_move(weight_decay):
    before, head = head_after_a_step([0, 2], weight_decay=weight_decay)
    assert torch.equal(head.rows[[1, 3]], before.rows[[1, 3]])
    assert torch.equal(head.bias[[1, 3]], before.bias[[1, 3]])
    assert (head.rows[[0, 2]] != before.rows[[0, 2]]).all()
    assert (head.bias[[0, 2]] != before.bias[[0, 2]]).all()


def test_held_rows_have_no_gradient_that_could_count_in_its_norm():
    _, head = head_after_a_step([0, 2], weight_decay=0.0)
    assert head.rows.grad is not None
    assert head.bias.grad is not None
    assert not head.rows.grad[[1, 3]].any()
    assert not head.bias.grad[[1, 3]].any()
    assert head.rows.grad[[0, 2]].any(dim=1).all()


def test_nothing_is_held_when_all_rows_are_seen():
    before, head = head_after_a_step([0, 1, 2, 3], weight_decay=0.0)
    assert (head.rows != before.rows).all()
