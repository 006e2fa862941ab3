"""Activation memory of one training step, measured on tensors without storage: any architecture, no weights.

A shallow copy of the model (one and two layers, one and two sequences) runs forward and backward on the meta device
while every storage is counted from its birth to its death. The peak is linear in layers and in sequences from there.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cuma_ds.planning.skeleton import Setup
from cuma_ds.torch_compat import TorchDispatchMode, tensors_in


@dataclass(frozen=True)
class ActivationPeak:
    """Peak bytes of activations: ``fixed + sequences * per_sequence``, for the whole depth of the model."""

    fixed: float
    per_sequence: float

    def bytes(self, sequences: int) -> int:
        """Peak bytes for one micro batch of so many sequences."""
        return max(0, round(self.fixed + sequences * self.per_sequence))


def activation_peak(setup: Setup, length: int, kept: int) -> ActivationPeak:
    """Trace four small runs and extend them to the model's depth.

    Args:
        setup: the model; ``num_hidden_layers`` is its depth.
        length: tokens of a sequence.
        kept: trailing positions whose logits are computed.
    """
    layers = setup.text.num_hidden_layers

    def at(depth: int, sequences: int) -> float:
        return float(_trace(_with_depth(setup, depth), sequences, length, kept))

    one_one, one_two, two_one, two_two = at(1, 1), at(1, 2), at(2, 1), at(2, 2)
    slope_one, slope_two = one_two - one_one, two_two - two_one
    per_sequence = slope_one + (slope_two - slope_one) * (layers - 1)
    at_one = one_one + (two_one - one_one) * (layers - 1)
    return ActivationPeak(fixed=at_one - per_sequence, per_sequence=per_sequence)


def _with_depth(setup: Setup, depth: int) -> Setup:
    shallow = replace(setup, backbone=copy.deepcopy(setup.backbone))
    shallow.text.num_hidden_layers = depth
    if getattr(shallow.text, "layer_types", None) is not None:
        shallow.text.layer_types = shallow.text.layer_types[:depth]
    return shallow


def _trace(setup: Setup, sequences: int, length: int, kept: int) -> int:
    model = setup.build()
    if setup.config.model.gradient_checkpointing:
        model.recompute_activations()
    batch, table = setup.work(sequences, length, kept)
    weights = {id(tensor.untyped_storage()) for tensor in [*model.parameters(), *model.buffers()]}
    with _without_collector(), _PeakMemory(weights) as memory:
        out = model(batch, table)
        logits = out.logits.flatten(0, 1)
        nll = logits.float().logsumexp(dim=-1).sum()
        loss = nll if out.balance_loss is None else nll + out.balance_loss
        del out, logits, nll
        memory.forget_gradients_of([one.parameter for one in model.trained_parameters()])
        loss.backward()
    return memory.peak


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Python's garbage collector may run at any time, and the peak would depend on when it did."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _PeakMemory(TorchDispatchMode):
    """Bytes of all storages alive that were made while this mode was on; ``peak`` is their maximum."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._seen = weakref.WeakSet[torch.UntypedStorage]()
        self._weights = weights

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._weights or storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.current -= size

    def forget_gradients_of(self, parameters: list[nn.Parameter]) -> None:
        """Leave accumulated gradients out: they are planned with the parameters they belong to."""
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
