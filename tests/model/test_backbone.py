from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from caravan.config import BackboneConfig
from caravan.errors import BackboneError
from caravan.model import backbone as backbone_module
from caravan.model.adapter import FullAdapter
from caravan.model.backbone import Backbone, load_backbone, random_twin
from caravan.model.encoder import pad, pool
from tiny_models import DECODERS, ENCODERS, FAMILIES, make_tiny_bert, make_tiny_llama, make_tiny_opt, make_tiny_qwen3

Folders = Callable[[str], Path]
Backbones = Callable[..., Backbone]

TEXTS = ["how do i return a broken lamp", "hi", "my order is late again", "where?"]
FINAL_NORMS = {
    "llama": "norm",
    "gpt2": "ln_f",
    "gpt_neox": "final_layer_norm",
    "qwen2": "norm",
    "qwen3": "norm",
    "gemma": "norm",
    "opt": "decoder.final_layer_norm",
}


def plain_model(folder: Path) -> Any:
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def states(backbone: Backbone, tokens: list[list[int]], *, side: str = "right") -> tuple[Tensor, Tensor]:
    input_ids, mask = pad(tokens, device=torch.device("cpu"), side=side)
    with torch.no_grad():
        return backbone.blocks(backbone.embed(input_ids), mask), mask


@pytest.fixture(autouse=True)
def _few_words_from_transformers() -> Iterator[None]:
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(verbosity)


