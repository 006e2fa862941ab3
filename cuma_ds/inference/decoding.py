"""When answers end and how their tokens are chosen: decided here once for talking, evaluating, serving and exports."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import cast

from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from cuma_ds.data.rendering import Renderer
from cuma_ds.errors import CumaError
from cuma_ds.identity import base_fact

_PROBE = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Qx7"})
_LENGTHS = ("max_length", "max_new_tokens")
# Entries of generation_config.json that our own options replace, or that do not change which token is chosen.
_REPLACED = ("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_p", "top_k")
_HARMLESS = ("_", "output_", "return_", "use_cache", "cache_", "compile_", "disable_compile", "transformers_version")


def settle_generation(model: nn.Module, renderer: Renderer) -> list[int]:
    """Give a model the settings of :func:`settled_generation`, and return the tokens that end its answers.

    Args:
        model: a causal language model, or a wrapper of one (adapters of this package or of PEFT).
        renderer: of its tokenizer.
    """
    found = [module for module in model.modules() if "generation_config" in vars(module)]
    holders = cast("list[PreTrainedModel]", found)
    settled = settled_generation(holders[0].generation_config, holders[0].config, renderer)
    for holder in holders:
        holder.generation_config = settled
    return list(settled.eos_token_id or [])


def settled_generation(found: GenerationConfig, config: object, renderer: Renderer | None) -> GenerationConfig:
    """Greedy decoding by the model's own probabilities, with every token that ends an answer.

    A model folder's ``generation_config.json`` may hold sampling settings, such as a repetition penalty. They would
    change the answers of ``generate`` and not those of the server. So no answer of this package uses them, and a
    warning names what is not used.

    Args:
        found: what the model folder says about generation.
        config: the model's configuration.
        renderer: of the model's tokenizer; None where there is no tokenizer.
    """
    said = {key: value for key, value in found.to_diff_dict().items() if value not in (None, False)}
    others = [key for key in said if key not in (*_REPLACED, *_LENGTHS) and not key.startswith(_HARMLESS)]
    unused = [f"{key} {said[key]}"[:60] for key in others]
    if unused:
        message = f"the model folder's generation settings are not used: {', '.join(unused)}"
        warnings.warn(f"{message}; answers follow the model's own probabilities", stacklevel=3)
    tokenizer = None if renderer is None else renderer.tokenizer
    named = [found.eos_token_id, base_fact(config, "eos_token_id"), getattr(tokenizer, "eos_token_id", None)]
    ids = {token for one in named for token in (one if isinstance(one, list | tuple) else [one])}
    if renderer is not None:
        ids.add(_end_of_turn(renderer))
    ends = sorted(token for token in ids if isinstance(token, int) and token >= 0)
    pads = [getattr(tokenizer, "pad_token_id", None), found.pad_token_id, *ends]
    tokens = {
        "bos_token_id": found.bos_token_id,
        "eos_token_id": ends or None,
        "pad_token_id": next((token for token in pads if token is not None), None),
    }
    return GenerationConfig(do_sample=False, **tokens, **{key: said[key] for key in _LENGTHS if key in said})


def folder_generation(place: str | Path, model: nn.Module) -> GenerationConfig:
    """The ``generation_config.json`` of a model folder or hub id.

    Without one, the settings that ``model`` took from its configuration.
    """
    folder = Path(place).expanduser()
    try:
        return GenerationConfig.from_pretrained(str(folder if folder.is_dir() else place))
    except (OSError, ValueError):
        return cast("PreTrainedModel", model).generation_config


def _end_of_turn(renderer: Renderer) -> int | None:
    """The token that the chat template writes behind an answer; None where it writes no token of its own there."""
    try:
        ids, positions = renderer.encode_chat(_PROBE, "A person.")
    except CumaError:
        return None
    marker = None
    for position in reversed(positions):
        if ids[position + 1] not in renderer.tokenizer.added_tokens_decoder:
            break
        marker = ids[position + 1]
    return marker
