"""Tiny random models of several families, and model folders whose own files disagree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from conftest import character_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

_USUAL = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 5,
}  # fmt: skip
_OPENAI = {
    "vocab_size": 128,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 5,
}
_ALIBI = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 5}
# What each family knows positions by, its sizes, and one of its linears.
POSITIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": ("absolute", _OPENAI, "c_attn"),
    "opt": ("absolute", {**_USUAL, "ffn_dim": 48, "word_embed_proj_dim": 32}, "q_proj"),
    "llama": ("rotary", {**_USUAL, "num_key_value_heads": 2}, "q_proj"),
    "gpt_neox": ("rotary", _USUAL, "query_key_value"),
    "bloom": ("ALiBi", {**_ALIBI, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "query_key_value"),
    "mpt": ("ALiBi", {**_ALIBI, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}, "Wqkv"),
}


def random_model(family: str, seed: int = 0) -> Any:
    """A model of one of :data:`POSITIONS` whose positions matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **POSITIONS[family][1]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "ln_" not in name:
                parameter.normal_(0, 0.5 if "wpe" in name or "embed_positions" in name else 0.2)
    return model.eval()


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
        "eos_token_id": [2, 4], "bos_token_id": 1, "pad_token_id": 0, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "top_k": 3,
        "do_sample": True, "temperature": 0.6, "min_new_tokens": 5, "suppress_tokens": [20, 21], "bad_words_ids": [[30]],
    }  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(said))
    return folder
