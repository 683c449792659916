import random

import pytest
import torch

from caravan.config import BackboneConfig
from caravan.model.backbone import load_backbone
from caravan.training import inputs as inputs_module
from caravan.training.features import FeatureStore
from caravan.training.inputs import TokenInputs, VectorInputs, encode_inputs, encode_with_progress, training_dtype
from tiny_models import make_tiny_llama
from toy_training import Log, toy_backbone, toy_config, toy_retriever

TEXTS = ["a b c d e f", "a", "b c", "x y z", "a"]


def test_vectors_are_looked_up_by_number():
    vectors = torch.arange(12.0).reshape(4, 3)
    inputs = VectorInputs(vectors)
    assert inputs.queries([2, 0]).tolist() == [[6, 7, 8], [0, 1, 2]]
    assert inputs.lengths == [1, 1, 1, 1]


def test_tokens_give_the_encoders_vectors_and_their_lengths(backbone):
    encoder = toy_retriever(backbone).encoder
    inputs = TokenInputs(encoder, TEXTS, toy_config())
    assert inputs.lengths == [8, 3, 4, 5, 3]  # letters, [CLS] and [SEP]
    torch.testing.assert_close(inputs.queries([3, 1, 0]), encoder.encode([TEXTS[i] for i in (3, 1, 0)]))


def test_the_adapter_gets_a_gradient_and_the_frozen_blocks_none(backbone):
    encoder = toy_retriever(backbone).encoder
    TokenInputs(encoder, TEXTS, toy_config()).queries([0, 3]).sum().backward()
    assert encoder.adapter.matrix.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_blocks_are_left_without_activation_checkpointing(backbone):
    encoder = toy_retriever(backbone).encoder
    inputs = TokenInputs(encoder, TEXTS, toy_config(activation_checkpointing=True))
    assert inputs.backbone is backbone  # the retriever's own blocks: a switch left on would stay with the user
    layers = [module for module in backbone.model.modules() if "forward" in vars(module)]
    assert len(layers) == 2
    inputs.close()
    assert not [module for module in backbone.model.modules() if "forward" in vars(module)]
    assert not any(module.training for module in backbone.model.modules())


