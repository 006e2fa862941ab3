"""What every objective is.

Shapes: B sequences, K kept positions, V vocabulary, G groups of profiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from cuma_ds.config import RunConfig
from cuma_ds.data.batch import Batch, Unit
from cuma_ds.data.prepared import PreparedData
from cuma_ds.data.rendering import Renderer
from cuma_ds.data.rows import Row
from cuma_ds.data.stream import Draw
from cuma_ds.errors import DataError
from cuma_ds.parallel.engine import AdapterEngine
from cuma_ds.runs import Run
from cuma_ds.training.groups import Groups

_WHAT_ROWS_HOLD = {"choice": "answers", "chat": "conversations", "preference": "preferences"}

if TYPE_CHECKING:
    from cuma_ds.training.inputs import BatchSource, TrainingInputs


@dataclass(frozen=True)
class Loss:
    """What an objective makes of one micro batch.

    Attributes:
        sum: a scalar with gradients. Divided by the weight of the whole step it is part of the mean over the global
            batch.
        metrics: further scalars by name, without gradients and on the device. They are summed and divided as ``sum``
            is, and written to the row of the step. Every micro batch has the same names, in the same order.
        means: as metrics, but each is [2], a sum and the number of what was summed. They are summed over the step, and
            the row gets one divided by the other, or nothing where the number is 0.
    """

    sum: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    means: Mapping[str, Tensor] = field(default_factory=dict)


class Begin(NamedTuple):
    """A run that is about to take its first step, or to go on.

    config: the recipe.  engine: with the start policy: a checkpoint is loaded later.  inputs: what it trains on.  run:
    its folder.  tell: prints a line on the main rank.
    """

    config: RunConfig
    engine: AdapterEngine
    inputs: TrainingInputs
    run: Run
    tell: Callable[[str], None]


class Objective:
    """What a run learns.

    Attributes:
        reads: kinds of prepared data that it learns from.
        show: shows on the progress bar what a step is doing: (name, how much of it is done, of how much). It is set for
            the time of the run.
    """

    reads: Sequence[str] = ()
    show: Callable[[str, int, int], None] = staticmethod(lambda name, done, total: None)

    def check(self, config: RunConfig, data: PreparedData, renderer: Renderer) -> None:
        """Refuse what the recipe asks of this data. The main rank calls it, before a new run has a folder.

        Args:
            config: the recipe.
            data: all splits.
            renderer: of the model's tokenizer.

        Raises:
            CumaError: one line with the key and what is allowed.
        """
        if data.kind not in self.reads:
            wanted = " or ".join(_WHAT_ROWS_HOLD[kind] for kind in self.reads)
            raise DataError(
                f"the data holds {_WHAT_ROWS_HOLD[data.kind]}, but objective {config.training.objective} learns from "
                f"{wanted}; prepare it with --kind {self.reads[-1]}"
            )
        Groups.of(config, data)

    def unit(self, row: Row, renderer: Renderer, sentences: Sequence[str]) -> Unit:
        """The examples that a row becomes. They share a micro batch, which holds the examples of all its units in
        order.

        Args:
            row: of a prepared split.
            renderer: of the model's tokenizer.
            sentences: profile sentences by profile.
        """
        raise NotImplementedError

    def layout(self, draw: Draw) -> tuple[int, int]:
        """Units of each micro batch, fillers included, and the number of micro batches per step and rank."""
        return draw.micro, draw.accumulation

    def begin(self, begin: Begin) -> BatchSource:
        """Where the batches come from. All ranks call it together, once, with the start policy in the engine.

        Raises:
            CumaError: the same one line on every rank.
        """
        return begin.inputs.batches

    def weight(self, batch: Batch) -> float:
        """The batch's part of what the step's loss is divided by; it is known before the forward. 0 for fillers."""
        raise NotImplementedError

    def loss(self, logits_BKV: Tensor, batch: Batch) -> Loss:
        """The loss of one micro batch.

        Args:
            logits_BKV: [B, K, V], any float dtype, at the kept positions of each sequence.
            batch: on the device of the logits. ``batch.rows`` names the rows behind its units.
        """
        raise NotImplementedError

    def report(self) -> Mapping[str, float]:
        """Further numbers for the row of the step that was taken last, by name. They are read on the main rank."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the objective, by name; equal on all ranks."""
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what :meth:`state` gave."""
