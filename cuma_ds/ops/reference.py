"""The operators in plain PyTorch: what the compiled ones must equal, and what runs where those are missing.

Shapes: T tokens, E experts, K active experts, N profiles, r rank (R in names), M = T * K assignments, W features; J narrow and I wide ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

GATE_NORMS = ("topk_softmax", "softmax", "softmax_topk", "softmax_topk_softmax")
GroupedWay = Literal["compiled", "turns", "no"]


class GateOutput(NamedTuple):
    """What :func:`demographic_gate` returns.

    weight_TK: [T, K] mixture weights, zero for padding.  expert_TK: [T, K] int32, largest weight first, -1 for padding.
    load_E: [E] assignments per expert.  weight_sum_E: [E] summed weights, differentiable.  entropy: [] summed entropy of the gate, nats.
    invalid: [] real tokens left unrouted because a logit is NaN or inf.
    """

    weight_TK: Tensor
    expert_TK: Tensor
    load_E: Tensor
    weight_sum_E: Tensor
    entropy: Tensor
    invalid: Tensor


class Pairs(NamedTuple):
    """The pairs of a token and one of its experts, sorted by expert: what :func:`sort_by_expert` returns.

    order_M: [M] int32, the pair (t * K + k) at each sorted place, -1 past the last one.  position_TK: [T, K] int32, the place of each pair,
    -1 if it has none.  end_E: [E] int32, where each expert's places end (the offsets grouped products take).
    """

    order_M: Tensor
    position_TK: Tensor
    end_E: Tensor


def demographic_gate(
    hidden_logits_TE: Tensor, profile_logits_NE: Tensor | None, profile_index_T: Tensor, top_k: int, norm: str
) -> GateOutput:
    """See :func:`cuma_ds.ops.demographic_gate`."""
    logits_TE = (
        hidden_logits_TE.float() if hidden_logits_TE.dtype in (torch.bfloat16, torch.float16) else hidden_logits_TE
    )
    real_T = profile_index_T >= 0
    if profile_logits_NE is not None:
        logits_TE = logits_TE + profile_logits_NE.to(logits_TE.dtype)[profile_index_T.clamp(min=0)]
    finite_T = logits_TE.detach().isfinite().all(dim=-1)
    routed_T = real_T & finite_T
    logits_TE = logits_TE.masked_fill(~routed_T[:, None], 0.0)
    tokens, experts = logits_TE.shape
    if norm == "softmax":
        expert_TK = torch.arange(experts, device=logits_TE.device).expand(tokens, experts)
        weight_TK = logits_TE.softmax(dim=-1)
    else:
        expert_TK = logits_TE.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
        values_TE = logits_TE if norm == "topk_softmax" else logits_TE.softmax(dim=-1)
        weight_TK = values_TE.gather(-1, expert_TK)
        if norm != "softmax_topk":
            weight_TK = weight_TK.softmax(dim=-1)
    weight_TK = weight_TK.masked_fill(~routed_T[:, None], 0.0)
    detached_TK = weight_TK.detach()
    flat = expert_TK.reshape(-1)
    zeros_E = detached_TK.new_zeros(experts)
    return GateOutput(
        weight_TK=weight_TK,
        expert_TK=expert_TK.masked_fill(~routed_T[:, None], -1).to(torch.int32),
        load_E=zeros_E.scatter_add(0, flat, routed_T[:, None].expand_as(expert_TK).reshape(-1).to(zeros_E.dtype)),
        weight_sum_E=zeros_E.scatter_add(0, flat, weight_TK.reshape(-1)),
        entropy=-torch.special.xlogy(detached_TK, detached_TK).sum(),
        invalid=(real_T & ~finite_T).sum().to(detached_TK.dtype),
    )


def dense_gate(weight_TK: Tensor, expert_TK: Tensor, num_experts: int) -> Tensor:
    """The gate as a [T, E] matrix: weights of the chosen experts, zero elsewhere."""
    chosen_TK = expert_TK >= 0
    zeros_TE = weight_TK.new_zeros(weight_TK.shape[0], num_experts)
    return zeros_TE.scatter_add(1, expert_TK.clamp(min=0).long(), weight_TK * chosen_TK)


def gate_scale(z_TER: Tensor, weight_TK: Tensor, expert_TK: Tensor, num_experts: int, scale: float = 1.0) -> Tensor:
    """See :func:`cuma_ds.ops.gate_scale`."""
    return _scaled(z_TER, (scale * dense_gate(weight_TK, expert_TK, num_experts))[:, :, None])


def gate_scale_backward(
    d_out_TER: Tensor,
    z_TER: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    scale: float = 1.0,
    mask_NE: Tensor | None = None,
    profile_index_T: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`cuma_ds.ops.gate_scale_backward`."""
    gate_TE = scale * dense_gate(weight_TK, expert_TK, d_out_TER.shape[1])
    d_gate_TE = scale * (d_out_TER.to(weight_TK.dtype) * z_TER.to(weight_TK.dtype)).sum(dim=-1)
    d_weight_TK = d_gate_TE.gather(1, expert_TK.clamp(min=0).long()) * (expert_TK >= 0)

    def d_z(share_TE: Tensor) -> Tensor:
        d = d_out_TER * share_TE[:, :, None]
        return (d.sum(dim=1, keepdim=True) if z_TER.shape[1] == 1 else d).to(z_TER.dtype)

    if mask_NE is None or profile_index_T is None:
        nothing = z_TER.new_empty(0)
        return d_z(gate_TE), d_weight_TK, nothing, nothing
    allowed_TE = gate_TE * mask_NE.to(gate_TE.dtype)[profile_index_T.clamp(min=0)] * (profile_index_T >= 0)[:, None]
    return d_z(gate_TE), d_weight_TK, d_z(allowed_TE), _scaled(z_TER, allowed_TE[:, :, None])


