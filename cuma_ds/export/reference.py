"""Checkpoints of the authors' research code read in as ours: the same logits, nothing retrained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cuma_ds.adapters import CumaConfig, CumaModel, inject_adapters
from cuma_ds.adapters.layer import AdaptedLinear
from cuma_ds.config import ModelSection
from cuma_ds.errors import CheckpointError, ModelError
from cuma_ds.export.hf import Trained
from cuma_ds.files import first_line, full_path
from cuma_ds.inference.modeling import ProfileFacts
from cuma_ds.parallel.backbone import skeleton
from cuma_ds.profiles import ProfileEncoder
from cuma_ds.profiles.linearize import AUTHORS_FIELDS

# Their sharing flags, and the linears that share a router where the flag is set.
_SHARING = {"share_router_for_qkv": ("q_proj", "k_proj", "v_proj"), "share_router_for_w_i": ("gate_proj", "up_proj")}
_NEEDED = ("lora_r", "lora_alpha", "num_experts", "top_k", "target_modules")
_STORY = """\
## Origin

Imported from a checkpoint of the authors' research code (base model there: {base}). Profile embeddings are used raw,
neither centred nor scaled. Fields of a profile become the sentence their code writes for survey data ("You are a person
from Norway, age group: ..."). For a checkpoint trained on Community Alignment or PRISM give the sentence itself
("Age: 34, Gender: ..."); it is embedded as it is. As in their code a sentence is cut after 128 tokens, and its vector
is the mean over all of them, not normalised. Their batches also averaged over padding, which depended on the other
sentences of a batch; that is left out. How it was trained and evaluated is not recorded in the checkpoint.
"""


def read_reference(folder: str | Path, base: str, encoder: str | None = None) -> Trained:
    """Read ``adapter_config.json`` and ``adapter_model.safetensors`` in the authors' format.

    Args:
        folder: the checkpoint; it needs neither a tokenizer nor an encoder.
        base: folder or hub id of the model its adapters were trained on.
        encoder: folder or hub id of the sentence encoder; without one, only embeddings are accepted.

    Raises:
        CheckpointError: the folder is missing, damaged or in another format.
        ModelError: the adapters do not fit ``base``; names the tensor.
    """
    folder = Path(folder)
    theirs = _read_config(folder)
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: adapter_model.safetensors is missing or damaged: {first_line(error)}"
        ) from None
    section = ModelSection(path=base, dtype=_dtype(folder, theirs))
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    routers = _read_routers(folder, tensors)
    config = _config(folder, theirs, routers)
    model = inject_adapters(skeleton(section), config)
    state = {name: torch.zeros(buffer.shape) for name, buffer in model.standardisation().items()}
    if "profile_scale" in state:
        state["profile_scale"] = torch.ones(())
    state |= _experts(folder, model, tensors) | _routers(folder, model, routers, theirs)
    adapted = {name for name, _ in model.adapted_layers()}
    unused = sorted(
        name
        for name in tensors
        if "._router_manager." not in name and re.sub(r"\.lora_[ab](\.\d+)?$", "", name) not in adapted
    )
    if unused:
        raise ModelError(
            f"{folder}: {unused[0]} belongs to no adapted linear of {base}; the two do not belong together"
        )
    model.load_adapter_state(state)  # on no memory; checks every name and shape
    profiles: ProfileFacts = {"encoder": None, "template": "authors", "fields": [*AUTHORS_FIELDS, "age"]}
    profiles |= {"pooling": "mean-all", "normalise": False, "max_tokens": 128}  # as the authors' code does it
    if encoder is not None:
        if theirs.get("num_encoder_proj_mlp_layers"):
            missing = "a projection after the encoder, which the checkpoint does not hold"
            raise ModelError(f"{folder} was trained with {missing}; leave --encoder out and give profile_embeddings")
        made_by = ProfileEncoder(encoder, pooling="mean-all", normalise=False, max_tokens=128)
        if made_by.dim != config.profile_dim:
            raise ModelError(
                f"--encoder {encoder} has width {made_by.dim}; the checkpoint's adapters take {config.profile_dim}"
            )
        profiles |= {"encoder": full_path(encoder), "fingerprint": made_by.fingerprint}
    name = str(theirs.get("base_model") or "not named")
    return Trained(
        config, state, section, profiles, story=_STORY.format(base=Path(name).name if name.startswith("/") else name)
    )


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        theirs = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind = theirs["peft_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{folder} is no checkpoint of the authors' code: adapter_config.json is missing or damaged"
        ) from None
    if kind != "CuMA":
        raise CheckpointError(f"{folder} holds adapters of type {kind!r}; the authors' checkpoints have type 'CuMA'")
    for key in _NEEDED:
        if key not in theirs:
            raise CheckpointError(f"{folder}: adapter_config.json lacks {key}")
    return theirs


def _dtype(folder: Path, theirs: dict[str, Any]) -> Any:
    dtype = str(theirs.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise CheckpointError(f"{folder}: torch_dtype is {dtype!r}; allowed: float32, bfloat16, float16")
    return dtype


def _read_routers(folder: Path, tensors: dict[str, Tensor]) -> list[list[dict[str, Tensor]]]:
    """The linears of each router, in order, as {"weight": ..., "bias": ...}."""
    found: dict[int, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        if match := re.search(r"\._router_manager\.routers\.(\d+)\.mlp\.(\d+)\.(weight|bias)$", name):
            found.setdefault(int(match[1]), {}).setdefault(int(match[2]), {})[match[3]] = tensor.float()
    if not found or sorted(found) != list(range(len(found))):
        raise CheckpointError(
            f"{folder}: adapter_model.safetensors holds no complete set of routers (found: {sorted(found) or 'none'})"
        )
    return [[found[router][place] for place in sorted(found[router])] for router in sorted(found)]


def _config(folder: Path, theirs: dict[str, Any], routers: list[list[dict[str, Tensor]]]) -> CumaConfig:
    linears = routers[0]
    targets = theirs["target_modules"]
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    leaves = {str(target).rpartition(".")[2] for target in targets}
    try:
        return CumaConfig(
            num_experts=theirs["num_experts"],
            top_k=theirs["top_k"],
            lora_r=theirs["lora_r"],
            lora_alpha=theirs["lora_alpha"],
            target_modules=targets,
            shared_a=bool(theirs.get("use_hydra_lora")),
            router="mlp" if len(linears) > 1 else "linear",
            router_layers=max(2, len(linears)),
            router_hidden=linears[0]["weight"].shape[0],
            router_bias="bias" in linears[0],
            gate_norm="softmax_topk_softmax" if theirs.get("top_k_routing_strategy") else "softmax_topk",
            # One flag of ours means both of theirs. Where they differ, every linear gets its own copy of the router.
            share_router=all(theirs.get(flag) for flag, group in _SHARING.items() if len(leaves & set(group)) > 1),
            balance_weight=theirs.get("lambda_auxiliary") or 0.0,
            profile_dim=theirs.get("demographic_embed_dim") or 0,
        )
    except ValidationError as error:
        problem = error.errors()[0]
        raise CheckpointError(
            f"{folder}: adapter_config.json: {'.'.join(map(str, problem['loc']))}: {problem['msg']}"
        ) from None


def _experts(folder: Path, model: CumaModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    config, state = model.config, {}

    def get(name: str) -> Tensor:
        if name not in tensors:
            raise ModelError(f"{folder} lacks {name}; the checkpoint and the base model do not belong together")
        return tensors[name].float()

    for name, _ in model.adapted_layers():
        for part in ("lora_a", "lora_b"):
            shared = part == "lora_a" and config.shared_a
            own = [f"{name}.{part}.{expert}" for expert in range(config.num_experts)]
            state[f"{name}.experts.{part}"] = (
                get(f"{name}.{part}") if shared else torch.stack([get(one) for one in own])
            )
    return state


def _routers(
    folder: Path, model: CumaModel, routers: list[list[dict[str, Tensor]]], theirs: dict[str, Any]
) -> dict[str, Tensor]:
    numbers = _router_numbers([name for name, _ in model.adapted_layers()], theirs)
    if max(numbers.values()) + 1 != len(routers):
        made = f"its sharing flags and this base model make {max(numbers.values()) + 1}"
        what = "the checkpoint and the base model do not belong together"
        raise ModelError(f"{folder} holds {len(routers)} routers, but {made}; {what}")
    state: dict[str, Tensor] = {}
    for name, layer in model.adapted_layers():
        if layer.router is None:
            continue
        assert isinstance(layer, AdaptedLinear)
        assert layer.router.weight_h is not None  # theirs read token and profile
        first, *later = routers[numbers[name]]
        width = layer.router.weight_h.shape[1]
        if first["weight"].shape[1] != width + model.config.profile_dim:
            raise ModelError(
                f"{folder}: the router of {name} reads {first['weight'].shape[1]} features; with this base model and "
                f"demographic_embed_dim {model.config.profile_dim} it would be {width + model.config.profile_dim}"
            )
        state[f"{name}.router.weight_h"] = first["weight"][:, :width].clone()
        if model.config.profile_dim:
            state[f"{name}.router.weight_p"] = first["weight"][:, width:].clone()
        if "bias" in first:
            state[f"{name}.router.bias"] = first["bias"].clone()
        for index, linear in enumerate(later):
            state |= {f"{name}.router.layers.{index}.{part}": tensor.clone() for part, tensor in linear.items()}
    return state


def _router_numbers(names: list[str], theirs: dict[str, Any]) -> dict[str, int]:
    """The number of each linear's router: distinct routers count in module order."""
    groups = [group for flag, group in _SHARING.items() if theirs.get(flag)]
    order: dict[tuple[str, object], int] = {}
    numbers = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        key = (parent, next((group for group in groups if leaf in group), leaf))
        numbers[name] = order.setdefault(key, len(order))
    return numbers
