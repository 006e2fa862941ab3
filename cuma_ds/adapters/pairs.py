"""Sorting the pairs of a token and one of its experts by expert, and moving rows into that order and back.

In plain PyTorch: compiled operators for it gained less than 3% of a training step (docs/performance.md).

Shapes: T tokens, K active experts, E experts, M = T * K pairs, W features.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """The pairs of a token and one of its experts, sorted by expert, as :func:`sort_by_expert` returns them.

    order_M: [M] int64, the pair (t * K + k) at each sorted place. Pairs of padding come last.  position_TK: [T, K]
    int64, the place of each pair.  end_E: [E] int32, where each expert's places end (the offsets that grouped products
    take).
    """

    order_M: Tensor
    position_TK: Tensor
    end_E: Tensor


def sort_by_expert(expert_TK: Tensor, num_experts: int) -> Pairs:
    """Sort the pairs by expert, stably, without waiting for the device.

    Args:
        expert_TK: [T, K] int32, -1 for padding.
        num_experts: E.
    """
    expert_M = expert_TK.flatten()
    key_M, order_M = torch.where(expert_M < 0, num_experts, expert_M).sort(stable=True)
    place_M = torch.arange(len(order_M), device=order_M.device)
    position_M = torch.empty_like(order_M).scatter_(0, order_M, place_M)
    expert_E = torch.arange(num_experts, dtype=key_M.dtype, device=key_M.device)
    end_E = torch.searchsorted(key_M, expert_E, right=True, out_int32=True)
    return Pairs(order_M, position_M.view(expert_TK.shape), end_E)


def rows_of_pairs(x_TW: Tensor, pairs: Pairs) -> Tensor:
    """The tokens' rows in the order of the pairs, [M, W]. The gradient adds a token's rows up in one fixed order."""
    return _RowsOfPairs.apply(x_TW, *pairs)


def gather(x_TW: Tensor, pairs: Pairs) -> Tensor:
    """:func:`rows_of_pairs` without a gradient."""
    return x_TW.index_select(0, pairs.order_M // pairs.position_TK.shape[1])


def add_up(y_MW: Tensor, pairs: Pairs) -> Tensor:
    """The sum of each token's K rows, [T, W] in the dtype of ``y_MW``, rounded once."""
    tokens, top_k = pairs.position_TK.shape
    return y_MW.index_select(0, pairs.position_TK.flatten()).view(tokens, top_k, y_MW.shape[1]).sum(dim=1)


class _SavedPairs(Protocol):
    """What torch gives to the forward and the backward of the function below."""

    saved_tensors: tuple[Tensor, Tensor, Tensor]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _RowsOfPairs(torch.autograd.Function):
    """``index_select`` would add the gradients of a token's rows up in any order on a GPU."""

    @staticmethod
    def forward(ctx: _SavedPairs, x_TW: Tensor, order_M: Tensor, position_TK: Tensor, end_E: Tensor) -> Tensor:
        ctx.save_for_backward(order_M, position_TK, end_E)
        return gather(x_TW, Pairs(order_M, position_TK, end_E))

    @staticmethod
    def backward(ctx: _SavedPairs, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return add_up(grads[0], Pairs(*ctx.saved_tensors)), None, None, None
