import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModel

from caravan.config import AdapterConfig, BackboneConfig
from caravan.errors import BackboneError, DataError
from caravan.model import encoder as encoding
from caravan.model.adapter import make_adapter
from caravan.model.backbone import Backbone, load_backbone
from caravan.model.encoder import Encoder, even_parts, pad, pool
from tiny_models import FAMILIES

Folders = Callable[[str], Path]
Backbones = Callable[..., Backbone]

TEXTS = ["how do i return a broken lamp", "hi", "my order is late again", "where?", "hi"]


def make(backbone: Backbone, *, moved: float = 0.0, **settings: Any) -> Encoder:
    adapter = make_adapter(AdapterConfig(**{"rank": 4, **settings}), backbone.embedding_width)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * moved)
    return Encoder(backbone, adapter)


def plain_vector(folder: Path, backbone: Backbone, text: str, *, table: Tensor | None = None) -> Tensor:
    """The vector of one text by transformers alone, with its own or another embedding table."""
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(backbone.tokenize([text]))
    with torch.no_grad():
        if table is not None:
            model.get_input_embeddings().weight.copy_(table)
        hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
    pooled = hidden[-1] if backbone.family == "decoder" else hidden.mean(dim=0)
    return pooled / pooled.norm()


class TestPad:
    TOKENS = ([7, 8, 9], [5])

    def test_on_the_right(self) -> None:
        input_ids, mask = pad(self.TOKENS, device=torch.device("cpu"))
        assert input_ids.tolist() == [[7, 8, 9], [5, 0, 0]]
        assert mask.tolist() == [[True, True, True], [True, False, False]]

    def test_on_the_left(self) -> None:
        input_ids, mask = pad(self.TOKENS, device=torch.device("cpu"), side="left")
        assert input_ids.tolist() == [[7, 8, 9], [0, 0, 5]]
        assert mask.tolist() == [[True, True, True], [False, False, True]]


def cuts_of(count: int) -> list[list[range]]:
    """Every way to cut so many texts into groups."""
    ways = []
    for chosen in range(2 ** (count - 1)):
        ends = [end for end in range(1, count) if chosen >> (end - 1) & 1] + [count]
        ways.append([range(start, end) for start, end in zip([0, *ends], ends, strict=False)])
    return ways


