import pytest
import torch

from caravan.training.features import FeatureStore
from caravan.training.inputs import TokenInputs, VectorInputs, encode_with_progress, training_dtype
from toy_training import Log, toy_backbone, toy_config, toy_retriever

TEXTS = ["a b c d e f", "a", "b c", "x y z", "a"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return toy_backbone(tmp_path_factory.mktemp("bert"))


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
