"""P-Tuning v2 (arXiv 2110.07602), which PEFT calls prefix tuning: trained keys and values before those of the prompt,
in every layer.

Shapes: B sequences, H key-value heads, V virtual tokens, S new positions, L positions so far, D head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from cuma_ds.config import RunConfig
from cuma_ds.methods.peft import PeftMethod

if TYPE_CHECKING:
    from peft import PeftModelForCausalLM


class PrefixMethod(PeftMethod):
    """See :class:`PeftMethod`. No weight of the backbone is read, so a sharded one is as good as a whole one.

    The prefix comes from embeddings [V, W] of virtual tokens, W = H * D, which an MLP (``prefix.projection``) of width
    ``prefix.hidden`` maps to the keys and values of all layers.
    """

    def wrapped(self, backbone: nn.Module, config: RunConfig) -> PeftModelForCausalLM:
        """See :class:`PeftMethod`."""
        from peft import PrefixTuningConfig, TaskType

        prefix = config.prefix
        assert prefix is not None
        hidden = prefix.hidden or backbone.config.get_text_config().hidden_size  # type: ignore[operator,union-attr]
        asked = PrefixTuningConfig(
            task_type=TaskType.CAUSAL_LM,
            num_virtual_tokens=prefix.virtual_tokens,
            prefix_projection=prefix.projection,
            encoder_hidden_size=hidden,
        )
        return _cached_prefix_model()(backbone, asked)


def _cached_prefix_model() -> type[PeftModelForCausalLM]:
    """PEFT's model, which can also go on from a cache of the positions behind the prefix."""
    from peft import PeftModelForCausalLM

    class CachedPrefixModel(PeftModelForCausalLM):
        """The prefix is the same for every sequence, so it is never kept in the cache of one."""

        def forward(
            self, *args: Any, past_key_values: Cache | None = None, use_cache: bool = False, **kwargs: Any
        ) -> Any:
            if not use_cache:
                return super().forward(*args, use_cache=False, **kwargs)
            cache = DynamicCache() if past_key_values is None else past_key_values
            out = self._behind(cache, *args, **kwargs)
            out.past_key_values = cache
            return out

        def _behind(self, cache: Cache, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
            count = self.active_peft_config.num_virtual_tokens
            if attention_mask is not None:
                attention_mask = torch.cat([attention_mask.new_ones(len(input_ids), count), attention_mask], dim=1)
            if (positions_BS := kwargs.get("position_ids")) is not None:
                kwargs["position_ids"] = positions_BS + count
            prefix = cast("DynamicCache", self.get_prompt(len(input_ids)))
            behind = BehindPrefix(prefix, cache, count)
            return self.base_model(
                input_ids=input_ids, attention_mask=attention_mask, past_key_values=behind, use_cache=True, **kwargs
            )

    return CachedPrefixModel


class BehindPrefix(DynamicCache):
    """A cache as a model with a prefix sees it.

    Args:
        prefix: keys and values [B, H, V, D] of each layer.
        cache: of the L positions behind it; new positions go there.
        count: V.
    """

    def __init__(self, prefix: DynamicCache, cache: Cache, count: int) -> None:
        super().__init__()
        self._prefix, self._cache, self._count = prefix, cache, count

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [B, H, S, D] to the cache; keys and values [B, H, V + L + S, D] of everything."""
        prefix = cast("DynamicLayer", self._prefix.layers[layer_idx])
        keys, values = self._cache.update(key_states, value_states, layer_idx, *args, **kwargs)
        assert prefix.keys is not None
        assert prefix.values is not None
        return torch.cat([prefix.keys, keys], dim=2), torch.cat([prefix.values, values], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """V + L."""
        return self._count + self._cache.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """V + L + S, and the number of positions that are kept no longer."""
        length, offset = self._cache.get_mask_sizes(query_length, layer_idx)
        return self._count + length, offset
