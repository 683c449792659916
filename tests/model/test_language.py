"""The language model around an encoder's blocks is the published one, with one copy of the weights."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from caravan.config import BackboneConfig
from caravan.errors import BackboneError
from caravan.model.backbone import load_backbone
from caravan.model.language import language_model
from tiny_models import DECODERS, make_tiny_bert, make_tiny_llama

IDS = torch.tensor([[5, 17, 80, 99]])


@pytest.mark.parametrize("family", DECODERS)
def test_logits_are_those_of_the_published_model_and_the_blocks_are_shared(family, tmp_path):
    folder = DECODERS[family](tmp_path)
    backbone = load_backbone(BackboneConfig(name=str(folder)))
    model = language_model(backbone)
    published = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, published(input_ids=IDS).logits)
    shared = {id(parameter) for parameter in backbone.model.parameters()}
    own = [name for name, parameter in model.named_parameters() if id(parameter) not in shared]
    tied = published.get_output_embeddings().weight is published.get_input_embeddings().weight
    assert len(own) == (0 if tied else 1)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_encoders_random_weights_and_files_without_an_output_layer_are_refused(tmp_path):
    with pytest.raises(BackboneError, match="is an encoder and cannot write"):
        language_model(load_backbone(BackboneConfig(name=str(make_tiny_bert(tmp_path / "bert")))))
    llama = str(make_tiny_llama(tmp_path / "llama"))
    with pytest.raises(BackboneError, match="has random weights"):
        language_model(load_backbone(BackboneConfig(name=llama, random_weights=True)))
    backbone = load_backbone(BackboneConfig(name=llama))
    backbone.model.save_pretrained(llama)  # the blocks alone
    with pytest.raises(BackboneError, match=r"no lm_head\.weight"):
        language_model(backbone)
