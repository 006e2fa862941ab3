"""Count what every collective of this process sends, at the methods of the process group."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

sent: Counter[str] = Counter()
# The same bytes, by collective and the ranks of the group.
links: Counter[tuple[str, tuple[int, ...]]] = Counter()


def size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def count(name: str, payload: Any) -> None:
    """Make one collective of the process group add what it sends to ``sent``."""
    original = getattr(dist.ProcessGroup, name)

    def counting(group: Any, *arguments: Any, **options: Any) -> Any:
        collective, moved = payload(group, *arguments)
        sent[collective] += moved
        links[collective, tuple(dist.get_process_group_ranks(group))] += moved
        return original(group, *arguments, **options)

    setattr(dist.ProcessGroup, name, counting)


def exchanged(
    group: Any, out: torch.Tensor, rows: torch.Tensor, out_splits: list[int], in_splits: list[int], *_: Any
) -> tuple[str, int]:
    ranks = group.size()
    lengths = in_splits or [rows.shape[0] // ranks] * ranks
    elsewhere = sum(lengths) - lengths[group.rank()]
    return "all_to_all", elsewhere * rows.shape[1:].numel() * rows.element_size()


def to_all(group: Any, owns: torch.Tensor | list[torch.Tensor]) -> int:
    return sum(map(size, owns if isinstance(owns, list) else [owns])) * (group.size() - 1)


def reduced(group: Any, tensors: list[torch.Tensor], *_: Any) -> tuple[str, int]:
    total = sum(map(size, tensors))
    # Norms, flags and routing counters are scalars or a few numbers per router; gradients come in buckets.
    return "all_reduce" if total > 2048 else "control", 2 * total * (group.size() - 1) // group.size()


METHODS = {  # with the names of older and newer PyTorch
    "_allgather_base": lambda group, out, own, *_: ("all_gather", to_all(group, own)),
    "all_gather_single": lambda group, out, own, *_: ("all_gather", to_all(group, own)),
    "allgather": lambda group, outs, owns, *_: ("all_gather", to_all(group, owns)),
    "allgather_into_tensor_coalesced": lambda group, outs, owns, *_: ("all_gather", to_all(group, owns)),
    "all_gather_single_coalesced": lambda group, outs, owns, *_: ("all_gather", to_all(group, owns)),
    "_reduce_scatter_base": lambda group, own, *_: ("reduce_scatter", to_all(group, own)),
    "reduce_scatter_single": lambda group, own, *_: ("reduce_scatter", to_all(group, own)),
    "reduce_scatter_tensor_coalesced": lambda group, owns, *_: ("reduce_scatter", to_all(group, owns)),
    "reduce_scatter_single_coalesced": lambda group, owns, *_: ("reduce_scatter", to_all(group, owns)),
    "reduce_scatter": lambda group, owns, *_: ("reduce_scatter", to_all(group, owns)),
    "alltoall_base": exchanged,
    "all_to_all_single": exchanged,
    "allreduce": reduced,
    "reduce": lambda group, tensors, *_: ("reduce", sum(map(size, tensors))),
}
for method, payload in METHODS.items():
    if hasattr(dist.ProcessGroup, method):
        count(method, payload)
