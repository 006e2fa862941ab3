"""The operators in plain PyTorch. The compiled ones must equal them, and they run where the compiled ones are missing.

Shapes: T tokens, E experts, K active experts, N profiles, r rank (R in names), M = T * K pairs, W features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GATE_NORMS = ("topk_softmax", "softmax", "softmax_topk", "softmax_topk_softmax")


class GateOutput(NamedTuple):
    """What :func:`demographic_gate` returns.

    weight_TK: [T, K] mixture weights, zero for padding.  expert_TK: [T, K] int32, largest weight first, -1 for padding.
    load_E: [E] assignments per expert.  weight_sum_E: [E] summed weights, differentiable.  entropy: [] summed entropy
    of the gate, nats. invalid: [] real tokens left unrouted because a logit is NaN or inf.
    """

    weight_TK: Tensor
    expert_TK: Tensor
    load_E: Tensor
    weight_sum_E: Tensor
    entropy: Tensor
    invalid: Tensor


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


def _scaled(rows: Tensor, weight: Tensor) -> Tensor:
    """The product in the wider dtype, rounded once, as the compiled operators do."""
    return (rows * weight).to(rows.dtype)