class TestTheTwoHalves:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_lookup_and_blocks_together_are_bit_for_bit_the_bare_model(
        self, family: str, folder_of: Folders, backbone_of: Backbones
    ) -> None:
        backbone = backbone_of(family)
        tokens = backbone.tokenize(["seven tall ships", "eleven of those"])
        input_ids = torch.tensor([ids[:12] for ids in tokens])
        mask = torch.ones_like(input_ids)
        with torch.no_grad():
            expected = plain_model(folder_of(family))(input_ids=input_ids, attention_mask=mask).last_hidden_state
            assert torch.equal(backbone.blocks(backbone.embed(input_ids), mask), expected)

    @pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_padding_on_either_side_gives_the_vector_of_the_text_alone(
        self, family: str, pooling: str, backbone_of: Backbones
    ) -> None:
        backbone = backbone_of(family, pooling=pooling)
        tokens = backbone.tokenize(TEXTS)
        alone = torch.cat([pool(*states(backbone, [ids]), pooling) for ids in tokens])
        for side in ("left", "right"):
            together = pool(*states(backbone, tokens, side=side), pooling)
            torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_order_of_the_tokens_matters(self, family: str, backbone_of: Backbones) -> None:
        backbone = backbone_of(family)
        ids = backbone.tokenize(["abcdef"])[0]
        swapped = [ids[0], ids[2], ids[1], *ids[3:]]
        first, second = (pool(*states(backbone, [tokens]), "mean") for tokens in (ids, swapped))
        assert (first - second).abs().max() > 1e-3

    @pytest.mark.parametrize("family", DECODERS)
    def test_the_final_norm_of_a_decoder_is_applied(self, family: str, backbone_of: Backbones) -> None:
        backbone = backbone_of(family)
        norm: Any = backbone.model.get_submodule(FINAL_NORMS[family])
        before: list[Tensor] = []
        hook = norm.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
        after, _ = states(backbone, backbone.tokenize(["seven ships"]))
        hook.remove()
        with torch.no_grad():
            assert torch.equal(after, norm(before[0]))
        assert not torch.allclose(after, before[0], atol=1e-2)

    @pytest.mark.parametrize(("family", "embedding", "hidden"), [("bert", 32, 32), ("albert", 16, 32)])
    def test_widths_of_embeddings_and_states(
        self, family: str, embedding: int, hidden: int, backbone_of: Backbones
    ) -> None:
        backbone = backbone_of(family)
        assert (backbone.embedding_width, backbone.hidden_width) == (embedding, hidden)
        assert backbone.embed(torch.tensor([[1, 2]])).shape == (1, 2, embedding)

    def test_the_lookup_of_gemma_is_scaled_and_others_are_not(self, backbone_of: Backbones) -> None:
        assert backbone_of("gemma").embedding_scale == pytest.approx(32**0.5)
        assert backbone_of("llama").embedding_scale == 1.0

    @pytest.mark.parametrize("family", FAMILIES)
    def test_family_and_pooling(self, family: str, backbone_of: Backbones) -> None:
        backbone = backbone_of(family)
        expected = ("encoder", "mean") if family in ENCODERS else ("decoder", "last")
        assert (backbone.family, backbone.pooling) == expected
        assert backbone_of(family, pooling="cls").pooling == "cls"

    def test_a_family_whose_embeddings_do_not_stand_for_its_ids_is_refused(
        self, folder_of: Folders, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(backbone_module, "_position_offset", lambda model: 0)
        with pytest.raises(BackboneError, match="roberta model does not give the same states from token embeddings"):
            load_backbone(BackboneConfig(name=str(folder_of("roberta"))))


class TestTokens:
    @pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
    def test_a_decoders_text_ends_with_one_end_of_sequence_token(self, family: str, backbone_of: Backbones) -> None:
        backbone = backbone_of(family)
        for ids in backbone.tokenize(["ab", "a text of more than eight tokens"]):
            assert ids[-1] == 2
            assert ids.count(2) == 1

    def test_a_text_that_ends_with_it_gets_no_second(self, backbone_of: Backbones) -> None:
        ids = backbone_of("llama").tokenize(["it says </s>"])[0]
        assert ids[-1] == 2
        assert ids.count(2) == 1

    @pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
    def test_the_end_of_sequence_token_survives_the_cut(self, family: str, backbone_of: Backbones) -> None:
        ids = backbone_of(family, max_tokens=8).tokenize(["a text of more than eight tokens"])[0]
        assert len(ids) == 8
        assert ids[-1] == 2
        assert ids.count(2) == 1

    def test_nothing_is_appended_where_the_last_token_is_not_pooled(self, backbone_of: Backbones) -> None:
        assert backbone_of("llama", pooling="mean").tokenize(["ab"])[0][-1] != 2
        assert backbone_of("bert", pooling="last").tokenize(["ab"])[0][-1] == 3

    def test_a_tokenizer_that_closes_texts_with_another_token_is_left_to_it(self, tmp_path: Path) -> None:
        folder = make_tiny_qwen3(tmp_path / "closing")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token, tokenizer.eos_token = "</s>", "<s>"
        tokenizer.save_pretrained(folder)
        ids = load_backbone(BackboneConfig(name=str(folder))).tokenize(["ab"])[0]
        assert len(ids) == 3
        assert ids[-1] == 2

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_long_text_is_cut_at_what_the_positions_allow(self, family: str, backbone_of: Backbones) -> None:
        backbone = backbone_of(family, max_tokens=100_000)
        limit = 126 if family == "roberta" else 128
        assert backbone.max_tokens == limit
        tokens = backbone.tokenize(["lorem ipsum " * 40, "short"])
        assert len(tokens[0]) == limit
        assert torch.isfinite(states(backbone, tokens)[0]).all()

    def test_a_text_is_cut_at_max_tokens_from_its_end(self, backbone_of: Backbones) -> None:
        whole = backbone_of("bert").tokenize(["abcdefgh"])[0]
        assert backbone_of("bert", max_tokens=6).tokenize(["abcdefgh"])[0] == [*whole[:5], whole[-1]]

    @pytest.mark.parametrize(("family", "needed"), [("bert", 3), ("llama", 3), ("gpt2", 2)])
    def test_a_limit_that_leaves_no_room_for_text_is_refused(
        self, family: str, needed: int, backbone_of: Backbones
    ) -> None:
        assert len(backbone_of(family, max_tokens=needed).tokenize(["abcdef"])[0]) == needed
        with pytest.raises(BackboneError, match=f"max_tokens = {needed - 1} leaves no room for text; set .* {needed}$"):
            backbone_of(family, max_tokens=needed - 1)

    def test_no_texts_give_no_tokens(self, backbone_of: Backbones) -> None:
        assert backbone_of("bert").tokenize([]) == []

    def test_a_tokenizer_of_another_model_is_refused_by_the_token_it_gives(self, tmp_path: Path) -> None:
        folder = make_tiny_llama(tmp_path / "small", vocab_size=60)
        with pytest.raises(BackboneError, match="the tokenizer gives token 68, the model knows 0 to 59"):
            load_backbone(BackboneConfig(name=str(folder)))


class TestFrozen:
    @pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
    def test_weights_stay_bit_identical_while_an_adapter_is_trained(self, family: str, backbone_of: Backbones) -> None:
        backbone = backbone_of(family)
        before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
        adapter = FullAdapter(backbone.embedding_width)
        optimizer = torch.optim.AdamW([*adapter.parameters(), *backbone.parameters()], lr=0.1, weight_decay=0.1)
        backbone.train()
        input_ids, mask = pad(backbone.tokenize(TEXTS), device=torch.device("cpu"))
        for _ in range(3):
            optimizer.zero_grad()
            pool(backbone.blocks(adapter(backbone.embed(input_ids)), mask), mask, "mean").square().sum().backward()
            optimizer.step()
        assert not adapter.is_identity()
        assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in backbone.parameters())

    def test_no_dropout_is_active_whatever_mode_is_asked_for(self, tmp_path: Path) -> None:
        folder = make_tiny_bert(tmp_path / "dropout", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
        backbone = load_backbone(BackboneConfig(name=str(folder)))
        nn.Sequential(backbone).train()
        tokens = backbone.tokenize(TEXTS)
        assert torch.equal(states(backbone, tokens)[0], states(backbone, tokens)[0])
        assert not any(module.training for module in backbone.modules())


class TestCast:
    @pytest.mark.parametrize("family", ["bert", "llama", "gemma"])
    def test_the_copy_shares_the_table_and_leaves_the_original_as_it_was(
        self, family: str, backbone_of: Backbones
    ) -> None:
        backbone = backbone_of(family)
        before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
        copied = backbone.cast(torch.bfloat16)
        assert copied.table is backbone.table
        assert copied.model.get_input_embeddings() is backbone.table  # type: ignore[operator]
        narrow = {name: p.dtype for name, p in copied.model.named_parameters() if p is not copied.table.weight}
        assert set(narrow.values()) == {torch.bfloat16}
        assert copied.blocks_dtype == torch.bfloat16
        assert not any(parameter.requires_grad for parameter in copied.parameters())
        after = backbone.model.state_dict()
        assert all(after[name].dtype == torch.float32 for name in before)
        assert all(torch.equal(after[name], before[name]) for name in before)

    @pytest.mark.parametrize("family", ["bert", "llama", "gemma"])
    def test_the_copy_gives_nearly_the_same_states(self, family: str, backbone_of: Backbones) -> None:
        backbone = backbone_of(family)
        tokens = backbone.tokenize(TEXTS)
        exact, mask = states(backbone, tokens)
        near, _ = states(backbone.cast(torch.bfloat16), tokens)
        assert near.dtype == torch.bfloat16
        cosines = nn.functional.cosine_similarity(exact, near.float(), dim=2)[mask]
        assert cosines.min() > 0.99

    def test_a_cast_to_the_same_dtype_is_no_copy(self, backbone_of: Backbones) -> None:
        backbone = backbone_of("bert")
        assert backbone.cast(torch.float32) is backbone


class TestActivationCheckpointing:
    @staticmethod
    def gradient(backbone: Backbone) -> tuple[Tensor, int]:
        calls = []
        inner = next(m for m in backbone.model.modules() if type(m).__name__.endswith("Attention"))
        hook = inner.register_forward_hook(lambda *_: calls.append(1))
        adapter = FullAdapter(backbone.embedding_width)
        input_ids, mask = pad(backbone.tokenize(TEXTS), device=torch.device("cpu"))
        pool(backbone.blocks(adapter(backbone.embed(input_ids)), mask), mask, "mean").square().sum().backward()
        hook.remove()
        assert adapter.matrix.grad is not None
        return adapter.matrix.grad, len(calls)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_blocks_are_computed_twice_for_the_same_gradients(self, family: str, backbone_of: Backbones) -> None:
        backbone = backbone_of(family)
        plain, calls = self.gradient(backbone)
        backbone.checkpoint_activations(True)
        backbone.checkpoint_activations(True)
        backbone.train()
        checkpointed, repeated = self.gradient(backbone)
        backbone.checkpoint_activations(False)
        after, again = self.gradient(backbone)
        torch.testing.assert_close(checkpointed, plain, rtol=1e-6, atol=1e-6)
        assert (repeated, again) == (2 * calls, calls)
        assert torch.equal(after, plain)

    def test_it_goes_over_to_a_cast_copy_whose_own_weights_are_used(self, folder_of: Folders) -> None:
        backbone = load_backbone(BackboneConfig(name=str(folder_of("llama"))))
        backbone.checkpoint_activations(True)
        copied = backbone.cast(torch.bfloat16)
        gradient, calls = self.gradient(copied)
        copied.checkpoint_activations(False)
        assert (self.gradient(copied)[1], calls) == (1, 2)
        assert torch.equal(self.gradient(copied)[0], gradient)
        assert self.gradient(backbone)[1] == 2

    def test_it_brings_no_dropout_back(self, tmp_path: Path) -> None:
        backbone = load_backbone(BackboneConfig(name=str(make_tiny_opt(tmp_path / "opt", dropout=0.5))))
        plain, _ = self.gradient(backbone)
        backbone.checkpoint_activations(True)
        torch.testing.assert_close(self.gradient(backbone)[0], plain, rtol=1e-6, atol=1e-6)

    def test_a_model_without_blocks_to_tell_apart_is_refused(self, folder_of: Folders) -> None:
        backbone = load_backbone(BackboneConfig(name=str(folder_of("bert"))))
        backbone.model = nn.Linear(2, 2)
        with pytest.raises(BackboneError, match="activation_checkpointing = false"):
            backbone.checkpoint_activations(True)


class TestRandomTwin:
    @pytest.mark.parametrize("family", ["bert", "llama"])
    def test_it_has_the_same_shapes_and_other_weights(self, family: str, backbone_of: Backbones) -> None:
        backbone = backbone_of(family)
        twin = random_twin(backbone, seed=1)
        ours, theirs = backbone.state_dict(), twin.state_dict()
        assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}
        assert not torch.allclose(backbone.table.weight, twin.table.weight, atol=1e-3)
        assert twin.hash != backbone.hash
        assert twin.tokenize(TEXTS) == backbone.tokenize(TEXTS)

    def test_its_seed_decides_its_weights_and_its_hash(self, backbone_of: Backbones) -> None:
        first, again, other = (random_twin(backbone_of("bert"), seed=seed) for seed in (1, 1, 2))
        assert first.hash == again.hash != other.hash
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
        assert not torch.equal(first.table.weight, other.table.weight)

    def test_the_global_random_numbers_are_left_alone(self, backbone_of: Backbones) -> None:
        before = torch.get_rng_state()
        random_twin(backbone_of("bert"), seed=1)
        assert torch.equal(torch.get_rng_state(), before)


def test_a_reference_names_settings_hash_family_and_pooling(backbone_of: Backbones) -> None:
    backbone = backbone_of("llama", max_tokens=64)
    reference = backbone.reference()
    settings = {name: value for name, value in reference.items() if name not in ("hash", "family")}
    assert BackboneConfig(**{**settings, "pooling": "auto"}) == backbone.config
    assert (reference["hash"], reference["family"], reference["pooling"]) == (backbone.hash, "decoder", "last")


@pytest.mark.parametrize("device", ["cuda", "meta", "abacus"])
def test_a_device_that_is_not_there_is_refused(device: str, folder_of: Folders) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackboneError, match=f'device "{device}" cannot be used here .*; set backbone.device = "cpu"$'):
        load_backbone(BackboneConfig(name=str(folder_of("bert")), device=device))
