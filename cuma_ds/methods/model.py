"""What engine, checkpoint and planner know of a model that trains."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import nn

# replicated: the same on every rank. per_expert: dimension 0 counts experts, which expert parallelism spreads over ranks.
Placement = Literal["replicated", "per_expert"]


class Trained(NamedTuple):
    """One parameter that trains."""

    name: str
    parameter: nn.Parameter
    placement: Placement
