"""Conditional supervised fine-tuning: weighted cross-entropy, with answer histograms as soft targets.

Shapes: B sequences, K kept positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cuma_ds.config import RunConfig
from cuma_ds.data.batch import Batch, Targets, Unit, encode_example
from cuma_ds.data.rendering import Renderer
from cuma_ds.data.rows import Row
from cuma_ds.training.objectives.protocol import Loss, Objective


class Sft(Objective):
    """Learns from the answers and conversations of people; a unit is one example."""

    reads: Sequence[str] = ("choice", "chat")

    def __init__(self, config: RunConfig) -> None:
        self._data = config.data

    def unit(self, row: Row, renderer: Renderer, sentences: Sequence[str]) -> Unit:
        """One example, see :func:`~cuma_ds.data.batch.encode_example`."""
        return (encode_example(row, renderer, sentences, self._data),)

    def weight(self, batch: Batch) -> float:
        """Sum of the label weights."""
        return batch.weight_sum

    def loss(self, logits_BKV: Tensor, batch: Batch) -> Loss:
        """See :func:`sft_loss`."""
        return Loss(sft_loss(logits_BKV, batch.targets))


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
