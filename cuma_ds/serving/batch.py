"""Sequences of different people, continued token by token in one forward; they join and leave between any two steps.

Shapes: B sequences, S positions of a prompt, L cached positions, H key-value heads, D head width, P profile width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from cuma_ds.adapters import CumaModel
from cuma_ds.errors import ModelError


class Newcomers(NamedTuple):
    """Prompts that were read, left-padded to one length: cache, mask [B, S], lengths [B], raw profile embeddings [B, P]."""

    cache: DynamicCache
    mask_BS: Tensor
    lengths_B: Tensor
    profiles_BP: Tensor | None


class Batch:
    """The running sequences of one model, left-padded to one length: row b of every tensor is sequence b.

    Positions count from the first real token of each sequence, so more padding in front of it changes nothing. A backbone
    that takes no ``position_ids`` must find them by itself. :meth:`cuma_ds.serving.engine.Engine.check` measures whether
    it does.

    Args:
        model: in eval mode, with a key-value cache of attention layers.
        pad_id: any token; padding is masked.
    """

    def __init__(self, model: CumaModel, pad_id: int) -> None:
        self.model, self.pad_id = model, pad_id
        self.device = next(model.parameters()).device
        self._clear()

    def __len__(self) -> int:
        return self.lengths_B.shape[0]

    def _clear(self) -> None:
        self.cache = DynamicCache()  # without a configuration every layer keeps all positions; windows are masks
        self.mask_BL = torch.zeros(0, 0, dtype=torch.long, device=self.device)
        self.lengths_B = torch.zeros(0, dtype=torch.long, device=self.device)
        self.profiles_BP: Tensor | None = None

    def join(self, prompts: Sequence[Sequence[int]], profiles_BP: Tensor | None) -> Tensor:
        """:meth:`read` and :meth:`add` in one."""
        logits_BV, new = self.read(prompts, profiles_BP)
        self.add(new)
        return logits_BV

    @torch.inference_mode()
    def read(self, prompts: Sequence[Sequence[int]], profiles_BP: Tensor | None) -> tuple[Tensor, Newcomers]:
        """Read new prompts in one forward; the running sequences are as they were, whatever happens.

        Args:
            prompts: token ids of each.
            profiles_BP: one raw embedding for each; None for a model that takes none.

        Returns:
            [new B, V] logits of their first answer tokens, and what :meth:`add` takes.
        """
        profiles_BP = None if profiles_BP is None else profiles_BP.to(self.device)
        longest = max(len(prompt) for prompt in prompts)
        rows = [[self.pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        ids_BS = torch.tensor(rows, device=self.device)
        lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        mask_BS = (torch.arange(longest, device=self.device) >= longest - lengths_B[:, None]).long()
        cache = DynamicCache()
        logits_BV = self._forward(ids_BS, mask_BS, (mask_BS.cumsum(dim=1) - 1).clamp(min=0), cache, profiles_BP)
        return logits_BV, Newcomers(cache, mask_BS, lengths_B, profiles_BP)

    @torch.inference_mode()
    def add(self, new: Newcomers) -> None:
        """Put sequences that were read behind the running ones."""
        if not len(self):
            self.cache, self.mask_BL, self.lengths_B, self.profiles_BP = new
            return
        length = max(new.mask_BS.shape[1], self.mask_BL.shape[1])
        for layer, other in zip(_layers(self.cache), _layers(new.cache), strict=True):
            layer.keys = torch.cat([_widen(layer.keys, length), _widen(other.keys, length)])
            layer.values = torch.cat([_widen(layer.values, length), _widen(other.values, length)])
        self.mask_BL = torch.cat([F.pad(mask, (length - mask.shape[1], 0)) for mask in (self.mask_BL, new.mask_BS)])
        self.lengths_B = torch.cat([self.lengths_B, new.lengths_B])
        if self.profiles_BP is not None and new.profiles_BP is not None:
            self.profiles_BP = torch.cat([self.profiles_BP, new.profiles_BP])

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to every sequence and return the logits [B, V] of the next."""
        ids_B1 = torch.tensor(tokens, device=self.device)[:, None]
        self.mask_BL = F.pad(self.mask_BL, (0, 1), value=1)
        logits_BV = self._forward(ids_B1, self.mask_BL, self.lengths_B[:, None], self.cache, self.profiles_BP)
        self.lengths_B = self.lengths_B + 1
        return logits_BV

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Let all other sequences go, and the padding that only they needed."""
        if not rows:
            self._clear()
            return
        index = torch.tensor(rows, device=self.device)
        self.lengths_B = self.lengths_B[index]
        first = self.mask_BL.shape[1] - int(self.lengths_B.max())
        self.mask_BL = self.mask_BL[index, first:]
        for layer in _layers(self.cache):
            layer.keys, layer.values = layer.keys[index, :, first:], layer.values[index, :, first:]
        if self.profiles_BP is not None:
            self.profiles_BP = self.profiles_BP[index]

    def _forward(
        self, ids_BS: Tensor, mask_BL: Tensor, positions_BS: Tensor, cache: DynamicCache, profiles_BP: Tensor | None
    ) -> Tensor:
        more: dict[str, Any] = {} if profiles_BP is None else {"profile_embeddings": profiles_BP}
        if self.model.takes_positions:
            more["position_ids"] = positions_BS
        more |= {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        out = self.model(input_ids=ids_BS, attention_mask=mask_BL, **more)
        return out.logits[:, -1]


def _layers(cache: DynamicCache) -> list[Any]:
    """The layers' keys and values, [B, H, L, D] each."""
    if not cache.layers or not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        raise ModelError(
            "this model's layers keep other states than attention keys and values; it cannot be served in batches"
        )
    return cache.layers


def _widen(x_BHLD: Tensor, length: int) -> Tensor:
    """Empty positions in front, up to ``length``."""
    return F.pad(x_BHLD, (0, 0, length - x_BHLD.shape[2], 0))
