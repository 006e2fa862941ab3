"""Conditional supervised fine-tuning: weighted cross-entropy, with answer histograms as soft targets.

Shapes: B sequences, K kept positions, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from cuma_ds.data.batch import Targets


def sft_loss(logits_BKV: Tensor, targets: Targets) -> Tensor:
    """Sum of weight * -log p(token) over the labels (method, L_task); divide by the global weight sum for the mean.

    A histogram is several labels at one position, weighted by the shares of its answers.

    Args:
        logits_BKV: [B, K, V], any float dtype, at the kept positions of each sequence.
        targets: the labels.

    Returns:
        A float32 scalar (float64 for float64 logits).
    """
    log_p_L = targets.log_probabilities(logits_BKV)
    return -(targets.weight_L.to(log_p_L.dtype) * log_p_L).sum()
