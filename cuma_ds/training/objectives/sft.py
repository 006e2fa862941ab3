"""Conditional supervised fine-tuning: weighted cross-entropy, with answer histograms as soft targets.

Shapes: B sequences, K kept positions, V vocabulary, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from cuma_ds.config import RunConfig
from cuma_ds.data.batch import Batch, Targets, Unit, encode_example
from cuma_ds.data.prepared import PreparedData
from cuma_ds.data.rendering import Renderer
from cuma_ds.data.rows import Row
from cuma_ds.errors import DataError
from cuma_ds.parallel.agreement import agreement
from cuma_ds.training.groups import Groups
from cuma_ds.training.objectives.protocol import Begin, Loss, Objective

if TYPE_CHECKING:
    from cuma_ds.training.inputs import BatchSource


class Sft(Objective):
    """Learns from the answers and conversations of people; a unit is one example."""

    reads: Sequence[str] = ("choice", "chat")

    def __init__(self, config: RunConfig) -> None:
        self._data = config.data
        self._groups: Groups | None = None

    def check(self, config: RunConfig, data: PreparedData, renderer: Renderer) -> None:
        """See :class:`Objective`."""
        super().check(config, data, renderer)
        if config.data.loss_on == "last" and data.kind != "chat":
            raise DataError(
                "data.loss_on is last, but the data holds answers to choice questions, not conversations; leave it out"
            )

    def unit(self, row: Row, renderer: Renderer, sentences: Sequence[str]) -> Unit:
        """One example, see :func:`~cuma_ds.data.batch.encode_example`."""
        return (encode_example(row, renderer, sentences, self._data),)

    def begin(self, begin: Begin) -> BatchSource:
        """The stream of rows."""
        with agreement():
            self._groups = Groups.of(begin.config, begin.inputs.data)
        return begin.inputs.batches

    def weight(self, batch: Batch) -> float:
        """Sum of the label weights."""
        return batch.weight_sum

    def loss(self, logits_BKV: Tensor, batch: Batch) -> Loss:
        """Sum of :func:`label_losses`, and the mean over the labels of each group as ``loss/<group>``."""
        loss_L, targets = label_losses(logits_BKV, batch.targets), batch.targets
        if self._groups is None:
            return Loss(loss_L.sum())
        profile_L = batch.profile_rows_N[targets.example_L]
        return Loss(loss_L.sum(), means=self._groups.means("loss", loss_L.detach(), profile_L, targets.weight_L))


def label_losses(logits_BKV: Tensor, targets: Targets) -> Tensor:
    """weight * -log p(token) of each label (method, L_task); their sum over the global weight sum is the mean.

    A histogram is several labels at one position, weighted by the shares of its answers.

    Args:
        logits_BKV: [B, K, V], any float dtype, at the kept positions of each sequence.
        targets: the labels.

    Returns:
        [L] float32 (float64 for float64 logits).
    """
    log_p_L = targets.log_probabilities(logits_BKV)
    return -targets.weight_L.to(log_p_L.dtype) * log_p_L
