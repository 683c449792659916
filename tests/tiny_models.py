"""Tiny random transformers models with tokenizers of characters or bytes, saved as real ones are."""

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
)

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MARKERS = ["<s>", "<pad>", "</s>", "<unk>"]

# Large initial weights and many positions: a mistake in padding or positions must show, and a text is one token a
# letter here.
WIDTHS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
DECODER: dict[str, Any] = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}


def make_tiny_bert(folder: Path, **config: Any) -> Path:
    """An encoder with [CLS] and [SEP]; mean pooling by default."""
    return _save(folder, BertModel, BertConfig, WIDTHS, config, _character_tokenizer())


def make_tiny_llama(folder: Path, **config: Any) -> Path:
    """A decoder whose tokenizer writes <s> first and no </s>; its weights carry an lm_head that nobody needs."""
    settings = WIDTHS | DECODER | GROUPED
    return _save(folder, LlamaForCausalLM, LlamaConfig, settings, config, _byte_tokenizer("<s> $A"))


def make_tiny_albert(folder: Path, **config: Any) -> Path:
    """An encoder whose token embeddings (16) are narrower than its hidden states (32)."""
    settings = WIDTHS | {"embedding_size": 16}
    return _save(folder, AlbertModel, AlbertConfig, settings, config, _character_tokenizer())


def make_tiny_roberta(folder: Path, **config: Any) -> Path:
    """An encoder whose positions start behind its padding id."""
    settings = WIDTHS | DECODER
    return _save(folder, RobertaModel, RobertaConfig, settings, config, _byte_tokenizer("<s> $A </s>"))


def make_tiny_gpt2(folder: Path, **config: Any) -> Path:
    """A decoder with learned absolute positions, whose tokenizer adds nothing."""
    settings = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2, **DECODER}
    return _save(folder, GPT2LMHeadModel, GPT2Config, settings, config, _byte_tokenizer("$A"))


def make_tiny_gpt_neox(folder: Path, **config: Any) -> Path:
    """A decoder with rotary positions on part of each head."""
    settings = WIDTHS | DECODER
    return _save(folder, GPTNeoXForCausalLM, GPTNeoXConfig, settings, config, _byte_tokenizer("$A"))


def make_tiny_qwen2(folder: Path, **config: Any) -> Path:
    """A decoder of the Qwen2 family."""
    settings = WIDTHS | DECODER | GROUPED
    return _save(folder, Qwen2ForCausalLM, Qwen2Config, settings, config, _byte_tokenizer("$A"))


def make_tiny_qwen3(folder: Path, **config: Any) -> Path:
    """A decoder of the Qwen3 family, whose tokenizer already writes the end-of-sequence token."""
    settings = WIDTHS | DECODER | GROUPED
    return _save(folder, Qwen3ForCausalLM, Qwen3Config, settings, config, _byte_tokenizer("$A </s>"))


def make_tiny_gemma(folder: Path, **config: Any) -> Path:
    """A decoder that multiplies its token embeddings by the square root of their width."""
    settings = WIDTHS | DECODER | GROUPED
    return _save(folder, GemmaForCausalLM, GemmaConfig, settings, config, _byte_tokenizer("<s> $A"))


def make_tiny_distilbert(folder: Path, **config: Any) -> Path:
    """An encoder with learned positions and settings of other names."""
    settings = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128}
    settings |= {"initializer_range": 0.2}
    return _save(folder, DistilBertModel, DistilBertConfig, settings, config, _character_tokenizer())


def make_tiny_opt(folder: Path, **config: Any) -> Path:
    """A decoder that numbers its learned positions from 2 and applies dropout in the layer itself."""
    settings = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2, "init_std": 0.2}
    settings |= {"num_attention_heads": 4, "max_position_embeddings": 128, **DECODER}
    return _save(folder, OPTForCausalLM, OPTConfig, settings, config, _byte_tokenizer("<s> $A"))


def make_tiny_t5(folder: Path, **config: Any) -> Path:
    """An encoder-decoder, which is of no use here."""
    settings = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 1}
    return _save(folder, T5Model, T5Config, settings, config, _byte_tokenizer("$A </s>"))


ENCODERS: dict[str, Callable[..., Path]] = {
    "bert": make_tiny_bert,
    "albert": make_tiny_albert,
    "roberta": make_tiny_roberta,
    "distilbert": make_tiny_distilbert,
}
DECODERS: dict[str, Callable[..., Path]] = {
    "llama": make_tiny_llama,
    "gpt2": make_tiny_gpt2,
    "gpt_neox": make_tiny_gpt_neox,
    "qwen2": make_tiny_qwen2,
    "qwen3": make_tiny_qwen3,
    "gemma": make_tiny_gemma,
    "opt": make_tiny_opt,
}
FAMILIES = ENCODERS | DECODERS


def _save(
    folder: Path,
    model_class: Any,
    config_class: Any,
    settings: dict[str, Any],
    changes: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
) -> Path:
    chosen = {"vocab_size": len(tokenizer), **settings, **changes}
    seed = chosen.pop("seed", 0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = model_class(config_class(**chosen))
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases of 0 and norms of 1 would hide a bias or a norm left out
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _character_tokenizer() -> PreTrainedTokenizerFast:
    letters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = SPECIALS + list(letters) + [f"##{letter}" for letter in string.ascii_lowercase + string.digits]
    tokenizer = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIALS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _byte_tokenizer(template: str) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = {piece: number for number, piece in enumerate(MARKERS + alphabet)}
    tokenizer = Tokenizer(models.BPE(pieces, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 2)])
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), MARKERS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
