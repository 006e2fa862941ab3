"""A device that exists in name only: its tensors are held by the CPU, but beside a CPU tensor they fail as a GPU's
would.

Importing this names torch's spare backend "pretend" for the whole process, so that scripts import it, not tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
# What may take tensors of several devices: copies, and indices from the CPU.
_CROSSING = {aten.copy_, aten._to_copy, aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class _Module(_DummyBackendModule):
    """The functions torch looks up in ``torch.pretend``."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def manual_seed_all(self, seed: int) -> None:
        """Random numbers are drawn on the CPU."""


class OnDevice(torch.Tensor):
    """A tensor of the device; ``held`` is where its values are."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        about = {
            "strides": held.stride(),
            "storage_offset": held.storage_offset(),
            "dtype": held.dtype,
            "device": DEVICE,
        }
        made = torch.Tensor._make_wrapper_subclass(cls, held.size(), **about)
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.held})"

    def tolist(self) -> Any:
        return self.held.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _held(x: Tensor) -> Tensor:
    return x.held if isinstance(x, OnDevice) else x


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation that has a tensor of the device among its arguments."""
    packet = func.overloadpacket
    if packet is aten._has_compatible_shallow_copy_type:
        return False
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    elsewhere = [x for x in tensors if not isinstance(x, OnDevice) and x.dim() > 0]
    if elsewhere and packet not in _CROSSING:
        raise RuntimeError(f"{func} got tensors of the CPU beside those of the device")
    if packet is aten.index and not isinstance(args[0], OnDevice):
        raise RuntimeError("a tensor of the CPU was indexed by one of the device")
    to = kwargs.get("device")
    if to is not None:
        kwargs = kwargs | {"device": torch.device("cpu"), "pin_memory": False}
    if packet is aten.copy_:
        _held(args[0]).copy_(_held(args[1]))
        return args[0]
    held_args, held_kwargs = tree_map_only(OnDevice, _held, (args, kwargs))
    out = func(*held_args, **held_kwargs)
    if packet is aten._to_copy:
        out = out.clone() if out is held_args[0] else out
    if to is not None and torch.device(to).type != DEVICE.type:
        return out
    out = tree_map_only(Tensor, OnDevice, out)
    if elsewhere:
        return args[0] if func._schema.name.endswith("_") else out
    return return_and_correct_aliasing(func, args, kwargs, out)


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _held(target).copy_(_held(source))
    return target


_setup_privateuseone_for_python_backend("pretend", backend_module=_Module())
DEVICE = torch.device("pretend", 0)
_library = torch.library.Library("aten", "IMPL")
for _name, _made in {
    "empty.memory_format": lambda size, dtype=None, **_: torch.empty(size, dtype=dtype),
    "empty_strided": lambda size, stride, dtype=None, **_: torch.empty_strided(size, stride, dtype=dtype),
    "arange": lambda end, dtype=None, **_: torch.arange(end, dtype=dtype),
    "arange.start": lambda start, end, dtype=None, **_: torch.arange(start, end, dtype=dtype),
    "arange.start_step": lambda start, end, step=1, dtype=None, **_: torch.arange(start, end, step, dtype=dtype),
}.items():
    _library.impl(_name, lambda *args, _made=_made, **kwargs: OnDevice(_made(*args, **kwargs)), "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
torch.__future__.set_overwrite_module_params_on_conversion(True)
