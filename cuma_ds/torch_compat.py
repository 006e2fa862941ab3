"""Every name of torch that it may change without notice, for all packages. Read in torch 2.13.0.

Each says what it relies on; tests/test_compat.py checks that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

__all__ = ["TorchDispatchMode", "is_fake", "limit_waiting", "tensors_in", "without_hooks"]


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


@contextlib.contextmanager
def without_hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Inside, these hooks of modules do not run. Afterwards each module has the hooks it had, in the same order."""
    # Relies on a handle's ``id`` being the hook's key in ``hooks_dict_ref()``, the mapping that its module reads.
    hooks = [(handle.id, handle.hooks_dict_ref()) for handle in handles]
    before = {id(mapping): (mapping, dict(mapping)) for _, mapping in hooks if mapping is not None}
    for key, mapping in hooks:
        if mapping is not None:
            mapping.pop(key, None)
    try:
        yield
    finally:
        for mapping, held in before.values():
            mapping.clear()
            mapping.update(held)