class TestEvenParts:
    @given(st.lists(st.integers(1, 30), min_size=1, max_size=9).map(sorted), st.integers(0, 40))
    def test_no_other_cut_costs_less(self, lengths: list[int], alone: int) -> None:
        def cost(parts: list[range]) -> int:
            return sum(alone + len(part) * lengths[part[-1]] for part in parts)

        ours = even_parts(lengths, alone=alone)
        assert [number for part in ours for number in part] == list(range(len(lengths)))
        assert cost(ours) == min(map(cost, cuts_of(len(lengths))))

    def test_one_long_text_goes_by_itself_where_a_pass_is_cheap(self) -> None:
        assert even_parts([5, 5, 6, 50], alone=10) == [range(3), range(3, 4)]
        assert even_parts([5, 5, 6, 50], alone=1000) == [range(4)]

    @pytest.mark.parametrize("side", ["right", "left"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_vectors_and_gradients_are_those_of_one_pass(
        self, family: str, side: str, backbone_of: Backbones, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encoder = make(backbone_of(family), moved=0.1)
        ids, mask = pad(encoder.tokenize([*TEXTS, " ".join(TEXTS)]), device=encoder.device, side=side)
        found, passes, blocks = [], [], Backbone.blocks

        def counted(self: Backbone, embeddings: Tensor, mask: Tensor) -> Tensor:
            passes.append(tuple(mask.shape))
            return blocks(self, embeddings, mask)

        monkeypatch.setattr(Backbone, "blocks", counted)
        for alone in (10**9, 0):
            monkeypatch.setitem(encoding._ALONE, "cpu", alone)
            vectors = encoder(ids, mask)
            (vectors * torch.arange(encoder.width)).sum().backward()
            gradients = [parameter.grad for parameter in encoder.adapter.parameters()]
            encoder.zero_grad()
            found.append([vectors.detach(), *gradients])
        whole = tuple(mask.shape)
        assert passes[0] == whole
        assert (passes[1:] == [whole]) == (side == "left")  # nothing to cut off on the right
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class TestPool:
    HIDDEN = torch.tensor(
        [[[1.0, 2.0], [3.0, 6.0], [float("nan"), 99.0]], [[float("inf"), 9.0], [5.0, 5.0], [7.0, 1.0]]]
    )
    MASK = torch.tensor([[1, 1, 0], [0, 1, 1]])

    @pytest.mark.parametrize("mask", [MASK, MASK.bool()])
    @pytest.mark.parametrize(
        ("how", "expected"),
        [
            ("mean", [[2.0, 4.0], [6.0, 3.0]]),
            ("last", [[3.0, 6.0], [7.0, 1.0]]),
            ("cls", [[1.0, 2.0], [5.0, 5.0]]),
        ],
    )
    def test_padding_on_either_side_is_left_out(self, how: str, expected: list[list[float]], mask: Tensor) -> None:
        assert pool(self.HIDDEN, mask, how).tolist() == expected


class TestEncode:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_at_the_start_of_every_adapter_vectors_are_those_of_the_bare_model(
        self, family: str, folder_of: Folders, backbone_of: Backbones
    ) -> None:
        backbone = backbone_of(family)
        expected = plain_vector(folder_of(family), backbone, "an order of nine lamps")
        for kind in ("full", "lowrank", "core", "none"):
            vector = make(backbone, kind=kind, bias=True).encode(["an order of nine lamps"])[0]
            torch.testing.assert_close(vector, expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_vector_does_not_depend_on_its_batch_mates(self, family: str, backbone_of: Backbones) -> None:
        encoder = make(backbone_of(family), moved=0.1)
        alone = torch.cat([encoder.encode([text]) for text in TEXTS])
        torch.testing.assert_close(encoder.encode(TEXTS, batch_size=3), alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(encoder.encode(TEXTS[::-1]).flip(0), alone, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_plain_model_with_the_folded_table_gives_the_same_vectors(
        self, family: str, folder_of: Folders, backbone_of: Backbones
    ) -> None:
        backbone, text = backbone_of(family), "an order of nine lamps"
        bare = make(backbone, kind="none").encode([text])[0]
        for kind in ("full", "lowrank", "core"):
            encoder = make(backbone, moved=0.2, kind=kind, bias=True)
            vector = encoder.encode([text])[0]
            folded = plain_vector(folder_of(family), backbone, text, table=encoder.folded_table())
            torch.testing.assert_close(folded, vector, rtol=0, atol=1e-5)
            assert (vector - bare).abs().max() > 1e-3

    def test_rows_have_length_one_only_where_asked(self, backbone_of: Backbones) -> None:
        lengths = make(backbone_of("bert")).encode(TEXTS).norm(dim=1)
        torch.testing.assert_close(lengths, torch.ones(5), rtol=0, atol=1e-6)
        raw = make(backbone_of("bert", normalize=False)).encode(TEXTS)
        assert (raw.norm(dim=1) - 1).abs().min() > 1e-2
        torch.testing.assert_close(
            nn.functional.normalize(raw, dim=1), make(backbone_of("bert")).encode(TEXTS), rtol=0, atol=1e-6
        )

    def test_equal_texts_have_equal_vectors_and_progress_adds_up(self, backbone_of: Backbones) -> None:
        done: list[int] = []
        vectors = make(backbone_of("llama")).encode(TEXTS, batch_size=2, progress=done.append)
        assert vectors.shape == (5, 32)
        assert vectors.dtype == torch.float32
        torch.testing.assert_close(vectors[1], vectors[4], rtol=0, atol=1e-6)
        assert done == [2, 2, 1]

    def test_no_texts_give_no_vectors(self, backbone_of: Backbones) -> None:
        assert make(backbone_of("bert")).encode([]).shape == (0, 32)

    @pytest.mark.parametrize("text", ["\x00", "\U0001f680 \u200b", "a\r\nb", "word " * 3000])
    @pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
    def test_unusual_texts_have_vectors(self, family: str, text: str, backbone_of: Backbones) -> None:
        assert torch.isfinite(make(backbone_of(family)).encode([text])).all()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "text 2 of 2 is empty; give at least one word"),
            (" \n\t", "text 2 of 2 is empty; give at least one word"),
            ("a\ud800b", "text 2 of 2 holds a lone surrogate, which is no character; remove it"),
            (None, "text 2 of 2 is of type NoneType; give a string"),
            (3.5, "text 2 of 2 is of type float; give a string"),
        ],
    )
    def test_what_is_no_text_is_refused_by_its_number(self, text: Any, message: str, backbone_of: Backbones) -> None:
        with pytest.raises(DataError) as caught:
            make(backbone_of("bert")).encode(["fine", text])
        assert str(caught.value) == message

    def test_vectors_that_are_not_finite_are_refused(self, folder_of: Folders) -> None:
        backbone = load_backbone(BackboneConfig(name=str(folder_of("bert"))))
        with torch.no_grad():
            backbone.table.weight.mul_(float("inf"))
        with pytest.raises(BackboneError, match="in float32 gives vectors that are not finite"):
            make(backbone).encode(["hello"])


class TestGradients:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_adapters_gradient_is_that_of_finite_differences(self, family: str, backbone_of: Backbones) -> None:
        encoder = make(backbone_of(family), moved=0.1, kind="core", rank=2)
        core: Any = encoder.adapter.core
        input_ids, mask = pad(encoder.tokenize(TEXTS[:2]), device=torch.device("cpu"))
        weights = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))

        def loss() -> Tensor:
            return (encoder(input_ids, mask) * weights).sum()

        loss().backward()
        step = 1e-2
        with torch.no_grad():
            for row, column in ((0, 0), (0, 1), (1, 0)):
                core[row, column] += step
                above = loss()
                core[row, column] -= 2 * step
                below = loss()
                core[row, column] += step
                slope = float((above - below) / (2 * step))
                assert float(core.grad[row, column]) == pytest.approx(slope, rel=2e-2, abs=2e-3)

    def test_vectors_are_those_of_the_soft_embeddings_alone(self, backbone_of: Backbones) -> None:
        encoder = make(backbone_of("albert"), moved=0.1)
        input_ids, mask = pad(encoder.tokenize(TEXTS), device=torch.device("cpu"))
        soft = encoder.adapter(encoder.backbone.embed(input_ids)).detach().requires_grad_()
        vectors = encoder.vectors(soft, mask)
        assert torch.equal(vectors, encoder(input_ids, mask))
        vectors[:, 0].sum().backward()
        assert encoder.adapter.matrix.grad is None
        assert soft.grad is not None
        assert not soft.grad[~mask].any()  # nothing comes back to padding

    def test_another_copy_of_the_blocks_can_do_the_work(self, backbone_of: Backbones) -> None:
        encoder = make(backbone_of("llama"), moved=0.1)
        input_ids, mask = pad(encoder.tokenize(TEXTS), device=torch.device("cpu"))
        soft = encoder.adapter(encoder.backbone.embed(input_ids))
        narrow = encoder.vectors(soft, mask, backbone=encoder.backbone.cast(torch.bfloat16))
        exact = encoder(input_ids, mask)
        assert narrow.dtype == torch.float32
        assert not torch.equal(narrow, exact)
        assert (narrow * exact).sum(dim=1).min() > 0.98
        narrow.sum().backward()
        assert encoder.adapter.matrix.grad is not None


class TestKey:
    def test_the_same_settings_have_the_same_key(self, backbone_of: Backbones) -> None:
        assert make(backbone_of("bert")).key() == make(backbone_of("bert")).key()

    def test_every_adapter_at_its_start_shares_the_key_of_the_bare_backbone(self, backbone_of: Backbones) -> None:
        backbone = backbone_of("bert")
        assert len({make(backbone, kind=kind).key() for kind in ("full", "lowrank", "core", "none")}) == 1

    def test_what_changes_a_vector_changes_the_key(self, backbone_of: Backbones) -> None:
        backbone = backbone_of("bert")
        encoders = [
            make(backbone),
            make(backbone, moved=0.1),
            make(backbone, moved=0.1, bias=True),
            make(backbone, moved=0.1, kind="lowrank"),
            make(backbone, moved=0.1, kind="core", seed=0),
            make(backbone, moved=0.1, kind="core", seed=1),  # the same core in another frame
            make(backbone_of("albert")),
            make(backbone_of("bert", pooling="cls")),
            make(backbone_of("bert", max_tokens=16)),
            make(backbone_of("bert", normalize=False)),
            make(backbone_of("bert", dtype="bfloat16")),
            make(backbone_of("bert", random_weights=True)),
        ]
        assert len({encoder.key() for encoder in encoders}) == len(encoders)

    def test_a_limit_above_the_models_is_the_models(self, backbone_of: Backbones) -> None:
        assert make(backbone_of("bert", max_tokens=128)).key() == make(backbone_of("bert", max_tokens=999)).key()


def test_narrow_blocks_give_float32_vectors(backbone_of: Backbones) -> None:
    exact = make(backbone_of("llama")).encode(TEXTS)
    narrow = make(backbone_of("llama", dtype="bfloat16")).encode(TEXTS)
    assert narrow.dtype == torch.float32
    assert (narrow * exact).sum(dim=1).min() > 0.98


def test_only_the_adapter_is_trainable(backbone_of: Backbones) -> None:
    encoder = make(backbone_of("bert"), kind="core")
    assert [name for name, parameter in encoder.named_parameters() if parameter.requires_grad] == ["adapter.core"]


def test_settings_of_an_encoder_come_from_its_backbone(backbone_of: Backbones) -> None:
    backbone = backbone_of("albert")
    encoder = make(backbone)
    assert (encoder.width, encoder.device) == (32, torch.device("cpu"))
    assert encoder.normalize is dataclasses.asdict(backbone.config)["normalize"]
