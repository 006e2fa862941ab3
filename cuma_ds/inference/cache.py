"""The key-value cache of running sequences: a step writes its token into a free position and copies nothing else.

Shapes: B sequences, H key-value heads, L positions so far, S new positions, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from cuma_ds.errors import ModelError

# Positions that are allocated ahead.
_ROOM = 64


class RoomyCache(DynamicCache):
    """transformers' cache of attention keys and values, without its copy of all positions in every step.

    It has no configuration, so that every layer keeps all positions, and windows are masks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer_class_to_replicate = RoomyLayer


class RoomyLayer(DynamicLayer):
    """Keys and values [B, H, L, D] of one layer. They may be set to others at any time."""

    def __init__(self) -> None:
        super().__init__()
        self._keys, self._values = _Roomy(), _Roomy()

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append [B, H, S, D] and return the keys and values of all positions."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._keys.append(self.keys, key_states)
        self.values = self._values.append(self.values, value_states)
        return self.keys, self.values


class _Roomy:
    """A tensor that grows in place: the beginning of a longer one."""

    def __init__(self) -> None:
        self._whole_BHLD: Tensor | None = None
        self._used_BHLD: Tensor | None = None

    def append(self, states_BHLD: Tensor | None, new_BHSD: Tensor) -> Tensor:
        """``states_BHLD`` with S more positions behind it. It is copied unless the last call returned it."""
        before = 0 if states_BHLD is None or states_BHLD.dim() < 4 else states_BHLD.shape[2]
        length = before + new_BHSD.shape[2]
        whole_BHLD = self._whole_BHLD
        if whole_BHLD is None or states_BHLD is not self._used_BHLD or length > whole_BHLD.shape[2]:
            rows, heads, _, width = new_BHSD.shape
            whole_BHLD = new_BHSD.new_empty(rows, heads, length + _ROOM, width)
            if before and states_BHLD is not None:
                whole_BHLD[:, :, :before] = states_BHLD
        whole_BHLD[:, :, before:length] = new_BHSD
        self._whole_BHLD, self._used_BHLD = whole_BHLD, whole_BHLD[:, :, :length]
        return self._used_BHLD


def layers_of(cache: DynamicCache) -> list[DynamicLayer]:
    """The layers of a cache.

    Raises:
        ModelError: some keep other states than attention keys and values.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    if not layers or len(layers) < len(cache.layers):
        other = "this model's layers keep other states than attention keys and values"
        raise ModelError(f"{other}; it cannot be served in batches")
    return layers


def states_of(layer: DynamicLayer) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, L, D] of a layer that has run."""
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys, layer.values


def joined(one_BHLD: Tensor, other_BHLD: Tensor) -> Tensor:
    """The sequences of both. Those with fewer positions get empty ones in front."""
    length = max(one_BHLD.shape[2], other_BHLD.shape[2])
    return torch.cat([F.pad(x_BHLD, (0, 0, length - x_BHLD.shape[2], 0)) for x_BHLD in (one_BHLD, other_BHLD)])
