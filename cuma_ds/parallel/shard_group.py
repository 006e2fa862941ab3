"""Shard groups: ranks that hold one copy of the frozen backbone between them (``frozen_backbone.shard_group``).

A frozen backbone has no gradients, so a layer is gathered inside its group and nothing of it is sent between groups.
Groups that are machines keep it off the network between machines.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Literal

import torch.distributed as dist

from cuma_ds.errors import TopologyError
from cuma_ds.parallel.agreement import agreement

ShardGroupSize = Literal["world", "machine"] | int

_KEY = "frozen_backbone.shard_group"


@dataclass(frozen=True)
class ShardGroup:
    """This rank's group.

    ranks: consecutive ranks.  group: None for all ranks of the run.
    """

    ranks: range
    group: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        """This rank's place in the group."""
        return dist.get_rank() - self.ranks.start


def make_shard_group(size: ShardGroupSize) -> ShardGroup:
    """This rank's group; all ranks call it. The first call makes the groups.

    Raises:
        TopologyError: the same one line on every rank, see :func:`divide_ranks` and :func:`ranks_of_machines`.
    """
    world = dist.get_world_size()
    if size == "world":
        return ShardGroup(range(world))
    told: list[int] = [0] * world
    dist.all_gather_object(told, _ranks_of_this_machine(world))
    with agreement():
        groups = divide_ranks(ranks_of_machines(told), size)
    if len(groups) == 1:
        return ShardGroup(groups[0])
    made = _process_groups(tuple(groups))
    own = next(number for number, ranks in enumerate(groups) if dist.get_rank() in ranks)
    return ShardGroup(groups[own], made[own])


def divide_ranks(machines: Sequence[int], size: ShardGroupSize) -> list[range]:
    """The ranks of each group.

    Args:
        machines: number of ranks on each machine, in the order of ranks.
        size: ``world`` is one group of all ranks, ``machine`` one group per machine, a number groups of so many ranks.

    Raises:
        TopologyError: the number does not divide the ranks, or a group has a part of a machine and ranks of another
            one. Says which, and what would fit.
    """
    world = sum(machines)
    if size == "world":
        return [range(world)]
    if size == "machine":
        return [range(end - count, end) for count, end in zip(machines, accumulate(machines), strict=True)]
    problem = _problem(machines, size)
    if problem is not None:
        fitting = ", ".join(map(str, fitting_sizes(machines)))
        raise TopologyError(f"{_KEY} is {size}, {problem}; what fits: {fitting}, machine, world")
    return [range(first, first + size) for first in range(0, world, size)]


def fitting_sizes(machines: Sequence[int]) -> list[int]:
    """The numbers of ranks that groups may have, smallest first."""
    return [size for size in range(1, sum(machines) + 1) if _problem(machines, size) is None]


def ranks_of_machines(told: Sequence[int]) -> list[int]:
    """Number of ranks on each machine, from what the launcher told each rank about its own machine.

    Raises:
        TopologyError: ranks of one machine were told different numbers.
    """
    machines: list[int] = []
    first = 0
    while first < len(told):
        count = told[first]
        if count < 1 or list(told[first : first + count]) != [count] * count:
            raise TopologyError(
                f"{_KEY} cannot tell the machines apart: the launcher told rank {first} of {count} ranks on its "
                f"machine, but ranks {first} to {min(first + max(count, 1), len(told)) - 1} do not agree "
                "(LOCAL_WORLD_SIZE, or LOCAL_SIZE of deepspeed); set it to the ranks of each machine, or use world"
            )
        machines.append(count)
        first += count
    return machines


def _problem(machines: Sequence[int], size: int) -> str | None:
    """Why groups of so many ranks cannot be made; None where they can."""
    world = sum(machines)
    if size < 1 or world % size:
        return f"which does not divide the {world} ranks"
    ends = list(accumulate(machines))
    for first in range(0, world, size):
        last = first + size - 1
        on = [number for number, end in enumerate(ends) if end - machines[number] <= last and first < end]
        whole = first in (0, *ends) and last + 1 in ends
        if len(on) > 1 and not whole:
            return (
                f"which splits machines unevenly: ranks {first} to {last} would be one group, on {len(on)} machines of "
                f"{' and '.join(str(machines[number]) for number in on)} ranks"
            )
    return None


def _ranks_of_this_machine(world: int) -> int:
    """As torchrun (``LOCAL_WORLD_SIZE``) or deepspeed (``LOCAL_SIZE``) say; all ranks where neither does."""
    told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or str(world)
    return int(told) if told.isdigit() else 0


@cache
def _process_groups(groups: tuple[range, ...]) -> tuple[dist.ProcessGroup, ...]:
    return tuple(dist.new_group(list(ranks)) for ranks in groups)
