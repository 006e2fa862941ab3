"""What every objective is.

Shapes: B sequences, K kept positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from cuma_ds.data.batch import Batch, Unit
from cuma_ds.data.rendering import Renderer
from cuma_ds.data.rows import Row


class Loss(NamedTuple):
    """What an objective makes of one micro batch.

    Attributes:
        sum: a scalar with gradients. Divided by the weight of the whole step it is part of the mean over the global
            batch.
        metrics: further scalars by name, without gradients and on the device. They are summed and divided as ``sum``
            is, and written to the row of the step. Every micro batch has the same names, in the same order.
    """

    sum: Tensor
    metrics: Mapping[str, Tensor]


class Objective(Protocol):
    """What a run learns.

    Attributes:
        reads: kinds of prepared data that it learns from.
    """

    reads: Sequence[str]

    def unit(self, row: Row, renderer: Renderer, sentences: Sequence[str]) -> Unit:
        """The examples that a row becomes. They share a micro batch, which holds the examples of all its units in
        order.

        Args:
            row: of a prepared split.
            renderer: of the model's tokenizer.
            sentences: profile sentences by profile.
        """

    def weight(self, batch: Batch) -> float:
        """The batch's part of what the step's loss is divided by; it is known before the forward. 0 for fillers."""

    def loss(self, logits_BKV: Tensor, batch: Batch) -> Loss:
        """The loss of one micro batch.

        Args:
            logits_BKV: [B, K, V], any float dtype, at the kept positions of each sequence.
            batch: on the device of the logits. ``batch.rows`` names the rows behind its units.
        """