@pytest.mark.parametrize(
    ("precision", "loaded", "expected"),
    [
        ("float32", "float32", torch.float32),
        ("bfloat16", "float32", torch.bfloat16),
        ("float32", "bfloat16", torch.bfloat16),
        ("auto", "bfloat16", torch.bfloat16),
    ],
)
def test_the_blocks_compute_in_the_asked_dtype_but_never_wider_than_loaded(tmp_path, precision, loaded, expected):
    assert training_dtype(toy_config(precision=precision), toy_backbone(tmp_path, dtype=loaded)) == expected


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_takes_bfloat16_only_where_the_processor_multiplies_it(backbone, monkeypatch, native, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert training_dtype(toy_config(precision="auto"), backbone) == expected


@pytest.mark.parametrize("kept", [False, True])
def test_encoding_is_reported_from_start_to_end(backbone, tmp_path, kept):
    encoder, store = toy_retriever(backbone).encoder, FeatureStore(tmp_path)
    if kept:
        store.encode(encoder, TEXTS)
    log = Log()
    vectors = encode_with_progress(encoder, TEXTS, store, log, task="encoding queries")
    assert vectors.shape == (5, 32)
    done = [progress.done for progress in log.told]
    assert done == sorted(done)
    assert done == ([5] if kept else [1, 5])  # the second "a" costs nothing
    assert {(progress.task, progress.total) for progress in log.told} == {("encoding queries", 5)}


# Dropout


def noise(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("rate", [0.2, 0.75])
def test_the_expected_share_of_a_vectors_numbers_is_kept_and_scaled_up(rate):
    vectors = torch.linspace(-3, 3, 200 * 64).reshape(200, 64)
    dropped = VectorInputs(vectors, rate).queries(range(200), noise())
    kept = dropped != 0
    # 12,800 numbers, each kept with probability 1 - rate: four standard deviations are at most 0.016.
    assert float(kept.float().mean()) == pytest.approx(1 - rate, abs=4 * (rate * (1 - rate) / 12_800) ** 0.5)
    torch.testing.assert_close(dropped[kept], vectors[kept] / (1 - rate))
    shares = kept.float().mean(dim=1)
    assert 0 < float(shares.std()) < 0.1  # each query loses its own numbers, none loses all


def test_the_mean_over_many_draws_is_the_vector_itself():
    inputs, generator = VectorInputs(torch.tensor([[1.0, -2.0, 0.5]]), 0.5), noise()
    draws = torch.stack([inputs.queries([0], generator)[0] for _ in range(4000)])
    # A number x becomes 2x or 0, so its standard deviation is |x|, and that of the mean |x| / 63.
    torch.testing.assert_close(draws.mean(dim=0), torch.tensor([1.0, -2.0, 0.5]), rtol=0, atol=0.13)
    assert set(draws[:, 1].tolist()) == {-4.0, 0.0}


def test_vectors_lose_nothing_without_noise_or_at_rate_zero():
    vectors = torch.randn(5, 8, generator=noise())
    assert torch.equal(VectorInputs(vectors, 0.9).queries([4, 1]), vectors[[4, 1]])
    assert torch.equal(VectorInputs(vectors, 0.0).queries([4, 1], noise()), vectors[[4, 1]])


def test_vectors_that_are_kept_for_later_epochs_are_not_changed():
    vectors = torch.ones(5, 8)
    VectorInputs(vectors, 0.5).queries(range(5), noise())
    assert torch.equal(vectors, torch.ones(5, 8))


def test_the_same_noise_drops_the_same_and_the_next_draw_something_else():
    inputs, generator = VectorInputs(torch.ones(5, 8), 0.5), noise(1)
    first, second = inputs.queries(range(5), generator), inputs.queries(range(5), generator)
    assert torch.equal(first, inputs.queries(range(5), noise(1)))
    assert not torch.equal(first, second)


def test_vectors_of_tokens_lose_numbers_like_those_computed_before(backbone):
    encoder = toy_retriever(backbone).encoder
    inputs = TokenInputs(encoder, TEXTS, toy_config(dropout=0.75))
    whole = encoder.encode(TEXTS)
    torch.testing.assert_close(inputs.queries(range(5)), whole)  # without noise
    torch.testing.assert_close(
        inputs.queries(range(5), noise(1)), VectorInputs(whole, 0.75).queries(range(5), noise(1))
    )


def test_queries_to_train_on_and_to_validate_on_have_one_numbering_and_the_dropout(backbone):
    encoder = toy_retriever(backbone).encoder
    inputs = encode_inputs(encoder, TEXTS[:3], TEXTS[3:], FeatureStore(), None, dropout=0.3)
    torch.testing.assert_close(inputs.queries([4, 0]), encoder.encode([TEXTS[4], TEXTS[0]]))
    assert inputs.dropout == 0.3


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return load_backbone(BackboneConfig(name=str(make_tiny_llama(tmp_path_factory.mktemp("llama"))), max_tokens=40))


@pytest.fixture
def fed(monkeypatch):
    """The tokens of each batch that is encoded."""
    batches = []
    original = inputs_module.pad
    monkeypatch.setattr(
        inputs_module, "pad", lambda tokens, **options: (batches.append(tokens), original(tokens, **options))[1]
    )
    return batches


def is_part_of(part, whole):
    """Whether what is left of a list stands in its order."""
    rest = iter(whole)
    return all(token in rest for token in part)


@pytest.mark.parametrize("family", ["encoder", "decoder"])
def test_the_expected_share_of_tokens_is_left_out_but_never_the_first_or_last(backbone, decoder, fed, family):
    source = random.Random(0)
    texts = [" ".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randint(1, 15))) for _ in range(400)]
    encoder = toy_retriever({"encoder": backbone, "decoder": decoder}[family]).encoder
    inputs = TokenInputs(encoder, texts, toy_config(token_dropout=0.3))
    inputs.queries(range(400), noise())
    (left,) = fed
    for part, whole in zip(left, inputs.tokens, strict=True):
        assert (part[0], part[-1]) == (whole[0], whole[-1])
        assert is_part_of(part, whole)
    assert len({whole[-1] for whole in inputs.tokens}) == 1  # [SEP], or the end token that is pooled
    inner = sum(len(whole) - 2 for whole in inputs.tokens)
    assert inner > 3000
    share = sum(len(part) - 2 for part in left) / inner
    assert share == pytest.approx(0.7, abs=4 * (0.3 * 0.7 / inner) ** 0.5)


def test_a_text_of_one_or_two_tokens_is_never_left_out(backbone, fed):
    inputs = TokenInputs(toy_retriever(backbone).encoder, ["a", "b"], toy_config(token_dropout=0.99))
    inputs.tokens = [[7], [7, 8]]
    assert torch.isfinite(inputs.queries([0, 1], noise())).all()
    assert fed == [[[7], [7, 8]]]


def test_tokens_are_all_there_without_noise_and_at_rate_zero(backbone, fed):
    encoder = toy_retriever(backbone).encoder
    half, none = TokenInputs(encoder, TEXTS, toy_config(token_dropout=0.5)), TokenInputs(encoder, TEXTS, toy_config())
    plain = half.queries(range(5))
    assert torch.equal(plain, none.queries(range(5), noise()))
    assert not torch.equal(plain, half.queries(range(5), noise()))
    torch.testing.assert_close(plain, half.queries(range(5)))  # what was left out once is there again
    assert fed[0] == fed[1] == fed[3] == half.tokens


def test_the_same_noise_leaves_out_the_same_tokens(backbone, fed):
    inputs, generator = TokenInputs(toy_retriever(backbone).encoder, TEXTS, toy_config(token_dropout=0.5)), noise(1)
    for source in (generator, generator, noise(1)):
        inputs.queries([0, 3], source)
    assert fed[0] == fed[2]
    assert fed[0] != fed[1]
