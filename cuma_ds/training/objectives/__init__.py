"""What a run learns from its batches: one objective is one file here and one line in :data:`OBJECTIVES`."""

from __future__ import annotations

from collections.abc import Callable

from cuma_ds.config import RunConfig
from cuma_ds.training.objectives.dpo import Dpo
from cuma_ds.training.objectives.grpo import Grpo
from cuma_ds.training.objectives.protocol import Loss, Objective
from cuma_ds.training.objectives.sft import Sft

# By the value of training.objective.
OBJECTIVES: dict[str, Callable[[RunConfig], Objective]] = {"sft": Sft, "dpo": Dpo, "grpo": Grpo}

__all__ = ["OBJECTIVES", "Loss", "Objective"]
