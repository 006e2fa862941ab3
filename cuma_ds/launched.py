"""What a launcher (deepspeed, torchrun, srun) tells each rank by variables of the environment."""

from __future__ import annotations

import os
from typing import NamedTuple

from cuma_ds.errors import TopologyError


class Launched(NamedTuple):
    """The place of this process among those that were started together.

    Attributes:
        rank, world: its number, and how many there are.
        local_rank: its number on this machine.
        port: by which the ranks meet; None where no launcher says one.
    """

    rank: int
    world: int
    local_rank: int
    port: int | None


def launched() -> Launched:
    """What the environment says; a process that no launcher started is the only one.

    Raises:
        TopologyError: a variable is no whole number or out of range, or one that several ranks need is missing.
    """
    world = _number("WORLD_SIZE", 1, 1)
    rank = _number("RANK", 0, 0, world - 1)
    port = _number("MASTER_PORT", 0, 1, 65535) if "MASTER_PORT" in os.environ else None
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if world > 1 and name not in os.environ:
            raise TopologyError(
                f"the environment variable WORLD_SIZE is {world}, but {name} is not set; start ranks with deepspeed or "
                "torchrun, or unset it"
            )
    return Launched(rank, world, _number("LOCAL_RANK", 0, 0), port)


def _number(name: str, default: int, least: int, most: int | None = None) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or not text.isascii() or int(text) < least or (most is not None and int(text) > most):
        allowed = f"{least} or more" if most is None else f"{least} to {most}"
        raise TopologyError(
            f"the environment variable {name} is {text!r}; allowed: a whole number, {allowed}, as launchers set it; "
            "unset it to train on one process"
        )
    return int(text)
