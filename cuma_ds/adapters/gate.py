"""The gate: from router logits to mixture weights, in the four normalisations of the method.

Shapes: T tokens, E experts, K active experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cuma_ds.adapters.config import GateNorm


class Gate(NamedTuple):
    """Who answers for each token.

    weight_TE: mixture weights; zero for experts that were not chosen and for padding. Differentiable.
    chosen_TE: bool, the experts a token is sent to; False everywhere for padding.
    """

    weight_TE: Tensor
    chosen_TE: Tensor


def compute_gate(logits_TE: Tensor, top_k: int, norm: GateNorm, real_T: Tensor | None = None) -> Gate:
    """Turn router logits into a gate (method, step 3; the other norms are variants of its table).

    Args:
        logits_TE: [T, E] float32 or float64.
        top_k: K; ties go to the lower expert index. Ignored by ``softmax``, which keeps all experts.
        norm: ``topk_softmax`` softmax over the top-k logits | ``softmax`` over all | ``softmax_topk`` top-k of the softmax,
            not renormalised | ``softmax_topk_softmax`` softmax of the top-k values of the softmax.
        real_T: [T] bool, False for padding; None when every token is real.
    """
    if norm == "softmax":
        chosen_TE = torch.ones_like(logits_TE, dtype=torch.bool)
        weight_TE = logits_TE.softmax(dim=-1)
    else:
        order_TK = logits_TE.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
        chosen_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(-1, order_TK, True)
        if norm == "topk_softmax":
            weight_TE = logits_TE.masked_fill(~chosen_TE, -torch.inf).softmax(dim=-1)
        elif norm == "softmax_topk":
            weight_TE = logits_TE.softmax(dim=-1) * chosen_TE
        else:
            weight_TE = logits_TE.softmax(dim=-1).masked_fill(~chosen_TE, -torch.inf).softmax(dim=-1)
    if real_T is not None:
        weight_TE = weight_TE * real_T[:, None]
        chosen_TE = chosen_TE & real_T[:, None]
    return Gate(weight_TE, chosen_TE)
