"""A mixture with fixed gates is one plain LoRA: the A_i stacked, the g_i B_i side by side.

Shapes: R routers, E experts, K kept experts, D input features, O output features, P profile width, T tokens, N
    profiles.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from cuma_ds.adapters.config import CumaConfig
from cuma_ds.adapters.inject import inject_adapters
from cuma_ds.adapters.model import CumaModel
from cuma_ds.adapters.router import Router
from cuma_ds.ops import demographic_gate, dense_gate


def fixed_gate(router: Router) -> bool:
    """Whether the gate is the same for every token of a profile: some factor between token and logits is zero."""
    weights = [router.weight_h, *(layer.weight for layer in router._linears())]
    return router.config.num_experts == 1 or any(weight is None or not bool(weight.any()) for weight in weights)


@torch.no_grad()
def constant_gates(model: CumaModel, embedding_P: Tensor | None) -> Tensor:
    """The gates [R, E] of one profile where no router looks at the token; [0, 1] without routers."""
    profiles_NP = (
        None
        if embedding_P is None
        else ((embedding_P.to(model.profile_mean) - model.profile_mean) * model.profile_scale)[None]
    )
    gates = []
    for router in model.context.routers:
        width = 1 if router.weight_h is None else router.weight_h.shape[1]
        nothing_TD = torch.zeros(1, width, device=model.profile_scale.device)
        profile_T = torch.zeros(1, dtype=torch.long, device=nothing_TD.device)
        hidden_TE, profile_NE = router.logits(nothing_TD, profiles_NP, profile_T)
        gate = demographic_gate(hidden_TE, profile_NE, profile_T, model.config.top_k, model.config.gate_norm)
        gates.append(dense_gate(gate.weight_TK, gate.expert_TK, model.config.num_experts)[0].cpu())
    return torch.stack(gates) if gates else torch.zeros(0, 1)


def fold(model: CumaModel, gate_RE: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Plain LoRA factors (A [rank, D], B [O, rank]) of every adapted linear with the gate fixed; B carries the gate.

    Experts whose gate is zero in every router of the model are left out; a shared A stays one block of rank r.
    """
    count = int((gate_RE != 0).sum(dim=1).max()) if len(gate_RE) else 1
    # All linears get one rank: serving engines want it, and zero blocks fill up where fewer experts answer.
    order_RK = gate_RE.abs().argsort(dim=1, descending=True, stable=True)[:, :count]
    factors = {}
    for name, layer in model.adapted_layers():
        index = layer.router_index
        gate_E = torch.ones(1) if index is None else gate_RE[index].float()
        kept_K = torch.zeros(1, dtype=torch.long) if index is None else order_RK[index]
        a = layer.experts.lora_a.detach().float().cpu()
        b = layer.experts.lora_b.detach().float().cpu() * gate_E[:, None, None]
        if model.config.shared_a:
            factors[name] = (a, b.sum(dim=0))
        else:
            factors[name] = (a[kept_K].flatten(0, 1), b[kept_K].transpose(0, 1).flatten(1))
    return factors


def plain_lora(model: CumaModel, states: Sequence[Mapping[str, tuple[Tensor, Tensor]]]) -> CumaModel:
    """The same backbone with plain LoRA instead of the mixture. ``model`` cannot be used afterwards."""
    for name, layer in list(model.adapted_layers()):
        parent, _, leaf = name.rpartition(".")
        setattr(model.base_model.get_submodule(parent), leaf, layer.base)
    rank = max(a.shape[0] for state in states for a, _ in state.values())
    config = CumaConfig(
        method="lora",
        lora_r=rank,
        lora_alpha=model.config.scaling * rank,
        target_modules=tuple(states[0]),
        num_experts=1,
        top_k=1,
    )
    return inject_adapters(model.base_model, config).eval()


@torch.no_grad()
def set_lora(plain: CumaModel, state: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Give a model made by :func:`plain_lora` one profile's factors."""
    for name, layer in plain.adapted_layers():
        a, b = state[name]
        layer.experts.lora_a.zero_()[0, : a.shape[0]] = a
        layer.experts.lora_b.zero_()[0, :, : b.shape[1]] = b


@contextlib.contextmanager
def as_plain_lora(model: CumaModel, state: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[CumaModel]:
    """Inside, the backbone of ``model`` has one profile's plain LoRA, which is yielded. Afterwards the mixture is back.

    Args:
        model: the mixture. It must not be called inside.
        state: the factors, see :func:`fold`.
    """
    layers = list(model.adapted_layers())
    try:
        plain = plain_lora(model, [state])
        set_lora(plain, state)
        yield plain
    finally:
        for name, layer in layers:
            parent, _, leaf = name.rpartition(".")
            setattr(model.base_model.get_submodule(parent), leaf, layer)
