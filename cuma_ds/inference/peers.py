"""The ranks that ask one model together, each with its own prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cuma_ds.incident import alive, now_doing
from cuma_ds.parallel.dispatch import ExpertParallelDispatcher
from cuma_ds.parallel.topology import Topology
from cuma_ds.parallel.watch import stop_requested, stopped

T = TypeVar("T")


@dataclass(frozen=True)
class Peers:
    """The place of this rank among them.

    Attributes:
        rank: of this process.
        world: number of ranks.
        device: of this rank's tensors.
        announce: called before each forward with the number of its real tokens, see :class:`ModelForward`.
    """

    rank: int = 0
    world: int = 1
    device: torch.device | None = None
    announce: Callable[[Tensor], None] | None = None

    @classmethod
    def of(cls, topology: Topology, dispatcher: ExpertParallelDispatcher | None) -> Peers:
        """All ranks of a topology; a dispatcher must know how many tokens each forward has."""
        announce = None if dispatcher is None else dispatcher.agree_on_tokens
        return cls(topology.rank, topology.world, topology.device, announce)

    def all_done(self, done: bool) -> bool:
        """Whether every rank says that it is done.

        Raises:
            Stopped: a rank was told to stop; raised on every rank.
        """
        alive()
        flags = torch.tensor([done, not stop_requested()], dtype=torch.int32, device=self.device)
        if self.world > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MIN)
        all_done, goes_on = flags.tolist()
        if not goes_on:
            raise stopped(f"during {now_doing()}")
        return bool(all_done)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's share: items rank, rank + world, ..."""
        return items[self.rank :: self.world]

    def joined(self, own: Sequence[T]) -> list[T]:
        """The shares of all ranks, put together in order."""
        if self.world == 1:
            return list(own)
        shares: list[list[T]] = [[]] * self.world
        dist.all_gather_object(shares, list(own))
        return [share[turn] for turn in range(len(shares[0])) for share in shares if turn < len(share)]


ALONE = Peers()
