"""Tiny random models of several families, and model folders whose own files disagree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from conftest import character_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_ENDS = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 5}
_USUAL = {
    **_ENDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512,
}  # fmt: skip
_BART = {
    **_ENDS, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64,
    "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "max_position_embeddings": 512,
}  # fmt: skip


class Family(NamedTuple):
    """A kind of model: what it knows positions by, its sizes, and one of its linears."""

    positions: str
    sizes: dict[str, object]
    linear: str


FAMILIES = {
    "gpt2": Family("absolute", {**_ENDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}, "c_attn"),
    "opt": Family("absolute", {**_USUAL, "ffn_dim": 64, "word_embed_proj_dim": 32}, "v_proj"),
    "llama": Family("rotary", {**_USUAL, "num_key_value_heads": 2}, "v_proj"),
    "gpt_neox": Family("rotary", _USUAL, "query_key_value"),
    "bloom": Family("ALiBi", {**_ENDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "query_key_value"),
    "mpt": Family("ALiBi", {**_ENDS, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 512}, "Wqkv"),
    "roberta": Family("absolute, from 2 on", {**_USUAL, "is_decoder": True}, "value"),
    "bart": Family("absolute", _BART, "self_attn.v_proj"),
    "mamba": Family(
        "a recurrent state", {**_ENDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, "in_proj"
    ),
}
# Families that take position_ids or read positions off the mask, so that rows of a batch may be padded at their start.
PADDED_AT_START = ("gpt2", "opt", "llama", "gpt_neox", "bloom", "mpt")


def random_model(family: str, **options: object) -> PreTrainedModel:
    """A random float32 model whose answers depend strongly on every token, its position included.

    Args:
        family: one of :data:`FAMILIES`.
        options: of ``AutoModelForCausalLM.from_config``.
    """
    config = AutoConfig.for_model(family, **FAMILIES[family].sizes)
    model = AutoModelForCausalLM.from_config(config, **options).float().eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2, generator=generator)
    return model


def save_family(folder: Path, family: str) -> Path:
    """:func:`random_model` as a folder with the character tokenizer."""
    random_model(family).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def save_disagreeing(folder: Path, source: Path) -> Path:
    """A copy of the tiny Llama whose files disagree about answers.

    The chat template ends a turn with token 5. The tokenizer names token 3 as its end, config.json token 2 and
    generation_config.json tokens 2 and 4. The latter also holds sampling settings. The model likes these tokens often
    enough that answers end.
    """
    shutil.copytree(source, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[[2, 3, 4, 5]] = 0.3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(90))
    model.save_pretrained(folder)
    tokenizer = character_tokenizer()
    tokenizer.eos_token = "<unk>"
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 2}))
    said = {
        "eos_token_id": [2, 4], "bos_token_id": 1, "pad_token_id": 0, "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 2, "top_k": 3, "do_sample": True, "temperature": 0.6, "min_new_tokens": 5,
        "suppress_tokens": [20, 21], "bad_words_ids": [[30]],
    }  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(said))
    return folder