def sort_by_expert(expert_TK: Tensor, num_experts: int) -> Pairs:
    """See :func:`cuma_ds.ops.sort_by_expert`."""
    expert_M = expert_TK.reshape(-1).long()
    key_M = expert_M.masked_fill(expert_M < 0, num_experts)
    order_M = key_M.argsort(stable=True)
    place_M = torch.arange(len(order_M), device=order_M.device)
    position_M = torch.empty_like(order_M).scatter(0, order_M, place_M)
    end_E = (
        torch.zeros(num_experts + 1, dtype=torch.long, device=key_M.device)
        .scatter_add(0, key_M, torch.ones_like(key_M))
        .cumsum(0)[:-1]
    )
    order_M = order_M.masked_fill(place_M >= end_E[-1:], -1)
    position_M = position_M.masked_fill(expert_M < 0, -1)
    return Pairs(order_M.to(torch.int32), position_M.to(torch.int32).view(expert_TK.shape), end_E.to(torch.int32))


def permute_gather(x_TW: Tensor, order_M: Tensor, position_TK: Tensor, weight_TK: Tensor | None = None) -> Tensor:
    """See :func:`cuma_ds.ops.permute_gather`."""
    from_M = order_M.clamp(min=0).long()
    rows_MW = x_TW[from_M // position_TK.shape[1]]
    if weight_TK is not None:
        rows_MW = _scaled(rows_MW, weight_TK.reshape(-1)[from_M, None])
    return rows_MW.masked_fill(order_M[:, None] < 0, 0.0)


def permute_scatter(y_MW: Tensor, order_M: Tensor, position_TK: Tensor, weight_TK: Tensor | None = None) -> Tensor:
    """See :func:`cuma_ds.ops.permute_scatter`."""
    y_TKW = y_MW[position_TK.clamp(min=0).long()].masked_fill(position_TK[:, :, None] < 0, 0.0)
    if weight_TK is None:
        return y_TKW.sum(dim=1)
    return (y_TKW * weight_TK[:, :, None]).sum(dim=1).to(y_MW.dtype)


def grouped_way(dtype: torch.dtype, device: str) -> GroupedWay:
    """See :func:`cuma_ds.ops.grouped_way`."""
    return "turns" if device == "cpu" and not torch.compiler.is_compiling() else "no"


def grouped_shrink(x_TI: Tensor, weight_EJI: Tensor, pairs: Pairs) -> Tensor:
    """See :func:`cuma_ds.ops.grouped_shrink`. Experts take turns, so that their rows stay in the cache."""
    z_MJ = x_TI.new_empty(len(pairs.order_M), weight_EJI.shape[1])
    for expert, place, token_P in _turns(pairs):
        torch.mm(x_TI.index_select(0, token_P), weight_EJI[expert].T, out=z_MJ[place])
    return z_MJ


def grouped_expand(z_MJ: Tensor, weight_EJI: Tensor, pairs: Pairs, onto_TI: Tensor | None = None) -> Tensor:
    """See :func:`cuma_ds.ops.grouped_expand`."""
    wide = torch.promote_types(z_MJ.dtype, torch.float32)
    shape = (pairs.position_TK.shape[0], weight_EJI.shape[2])
    y_TI = z_MJ.new_zeros(shape, dtype=wide) if onto_TI is None else onto_TI.to(wide, copy=True)
    for expert, place, token_P in _turns(pairs):
        y_TI.index_add_(0, token_P, (z_MJ[place] @ weight_EJI[expert]).to(wide))
    return y_TI.to(z_MJ.dtype)


def grouped_outer(z_MJ: Tensor, x_TI: Tensor, pairs: Pairs) -> Tensor:
    """See :func:`cuma_ds.ops.grouped_outer`."""
    sum_EJI = x_TI.new_zeros(len(pairs.end_E), z_MJ.shape[1], x_TI.shape[1])
    for expert, place, token_P in _turns(pairs):
        torch.mm(z_MJ[place].T, x_TI.index_select(0, token_P), out=sum_EJI[expert])
    return sum_EJI


def _turns(pairs: Pairs) -> Iterator[tuple[int, slice, Tensor]]:
    """Every expert that somebody asks, where its pairs stand, and the tokens they are of."""
    token_M = pairs.order_M.long() // pairs.position_TK.shape[1]
    begin = 0
    for expert, end in enumerate(pairs.end_E.tolist()):
        if end > begin:
            yield expert, slice(begin, end), token_M[begin:end]
        begin = end


def _scaled(rows: Tensor, weight: Tensor) -> Tensor:
    """The product in the wider dtype, rounded once, as the compiled operators do."""
    return (rows * weight).to(rows.dtype)
