"""What a round sends, counted from shapes: as much as tensors that are there, packed; and as peft counts for itself."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaForCausalLM

from caravan.app.payload import (
    ADAPTERS,
    CODECS,
    LLAMAS,
    RIVALS,
    Payload,
    Skeleton,
    head_shapes,
    part_shapes,
    payloads,
    skeletons,
)
from caravan.config import AdapterConfig, BackboneConfig, HeadConfig
from caravan.errors import BackboneError
from caravan.federation.codec import Codec
from caravan.model.backbone import load_backbone
from caravan.model.source import model_folder
from tiny_models import FAMILIES, make_tiny_bert
from toy_training import toy_retriever

MINILM = BackboneConfig()
ADAPTER, HEAD = AdapterConfig(), HeadConfig()


def numbers_bytes(packed: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in packed.values())


@pytest.fixture(scope="module")
def models() -> dict[str, Skeleton]:
    return {skeleton.name: skeleton for skeleton in skeletons(MINILM)}


@pytest.fixture(scope="module")
def table(models) -> dict[tuple[str, str], Payload]:
    return {(row.method, row.codec): row for row in payloads(models["minilm"], ADAPTER, HEAD, documents=77)}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_row_of_ours_is_what_its_tensors_are_packed_to(backbone, kind, codec, bias):
    settings = AdapterConfig(kind=kind, rank=4, bias=bias)
    retriever = toy_retriever(backbone, adapter=kind, hidden=6)
    count = len(retriever.catalogue)
    rows = payloads(Skeleton.of("toy", backbone.model), settings, replace(retriever.head_config), count)
    row = next(row for row in rows if (row.method, row.codec) == (kind, codec))
    tensors = {name: torch.randn(tensor.shape) for name, tensor in retriever.trainable_state().items()}
    if bias:
        tensors["adapter.bias"] = torch.randn(backbone.embedding_width)
    packed = Codec(codec).encode(tensors, {}, seed=0)[0]
    sizes = {
        part: numbers_bytes({name: tensor for name, tensor in packed.items() if name.startswith(part)})
        for part in ("adapter.", "head.")
    }
    assert (row.part, row.head) == (sizes["adapter."], sizes["head."])
    assert row.to_dict()["together"] == numbers_bytes(packed)
    assert row.down == 4 * sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("method", RIVALS)
@pytest.mark.parametrize("codec", CODECS)
def test_a_row_of_a_rival_is_what_its_tensors_are_packed_to(backbone, method, codec):
    skeleton = Skeleton.of("toy", backbone.model)
    row = next(row for row in payloads(skeleton, ADAPTER, HEAD, 5) if (row.method, row.codec) == (method, codec))
    tensors = {name: torch.randn(shape) for name, shape in part_shapes(method, skeleton, ADAPTER).items()}
    assert row.part == numbers_bytes(Codec(codec).encode(tensors, {}, seed=0)[0])


def test_the_table_of_minilm_is_as_worked_out_by_hand(table):
    head = 77 * 384 + 77 + 1 + 384 * 768 + 768 + 768 * 384
    assert {row.head for row in table.values() if row.codec == "float32"} == {4 * head}
    assert {row.head for row in table.values() if row.codec == "float16"} == {2 * head}
    # int8: besides the numbers a float32 for each row of a matrix and each vector or number.
    assert {row.head for row in table.values() if row.codec == "int8"} == {head + 4 * (77 + 1 + 1 + 384 + 1 + 768)}
    assert table["full", "float32"].part == 4 * 384**2
    assert table["lowrank", "float16"].part == 2 * 2 * 384 * 32
    assert table["core", "int8"].part == 32 * 32 + 4 * 32
    assert table["lora-qv", "float32"].part == 4 * 6 * 2 * (8 * 384 + 384 * 8)
    assert table["lora-all", "float32"].numbers == 8 * 6 * (4 * (384 + 384) + 2 * (384 + 1536))
    assert table["full", "float32"].to_full == 1
    assert table["lora-qv", "int8"].to_lora == 1
    assert table["core", "float32"].to_lora == pytest.approx(1 / 72)
    both = 4 * (384**2 + head)
    assert table["core", "int8"].to_full == pytest.approx(
        (table["core", "int8"].part + table["core", "int8"].head) / both
    )
    assert [*dict.fromkeys(method for method, _ in table)] == [*ADAPTERS, *RIVALS]


def test_full_fine_tuning_of_minilm_sends_all_but_the_pooler(models):
    settings = AutoConfig.from_pretrained(model_folder(MINILM))
    with torch.device("meta"):
        bare = AutoModel.from_config(settings, add_pooling_layer=False)
    assert models["minilm"].numbers == bare.num_parameters() == 22_713_216 - (384 * 384 + 384)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("method", ["lora-qv", "lora-all"])
def test_lora_on_minilm_trains_as_many_numbers_as_peft_says(method, models):
    peft = pytest.importorskip("peft")
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(model_folder(MINILM)), add_pooling_layer=False)
    targets = {"lora-qv": ["query", "value"], "lora-all": "all-linear"}[method]
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=targets))
    ours = part_shapes(method, models["minilm"], ADAPTER)
    trained, _ = theirs.get_nb_trainable_parameters()
    assert sum(map(math.prod, ours.values())) == trained
    shapes = sorted(tuple(weight.shape) for weight in theirs.parameters() if weight.requires_grad)
    assert sorted(ours.values()) == shapes


@pytest.mark.parametrize("name", LLAMAS)
def test_a_llama_has_the_shapes_of_the_published_one(name, models):
    published = {"TinyLlama-1.1B": 1_100_048_384, "Llama-3.2-3B": 3_212_749_824}  # of the whole language model
    with torch.device("meta"):
        whole = LlamaForCausalLM(LlamaConfig(**LLAMAS[name]))
    assert whole.num_parameters() == published[name]
    sizes = LLAMAS[name]
    writing = 0 if sizes.get("tie_word_embeddings") else sizes["hidden_size"] * sizes["vocab_size"]
    skeleton = models[name]
    assert skeleton.numbers == published[name] - writing
    assert skeleton.embedding_width == skeleton.hidden_width == sizes["hidden_size"]
    heads, grouped = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    width, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    lora = part_shapes("lora-qv", skeleton, ADAPTER)
    assert sum(map(math.prod, lora.values())) == layers * 8 * (2 * width + width + width * grouped // heads)
    assert len(skeleton.lora_layers("lora-all")) == 7 * layers


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shapes_of_a_backbone_are_known_without_its_weights(family, tmp_path):
    config = BackboneConfig(name=str(FAMILIES[family](tmp_path)), max_tokens=24)
    if family == "albert":
        (tmp_path / "model.safetensors").unlink()  # not looked at
        assert skeletons(config)[0].embedding_width == 16
        return
    skeleton, loaded = skeletons(config)[0], load_backbone(config)
    assert replace(Skeleton.of("x", loaded.model), name=config.name) == skeleton
    assert (skeleton.embedding_width, skeleton.hidden_width) == (loaded.embedding_width, loaded.hidden_width)
    assert skeleton.lora_layers("lora-qv")


def test_a_head_of_millions_of_documents_is_counted_without_being_made(models):
    shapes = head_shapes(models["Llama-3.2-3B"], HEAD, documents=50_000_000)
    assert shapes["head.rows"] == (50_000_000, 3072)


def test_where_no_layer_is_named_query_or_value_there_is_no_lora_to_compare_with(backbone):
    skeleton = replace(Skeleton.of("toy", backbone.model), linears={"layer.mixer": (4, 4)})
    rows = payloads(skeleton, ADAPTER, HEAD, 5)
    assert {row.to_lora for row in rows} == {None}
    assert {row.method for row in rows} == {*ADAPTERS, "lora-all", "fine-tuning"}


def test_a_backbone_that_is_not_there_or_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(BackboneError, match="nowhere"):
        skeletons(replace(MINILM, name="nowhere"))
    (make_tiny_bert(tmp_path) / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(BackboneError, match=str(tmp_path)):
        skeletons(replace(MINILM, name=str(tmp_path)))
