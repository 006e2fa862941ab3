"""Activation memory of one training step, measured on tensors without storage: any architecture, no weights.

A shallow copy of the model (one and two layers, one and two sequences) runs forward and backward on the meta device
while every storage is counted from its birth to its death. The peak is linear in layers and in sequences from there.

A sharded backbone has its own peak at another moment: a large output head is whole while its product runs, and no
longer when the loss is computed. So there is a peak for each set of weights that is whole at some moment.
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

from cuma_ds.planning.cost import Weight
from cuma_ds.planning.skeleton import Gathering, Setup
from cuma_ds.torch_compat import TorchDispatchMode, tensors_in


@dataclass(frozen=True)
class ActivationPeak:
    """Peak bytes of activations: ``fixed + sequences * per_sequence``, for the whole depth of the model."""

    fixed: float
    per_sequence: float

    def at(self, sequences: int) -> float:
        """Peak bytes for one micro batch of so many sequences."""
        return self.fixed + sequences * self.per_sequence


# What is whole at one moment, in a fixed order.
Live = tuple[Weight, ...]


def activation_peaks(setup: Setup, length: int, kept: int) -> dict[Live, ActivationPeak]:
    """Trace four small runs and extend them to the model's depth.

    Args:
        setup: the model; ``num_hidden_layers`` is its depth.
        length: tokens of a sequence.
        kept: trailing positions whose logits are computed.

    Returns:
        The peak while these weights are whole, if the backbone is sharded, and no others.
    """
    layers = setup.text.num_hidden_layers

    def at(depth: int, sequences: int) -> dict[Live, int]:
        return _trace(_with_depth(setup, depth), sequences, length, kept)

    one_one, one_two, two_one, two_two = at(1, 1), at(1, 2), at(2, 1), at(2, 2)
    peaks = {}
    for live in two_two:
        # What is whole only in a deeper model grows with layers as what runs while nothing is whole.
        shallow_one, shallow_two = (
            one.get(live, two[live] - two[()] + one[()]) for one, two in ((one_one, two_one), (one_two, two_two))
        )
        slope_one, slope_two = shallow_two - shallow_one, two_two[live] - two_one[live]
        per_sequence = slope_one + (slope_two - slope_one) * (layers - 1)
        at_one = shallow_one + (two_one[live] - shallow_one) * (layers - 1)
        peaks[live] = ActivationPeak(fixed=float(at_one - per_sequence), per_sequence=float(per_sequence))
    return peaks


def _with_depth(setup: Setup, depth: int) -> Setup:
    shallow = replace(setup, backbone=copy.deepcopy(setup.backbone))
    shallow.text.num_hidden_layers = depth
    if getattr(shallow.text, "layer_types", None) is not None:
        shallow.text.layer_types = shallow.text.layer_types[:depth]
    return shallow


def _trace(setup: Setup, sequences: int, length: int, kept: int) -> dict[Live, int]:
    model, packable = setup.build_packable()
    weights = {id(tensor.untyped_storage()) for tensor in [*model.parameters(), *model.buffers()]}
    memory = _PeakMemory(weights)

    def changed() -> None:
        memory.now_live(tuple(sorted(Weight.of(parameter, setup.dtype, packable) for parameter in gathering.live)))

    gathering = Gathering(model, changed)
    if setup.config.model.gradient_checkpointing:
        model.recompute_activations()
    batch, table = setup.work(sequences, length, kept)
    with _without_collector(), memory:
        out = model(batch, table)
        logits = out.logits.flatten(0, 1)
        nll = logits.float().logsumexp(dim=-1).sum()
        loss = nll if out.balance_loss is None else nll + out.balance_loss
        del out, logits, nll
        memory.forget_gradients_of([one.parameter for one in model.trained_parameters()])
        loss.backward()
    return memory.peaks


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
    """Bytes of all storages alive that were made while this mode was on; ``peaks`` are the most, by what is live."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.current = 0
        self.peaks: dict[Live, int] = {(): 0}
        self._live: Live = ()
        self._seen = weakref.WeakSet[torch.UntypedStorage]()
        self._weights = weights

    def now_live(self, live: Live) -> None:
        """Count for these weights from here on."""
        self._live = live
        self._note()

    def _note(self) -> None:
        self.peaks[self._live] = max(self.peaks.get(self._live, 0), self.current)

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
        self._note()
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.current -= size

    def forget_gradients_of(self, parameters: list[nn.Parameter]) -> None:
        """Leave accumulated gradients out: they are planned with the parameters they belong to."""
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
