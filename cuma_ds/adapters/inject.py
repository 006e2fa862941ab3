"""Put adapters into a frozen Hugging Face model."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import nn

from cuma_ds.adapters.config import CumaConfig
from cuma_ds.adapters.context import RoutingContext
from cuma_ds.adapters.experts import Experts
from cuma_ds.adapters.layer import AdaptedLinear
from cuma_ds.adapters.model import CumaModel
from cuma_ds.adapters.router import Router
from cuma_ds.errors import ModelError, nearest

# Linears of one layer that read the same input, and so may share one router.
_SHARING = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
)


def inject_adapters(base: nn.Module, config: CumaConfig, seed: int = 0) -> CumaModel:
    """Freeze ``base`` and put a mixture of LoRA experts beside every linear that ``config.target_modules`` names.

    The base is changed in place (its linears are wrapped, not copied). Adapters are float32, on the device of the
    linear they adapt, and initialised from ``seed`` and the module's name alone, so that every rank and every topology
    starts equal.

    Args:
        base: a causal language model of transformers (any module with named linears works).
        config: sizes and variants.
        seed: seed of the initialisation.

    Returns:
        The model to train and to call; see :class:`CumaModel`.

    Raises:
        ModelError: a target matches nothing, or ``base`` already has adapters.
    """
    if any(isinstance(module, AdaptedLinear) for module in base.modules()):
        raise ModelError("this model already has adapters; load a fresh backbone before injecting again")
    base.requires_grad_(False)
    context = RoutingContext()
    index_of: dict[tuple[str, object], int] = {}
    for name in find_targets(base, config.target_modules):
        parent_name, _, leaf = name.rpartition(".")
        parent = base.get_submodule(parent_name)
        linear = base.get_submodule(name)
        in_features, out_features = _features(linear)
        device = next(linear.parameters()).device
        experts = Experts(config, in_features, out_features, device)
        experts.reset_parameters(_generator(seed, name, "experts"))
        key = (parent_name, _sharing_key(leaf) if config.share_router else leaf)
        router = None
        if config.has_router and key not in index_of:
            router = Router(config, in_features, device)
            router.reset_parameters(_generator(seed, name, "router"))
            index_of[key] = len(context.routers)
            context.routers.append(router)
        index = index_of.get(key)
        shared = None if index is None else context.routers[index].weight_h
        if shared is not None and shared.shape[1] != in_features:
            raise ModelError(
                f"{name} reads {in_features} features but its router {shared.shape[1]}; "
                "set adapters.share_router: false"
            )
        layer = AdaptedLinear(linear, config, context, experts, index)
        layer.router = router
        setattr(parent, leaf, layer)
    return CumaModel(base, config, context)


def find_targets(base: nn.Module, target_modules: Sequence[str]) -> list[str]:
    """Names of the linears that ``target_modules`` mean, in module order.

    Raises:
        ModelError: a target matches nothing.
    """
    linears = [name for name, module in base.named_modules() if _is_linear(module)]
    chosen: set[str] = set()
    for target in target_modules:
        matches = [name for name in linears if name == target or name.endswith("." + target)]
        if target == "all-linear":
            head = getattr(base, "get_output_embeddings", lambda: None)()
            matches = [name for name in linears if base.get_submodule(name) is not head]
        if not matches:
            leaves = sorted({name.rpartition(".")[2] for name in linears})
            raise ModelError(
                f"adapters.target_modules: {target!r} matches no linear layer of the model{nearest(target, leaves)}; "
                f"it has {', '.join(leaves)} (or all-linear)"
            )
        chosen.update(matches)
    return [name for name in linears if name in chosen]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _features(linear: nn.Module) -> tuple[int, int]:
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    assert isinstance(linear.weight, torch.Tensor)  # GPT-2's Conv1D holds [D_in, D_out]
    return linear.weight.shape[0], linear.weight.shape[1]


def _sharing_key(leaf: str) -> object:
    return next((group for group in _SHARING if leaf in group), leaf)


def _generator(seed: int, name: str, part: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}/{part}".encode()))
