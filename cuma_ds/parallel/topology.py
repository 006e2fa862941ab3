"""Process groups: all ranks, expert-parallel groups, expert-data-parallel groups."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, replace
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from cuma_ds.errors import TopologyError
from cuma_ds.files import first_line
from cuma_ds.launched import launched
from cuma_ds.parallel import deepspeed_compat as compat
from cuma_ds.torch_compat import limit_waiting

# While one rank prepares data or loads a model and the others wait for it. Whether it works, cuma_ds.parallel.watch
# tells. Training itself uses parallel.timeout_seconds.
_PREPARATION_SECONDS = 7 * 24 * 3600


@dataclass(frozen=True)
class Topology:
    """Where this rank stands.

    world ranks hold the data; ``ep_size`` consecutive ranks form an expert-parallel group and hold one set of experts
    between them; ranks with the same ``ep_rank`` hold the same experts and form an expert-data-parallel group.
    """

    world: int
    rank: int
    local_rank: int
    device: torch.device
    ep_size: int = 1
    ep_group: dist.ProcessGroup | None = None

    @property
    def ep_rank(self) -> int:
        """This rank's place among the holders of one set of experts."""
        return self.rank % self.ep_size

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    @property
    def holds_first_copy(self) -> bool:
        """True on the ranks that hold the first copy of the experts (and so write them)."""
        return self.rank < self.ep_size

    def experts(self, num_experts: int) -> tuple[int, int]:
        """First expert and number of the experts that this rank holds."""
        count = num_experts // self.ep_size
        return self.ep_rank * count, count

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """Sum a detached copy of ``tensor`` over all ranks."""
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def __str__(self) -> str:
        return f"{self.world} rank{'s' if self.world > 1 else ''}, ep_size {self.ep_size}"


ALONE = Topology(world=1, rank=0, local_rank=0, device=torch.device("cpu"))


def start_processes(timeout_seconds: int) -> Topology:
    """Join the other ranks (or stand alone when no launcher set the environment).

    Raises:
        TopologyError: the environment makes no sense, or peers did not appear within the timeout.
    """
    rank, world, local_rank, port = launched()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ["MASTER_PORT"] = str(port or _free_port())
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        compat.without_shared_memory_op()
    if rank:
        _wait_for_main(rank, world, timeout_seconds)
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if cuda else "gloo",
            auto_mpi_discovery=False,
            timeout=timedelta(seconds=timeout_seconds),
            verbose=False,
        )
    except (dist.DistStoreError, dist.DistNetworkError, RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise TopologyError(
            f"rank {rank} of {world} could not meet its peers at {address}: {first_line(error)}"
        ) from None
    limit_waiting(_PREPARATION_SECONDS)
    return Topology(world=world, rank=rank, local_rank=local_rank, device=device)


def _wait_for_main(rank: int, world: int, seconds: float) -> None:
    """Wait until the main rank listens. Torch would wait, too, but print C++ frames at the end.

    Raises:
        TopologyError: it does not in time.
    """
    address, until = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(address, timeout=min(10.0, seconds)).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                reason = error.strerror or first_line(error)
                raise TopologyError(
                    f"rank {rank} of {world} could not meet its peers at {address[0]}:{address[1]} within "
                    f"{seconds:.0f} s (parallel.timeout_seconds): {reason}"
                ) from None
        time.sleep(0.2)


def leave_processes() -> None:
    """Part from the other ranks in good order, once all are done."""
    dist.barrier()
    dist.destroy_process_group()


def wait_for_peers_at_most(seconds: float) -> None:
    """Let each collective of each group fail after so long without an answer; all ranks call it.

    The ranks meet first, under the longer limit of the preparation. A rank that comes here later than ``seconds``
    after the others, because its machine loads a model slowly, is not taken for lost.
    """
    dist.barrier()
    limit_waiting(seconds)


def check_ep_size(topology: Topology, ep_size: int) -> None:
    """Raise a TopologyError when ``ep_size`` does not divide the world size."""
    if topology.world % ep_size:
        raise TopologyError(
            f"parallel.ep_size is {ep_size}, which does not divide the world size {topology.world}; "
            f"start a multiple of {ep_size} ranks (deepspeed --num_accelerators N), or add --set parallel.ep_size=1"
        )


def with_expert_groups(topology: Topology, ep_size: int) -> Topology:
    """Create the expert-parallel and expert-data-parallel groups (once per size and process)."""
    check_ep_size(topology, ep_size)
    return replace(topology, ep_size=ep_size, ep_group=compat.expert_group(ep_size))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
