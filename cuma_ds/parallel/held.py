"""What trains as it is now, to be put in place again for a while: a frozen policy beside the one that learns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from cuma_ds.parallel import deepspeed_compat as compat
from cuma_ds.parallel.engine import AdapterEngine


class HeldPolicy:
    """A copy of what this rank holds of everything that trains, at any ZeRO stage and ``ep_size``.

    Args:
        engine: with the policy to keep.
    """

    def __init__(self, engine: AdapterEngine) -> None:
        self._pairs = [(part, part.clone()) for part in (_held(one.parameter) for one in engine.trained)]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, forwards are those of the kept policy. What an optimizer steps on does not change. All ranks enter
        it together.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for now, kept in self._pairs:
            before = now.clone()
            now.copy_(kept)
            kept.copy_(before)


def _held(parameter: torch.nn.Parameter) -> Tensor:
    """What a forward reads of a parameter, in place: this rank's part at stage 3, the whole parameter otherwise."""
    return compat.held(parameter).detach()
