"""Conditional supervised fine-tuning: weighted cross-entropy, with answer histograms as soft targets.

Shapes: B sequences, K kept positions, V vocabulary, N targets.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sft_loss(logits_BKV: Tensor, row_N: Tensor, position_N: Tensor, token_N: Tensor, weight_N: Tensor) -> Tensor:
    """Sum of weight * -log p(token) over the targets (method, L_task); divide by the global weight sum for the mean.

    A histogram is several targets at one position, weighted by the shares of its answers.

    Args:
        logits_BKV: [B, K, V], any float dtype, at K positions of each sequence.
        row_N, position_N, token_N: [N] int64, where each target is predicted and what it is.
        weight_N: [N] float32.

    Returns:
        A float32 scalar (float64 for float64 logits).
    """
    places, place_N = torch.unique(row_N * logits_BKV.shape[1] + position_N, return_inverse=True)
    logits_UV = logits_BKV.flatten(0, 1)[places]
    logits_UV = logits_UV if logits_UV.dtype == torch.float64 else logits_UV.float()
    nll_N = logits_UV.logsumexp(dim=-1)[place_N] - logits_UV[place_N, token_N]
    return (weight_N.to(nll_N.dtype) * nll_N).sum()
