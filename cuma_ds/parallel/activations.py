"""Activation memory of one training step, measured on tensors without storage: any architecture, no weights, no guesses.

A shallow copy of the model (one and two layers, one and two sequences) runs forward and backward on the meta device while every
storage is counted from its birth to its death; the peak is linear in layers and in sequences from there.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig

from cuma_ds.adapters import CumaConfig, CumaModel, inject_adapters
from cuma_ds.errors import ModelError
from cuma_ds.files import first_line

_ATTENTION = "counted_attention"


@dataclass(frozen=True)
class ActivationPeak:
    """Peak bytes of activations: ``fixed + sequences * per_sequence``, for the whole depth of the model."""

    fixed: float
    per_sequence: float

    def bytes(self, sequences: int) -> int:
        """Peak bytes for one micro batch of so many sequences."""
        return max(0, round(self.fixed + sequences * self.per_sequence))


def activation_peak(
    config: PretrainedConfig,
    adapters: CumaConfig,
    dtype: torch.dtype,
    length: int,
    kept: int,
    checkpointing: bool,
    padded: bool = True,
) -> ActivationPeak:
    """Trace four small runs and extend them to the model's depth.

    Args:
        config: the backbone's configuration; ``num_hidden_layers`` is its depth.
        adapters: with ``profile_dim`` set.
        dtype: of the backbone.
        length: tokens of a sequence.
        kept: trailing positions whose logits are computed.
        checkpointing: activation checkpointing.
        padded: whether an attention mask is needed (grouped keys and values are then repeated).
    """
    layers = text_config(config).num_hidden_layers

    def at(depth: int, sequences: int) -> float:
        return float(
            _trace(_with_depth(config, depth), adapters, dtype, sequences, length, kept, checkpointing, padded)
        )

    one_one, one_two, two_one, two_two = at(1, 1), at(1, 2), at(2, 1), at(2, 2)
    slope_one, slope_two = one_two - one_one, two_two - two_one
    per_sequence = slope_one + (slope_two - slope_one) * (layers - 1)
    at_one = one_one + (two_one - one_one) * (layers - 1)
    return ActivationPeak(fixed=at_one - per_sequence, per_sequence=per_sequence)


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a configuration that describes the language model."""
    return config.get_text_config()


def _with_depth(config: PretrainedConfig, depth: int) -> PretrainedConfig:
    shallow = copy.deepcopy(config)
    text = text_config(shallow)
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:depth]
    return shallow


def _trace(
    config: PretrainedConfig,
    adapters: CumaConfig,
    dtype: torch.dtype,
    sequences: int,
    length: int,
    kept: int,
    checkpointing: bool,
    padded: bool,
) -> int:
    model = adapted_skeleton(config, adapters, dtype)
    with torch.device("meta"):
        ids_BS = torch.zeros(sequences, length, dtype=torch.long)
        profiles_NP = torch.zeros(sequences, adapters.profile_dim) if adapters.uses_profiles else None
    _expand_keys(model, padded)
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.train()
    weights = {id(tensor.untyped_storage()) for tensor in [*model.parameters(), *model.buffers()]}
    with _without_collector(), _PeakMemory(weights) as memory:
        inputs: dict[str, Any] = {"input_ids": ids_BS, "position_ids": torch.zeros_like(ids_BS)}
        out = model(**inputs, profile_embeddings=profiles_NP, use_cache=False, logits_to_keep=kept)
        logits = out.logits.flatten(0, 1)
        nll = logits.float().logsumexp(dim=-1).sum()
        loss = nll + out.balance_loss if getattr(out, "balance_loss", None) is not None else nll
        del out, logits, nll
        memory.forget_gradients_of([p for _, p in model.adapter_parameters()])
        loss.backward()
    return memory.peak


def adapted_skeleton(config: PretrainedConfig, adapters: CumaConfig, dtype: torch.dtype) -> CumaModel:
    """The adapted model on the meta device, with an attention that only shapes are asked of.

    Raises:
        ModelError: no causal language model has this configuration, or the targets match nothing.
    """
    AttentionInterface.register(_ATTENTION, _attention)
    config = copy.deepcopy(config)
    config._attn_implementation = _ATTENTION
    with torch.device("meta"):
        try:
            base = AutoModelForCausalLM.from_config(config, dtype=dtype)
        except (ValueError, KeyError) as error:
            raise ModelError(f"no causal language model has this configuration: {first_line(error)}") from None
        return inject_adapters(base, adapters)


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
        self._seen = weakref.WeakSet[Any]()
        self._weights = weights

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
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


class _FlashAttention(torch.autograd.Function):
    """What a fused attention keeps: its inputs, its output and one float32 per query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """transformers' attention interface: [B, H, S, C] -> [B, S, H, C]."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and getattr(module, "_repeat_keys", True):
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    return _FlashAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


def _expand_keys(base: nn.Module, padded: bool) -> None:
    for module in base.modules():
        module._repeat_keys = padded  # type: ignore[assignment]
