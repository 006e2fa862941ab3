"""Small random models whose tokens are words, so that prompts are short and training on them takes seconds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from conftest import CHAT_TEMPLATE, SPECIAL
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# What prompts hold beside the texts of the data.
_OF_PROMPTS = "A B C D E F G H . , Answer with one letter , A to B or user assistant system ?"


def word_tokenizer(texts: Iterable[str], chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token for each word and punctuation mark of ``texts``."""
    split = pre_tokenizers.Whitespace()
    words = dict.fromkeys(word for text in [*texts, _OF_PROMPTS] for word, _ in split.pre_tokenize_str(text))
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = split
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="right", **special)
    tokenizer.chat_template = chat_template
    return tokenizer


def save_word_llama(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random two-layer Llama (hidden 64) whose head is large enough for confident answers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=5,
        initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_word_encoder(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random one-layer BERT sentence encoder (P = 32, mean pooling)."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder
