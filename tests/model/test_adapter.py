import pytest
import torch

from caravan.config import AdapterConfig
from caravan.model.adapter import Adapter, make_adapter

WIDTH = 12
KINDS = ["full", "lowrank", "core", "none"]


def make(kind: str, *, rank: int = 3, bias: bool = False, seed: int = 0, width: int = WIDTH) -> Adapter:
    return make_adapter(AdapterConfig(kind=kind, rank=rank, bias=bias, seed=seed), width)  # type: ignore[arg-type]


def shake(adapter: Adapter, *, seed: int = 5) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapter


def embeddings(rows: int = 7, *, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_exactly_the_identity_at_the_start(kind: str, bias: bool) -> None:
    adapter = make(kind, bias=bias)
    assert torch.equal(adapter(embeddings()), embeddings())
    assert adapter.is_identity()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["full", "lowrank", "core"])
def test_a_kind_that_has_moved_is_no_identity_and_says_so(kind: str, bias: bool) -> None:
    adapter = shake(make(kind, bias=bias))
    assert not torch.allclose(adapter(embeddings()), embeddings(), atol=1e-3)
    assert not adapter.is_identity()


@pytest.mark.parametrize("kind", ["full", "lowrank", "core"])
def test_a_bias_alone_is_no_identity(kind: str) -> None:
    adapter = make(kind, bias=True)
    assert adapter.bias is not None
    with torch.no_grad():
        adapter.bias[3] = 0.5
    assert not adapter.is_identity()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_looking_up_a_folded_table_equals_adapting_the_lookup(kind: str, bias: bool) -> None:
    adapter = shake(make(kind, bias=bias))
    table, ids = embeddings(rows=50), torch.tensor([[3, 3, 49], [0, 17, 8]])
    torch.testing.assert_close(adapter.fold(table)[ids], adapter(table[ids]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_folding_accounts_for_a_lookup_that_scales_its_table(kind: str) -> None:
    adapter = shake(make(kind, bias=True))
    table, scale = embeddings(rows=20), 8.0
    torch.testing.assert_close(scale * adapter.fold(table, scale=scale), adapter(scale * table), rtol=0, atol=1e-5)


def test_a_folded_table_never_is_the_table_itself() -> None:
    table = embeddings()
    make("none").fold(table)[0, 0] = 99.0
    assert table[0, 0] != 99.0


def test_the_full_adapter_multiplies_from_the_right() -> None:
    adapter = make("full", width=2, bias=True)
    adapter.load_state_dict({"matrix": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "bias": torch.tensor([0.5, -0.5])})
    # 1 * 1 + 10 * 3 + 0.5 comes first, then 1 * 2 + 10 * 4 - 0.5.
    assert adapter(torch.tensor([[1.0, 10.0]])).tolist() == [[31.5, 41.5]]


def test_the_lowrank_adapter_is_one_plus_u_v() -> None:
    adapter = make("lowrank", width=2, rank=1)
    adapter.load_state_dict({"down": torch.tensor([[1.0], [2.0]]), "up": torch.tensor([[3.0, 4.0]])})
    # U gives 1 * 1 + 10 * 2 = 21; V adds three and four times that.
    assert adapter(torch.tensor([[1.0, 10.0]])).tolist() == [[64.0, 94.0]]


def test_the_core_adapter_is_one_plus_u_r_v_transposed() -> None:
    adapter = shake(make("core"))
    frame = dict(adapter.named_buffers())
    matrix = torch.eye(WIDTH) + frame["down"] @ dict(adapter.named_parameters())["core"] @ frame["up"].T
    torch.testing.assert_close(adapter(embeddings()), embeddings() @ matrix, rtol=0, atol=1e-6)


def test_a_core_adapters_frame_comes_from_its_seed_is_orthonormal_and_frozen() -> None:
    first, again, other = (dict(make("core", seed=seed).named_buffers()) for seed in (4, 4, 5))
    for name in ("down", "up"):
        assert torch.equal(first[name], again[name])
        assert not torch.allclose(first[name], other[name], atol=1e-3)
        torch.testing.assert_close(first[name].T @ first[name], torch.eye(3), rtol=0, atol=1e-6)
        assert not first[name].requires_grad
    assert not torch.allclose(first["down"], first["up"], atol=1e-3)
    assert list(make("core").state_dict()) == ["core"]


@pytest.mark.parametrize(
    ("kind", "rank", "bias", "count"),
    [
        ("full", 3, False, 144),
        ("full", 3, True, 156),
        ("lowrank", 3, False, 72),
        ("lowrank", 3, True, 84),
        ("core", 3, False, 9),
        ("core", 3, True, 21),
        ("none", 3, False, 0),
        ("none", 3, True, 0),
        ("lowrank", 100, False, 288),  # a rank above the width is cut to it
        ("core", 100, False, 144),
    ],
)
def test_the_number_of_trained_parameters_at_width_12(kind: str, rank: int, bias: bool, count: int) -> None:
    adapter = make(kind, rank=rank, bias=bias)
    assert sum(parameter.numel() for parameter in adapter.parameters() if parameter.requires_grad) == count


def test_making_an_adapter_leaves_the_global_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    for kind in KINDS:
        make(kind)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["full", "lowrank", "core"])
def test_a_step_against_the_gradient_moves_the_start(kind: str) -> None:
    adapter = make(kind)
    adapter(embeddings()).square().mean().backward()
    with torch.no_grad():
        for parameter in adapter.parameters():
            assert parameter.grad is not None
            parameter -= parameter.grad
    assert not adapter.is_identity()


def test_narrow_embeddings_are_adapted_in_float32() -> None:
    assert shake(make("full"))(embeddings().to(torch.bfloat16)).dtype == torch.float32
