"""Loads the compiled operators and tells torch their result shapes (for tracing) and their gradients.

Shapes: T tokens, E experts, K active experts, N profiles, r rank, M = T * K pairs, W features.
"""

from __future__ import annotations

import os
import platform
from typing import Protocol

import torch
from torch import Tensor

from cuma_ds.errors import ConfigError
from cuma_ds.files import first_line

# Why the compiled operators are not in use, or "".
reason = ""
# CUDA architectures they were built for.
architectures: tuple[str, ...] = ()
BUILD = "python setup.py build_ext --inplace"
# The schemas that this file registers shapes and gradients for, as counted in csrc/bindings.cpp.
_SCHEMAS = 3


class _Context(Protocol):
    """What torch gives to the gradient functions below."""

    saved_tensors: tuple[Tensor, ...]
    norm: object
    scale: object

    def save_for_backward(self, *tensors: object) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


def _load() -> str:
    """Load the extension; returns why not, or an empty string."""
    global architectures
    wish = os.environ.get("CUMA_DS_OPS", "auto")
    if wish not in ("auto", "reference"):
        raise ConfigError(f"CUMA_DS_OPS is {wish!r}; allowed are auto and reference")
    if wish == "reference":
        return "CUMA_DS_OPS=reference"
    if platform.machine().lower() in ("x86_64", "amd64") and not torch.backends.cpu.get_cpu_capability().startswith(
        "AVX"
    ):
        return "this CPU has no AVX2"
    try:
        from cuma_ds.ops import _C  # type: ignore[attr-defined]
    except ImportError as error:
        missing = "No module named" in str(error) or "cannot import name" in str(error)
        return f"they are not built; run: {BUILD}" if missing else first_line(error)
    if getattr(_C, "SCHEMAS", 1) != _SCHEMAS:
        return f"they were built from another version of the source; run: {BUILD}"
    _register()
    architectures = tuple(_C.CUDA_ARCHITECTURES.split())
    return ""


def supports(dtype: torch.dtype, device: str) -> bool:
    """Whether the compiled operators take such tensors: 16 or 32 bits, on the CPU, or on CUDA if built for it."""
    if reason or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return device in ("cpu", "meta") or (device == "cuda" and bool(architectures))


def _register() -> None:
    ops = torch.ops.cuma_ds

    @torch.library.register_fake("cuma_ds::gate")
    def gate_shapes(hidden: Tensor, profile: Tensor | None, index: Tensor, top_k: int, norm: int) -> tuple[Tensor, ...]:
        tokens, experts = hidden.shape
        weight = hidden.new_empty(tokens, top_k, dtype=torch.float32)
        scalar = weight.new_empty(())
        sums = weight.new_empty(experts)
        return (
            weight,
            weight.new_empty(tokens, top_k, dtype=torch.int32),
            sums,
            torch.empty_like(sums),
            scalar,
            torch.empty_like(scalar),
        )

    @torch.library.register_fake("cuma_ds::gate_backward")
    def gate_backward_shapes(hidden: Tensor, profile: Tensor | None, *_: object) -> tuple[Tensor, ...]:
        profiles = 0 if profile is None else profile.shape[0]
        return torch.empty_like(hidden), hidden.new_empty(profiles, hidden.shape[1], dtype=torch.float32)

    def gate_context(ctx: _Context, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:
        hidden, profile, index, _, ctx.norm = inputs
        weight, expert, load, _, entropy, invalid = output
        ctx.mark_non_differentiable(expert, load, entropy, invalid)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, profile, index, weight, expert)

    def gate_gradient(ctx: _Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        d_weight, d_weight_sum = grads[0], grads[3]
        hidden, profile, index, weight, expert = ctx.saved_tensors
        if d_weight is None and d_weight_sum is None:
            return None, None, None, None, None
        d_hidden, d_profile = ops.gate_backward(
            hidden, profile, index, weight, expert, d_weight, d_weight_sum, ctx.norm
        )
        return d_hidden, None if profile is None else d_profile, None, None, None

    torch.library.register_autograd("cuma_ds::gate", gate_gradient, setup_context=gate_context)

    @torch.library.register_fake("cuma_ds::gate_scale")
    def scale_shape(z: Tensor, weight: Tensor, expert: Tensor, num_experts: int, scale: float) -> Tensor:
        return z.new_empty(z.shape[0], num_experts, z.shape[2])

    @torch.library.register_fake("cuma_ds::gate_scale_backward")
    def scale_backward_shapes(
        d_out: Tensor, z: Tensor, weight: Tensor, expert: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        return z.new_empty(z.shape), torch.empty_like(weight)

    def scale_context(ctx: _Context, inputs: tuple[object, ...], output: Tensor) -> None:
        z, weight, expert, _, ctx.scale = inputs
        ctx.save_for_backward(z, weight, expert)

    def scale_gradient(ctx: _Context, d_out: Tensor) -> tuple[Tensor | None, ...]:
        d_z, d_weight = ops.gate_scale_backward(d_out, *ctx.saved_tensors, ctx.scale)
        return d_z, d_weight, None, None, None

    torch.library.register_autograd("cuma_ds::gate_scale", scale_gradient, setup_context=scale_context)


reason = _load()
