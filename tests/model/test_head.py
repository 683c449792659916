import numpy as np
import pytest
import torch

from caravan.config import HeadConfig
from caravan.model.head import FlatHead, OutputAdapterHead


def vectors(rows: int, width: int, *, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("hidden", [0, 5])
def test_at_the_start_the_ranking_is_that_of_a_dot_product(hidden: int) -> None:
    documents, queries = vectors(40, 8, seed=0), vectors(15, 8, seed=1)
    scores = FlatHead(documents, HeadConfig(hidden=hidden))(queries).detach().numpy()
    dots = queries.numpy().astype(np.float64) @ documents.numpy().astype(np.float64).T
    assert (np.argsort(-scores, axis=1) == np.argsort(-dots, axis=1)).all()


def test_logits_of_two_documents_worked_out_by_hand() -> None:
    head = FlatHead(torch.tensor([[1.0, 2.0], [-1.0, 0.5]]), HeadConfig(scale=2.0))
    with torch.no_grad():
        head.bias.copy_(torch.tensor([0.25, -1.0]))
    # The first scores 2 * (3 * 1 + 4 * 2) + 0.25, the second 2 * (3 * -1 + 4 * 0.5) - 1.
    torch.testing.assert_close(head(torch.tensor([[3.0, 4.0]])), torch.tensor([[22.25, -3.0]]), rtol=0, atol=1e-5)


def test_logits_through_the_pre_classifier_layer_worked_out_by_hand() -> None:
    head = FlatHead(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), HeadConfig(hidden=1, scale=1.0))
    assert head.pre is not None
    head.pre.load_state_dict(
        {
            "inner": torch.tensor([[2.0], [-1.0]]),
            "inner_bias": torch.tensor([0.5]),
            "outer": torch.tensor([[10.0, -10.0]]),
        }
    )
    # relu(2 * 1 - 1 + 0.5) = 1.5 is added ten times over to the first, taken from the second;
    # relu(-2 + 1 + 0.5) = 0 adds nothing.
    expected = torch.tensor([[16.0, -14.0], [-1.0, -1.0]])
    torch.testing.assert_close(head(torch.tensor([[1.0, 1.0], [-1.0, -1.0]])), expected, rtol=0, atol=1e-5)


def test_a_pre_classifier_layer_starts_with_exactly_the_same_scores() -> None:
    documents, queries = vectors(6, 8, seed=0), vectors(4, 8, seed=1)
    plain, layered = FlatHead(documents, HeadConfig()), FlatHead(documents, HeadConfig(hidden=16))
    assert torch.equal(plain(queries), layered(queries))


def test_a_pre_classifier_layer_can_leave_its_start() -> None:
    head = FlatHead(vectors(6, 8, seed=0), HeadConfig(hidden=16))
    assert head.pre is not None
    head(vectors(4, 8, seed=1)).square().mean().backward()
    assert head.pre.outer.grad is not None
    assert bool(head.pre.outer.grad.any())


def test_two_heads_start_from_the_same_pre_classifier_layer() -> None:
    first, second = (FlatHead(vectors(3, 8, seed=0), HeadConfig(hidden=4)).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("hidden", "count"), [(0, 5 * 8 + 5 + 1), (3, 5 * 8 + 5 + 1 + 8 * 3 + 3 + 3 * 8)])
def test_the_number_of_parameters_of_five_documents_at_width_8(hidden: int, count: int) -> None:
    head = FlatHead(vectors(5, 8, seed=0), HeadConfig(hidden=hidden))
    assert sum(parameter.numel() for parameter in head.parameters()) == count


def test_the_head_keeps_a_copy_of_its_rows_in_float32() -> None:
    rows = vectors(3, 8, seed=0).to(torch.float64)
    head = FlatHead(rows, HeadConfig())
    rows.zero_()
    assert head.rows.dtype == torch.float32
    assert bool(head.rows.any())


def test_an_output_adapter_starts_as_cosines_with_rows_that_stay() -> None:
    rows = torch.nn.functional.normalize(vectors(6, 8, seed=0), dim=1)
    head = OutputAdapterHead(rows, HeadConfig(scale=1.0))
    queries = vectors(4, 8, seed=1)
    expected = torch.nn.functional.cosine_similarity(queries.unsqueeze(1), rows.unsqueeze(0), dim=2)
    torch.testing.assert_close(head(queries), expected, rtol=0, atol=1e-6)
    assert sorted(name for name, _ in head.named_parameters()) == ["log_scale", "matrix"]
