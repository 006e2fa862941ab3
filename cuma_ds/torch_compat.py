"""Every name of torch that it may change without notice, for all packages. Read in torch 2.13.0.

Each says what it relies on; tests/test_compat.py checks that.
"""

from __future__ import annotations

from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["TorchDispatchMode", "is_fake", "limit_waiting", "tensors_in"]


def limit_waiting(seconds: float) -> None:
    """Let each collective of each process group of this rank fail after so long without an answer."""
    # Relies on ``distributed_c10d._world.pg_map`` holding all groups of this rank, and on ``_set_pg_timeout``. Groups
    # that DeepSpeed makes have torch's own timeout of half an hour.
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor stands for another one while torch traces a graph."""
    # Relies on ``torch._subclasses.FakeTensor``.
    return isinstance(tensor, torch._subclasses.FakeTensor)


def tensors_in(value: object) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    # Relies on ``torch.utils._pytree.tree_leaves``.
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
