"""The operators of the mixture: compiled where they were built (csrc/), plain PyTorch elsewhere, with the same results.

Shapes: T tokens, E experts, K active experts, N profiles, r rank (R in names), M = T * K pairs, W features.
Compiled: float32, bfloat16 and float16 with float32 arithmetic, on the CPU and on CUDA, deterministic. float64 takes
plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cuma_ds.errors import ModelError
from cuma_ds.ops import library, reference
from cuma_ds.ops.reference import GATE_NORMS, GateOutput, dense_gate
from cuma_ds.torch_compat import is_fake

__all__ = [
    "GATE_NORMS",
    "GateOutput",
    "demographic_gate",
    "dense_gate",
    "describe",
    "gate_scale",
]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What the compiled gate holds per token.
_MOST_CHOICES = 32


def demographic_gate(
    hidden_logits_TE: Tensor, profile_logits_NE: Tensor | None, profile_index_T: Tensor, top_k: int, norm: str
) -> GateOutput:
    """Mixture weights of the router logits s = hidden + profile[index] (method, step 3, and its variants), in one pass.

    Args:
        hidden_logits_TE: [T, E] float32, bfloat16, float16 or float64, the logits of the tokens. E is at most 512.
        profile_logits_NE: [N, E], the logits of the profiles. None stands for zeros.
        profile_index_T: [T] int64, each token's row of ``profile_logits_NE``. -1 marks padding, which is counted
            nowhere.
        top_k: K. Ties go to the lower expert index. With ``softmax`` all experts are kept and K = E.
        norm: ``topk_softmax`` softmax over the top-k logits | ``softmax`` over all | ``softmax_topk`` top-k of the
            softmax, not renormalised | ``softmax_topk_softmax`` softmax of the top-k values of the softmax.

    Returns:
        A :class:`GateOutput`; gradients flow through ``weight_TK`` and ``weight_sum_E``. float32 (float64 for float64
        logits).

    Raises:
        ModelError: shapes, dtypes or devices that do not fit. On the CPU also NaN or inf logits and indices out of
            range. On CUDA such tokens are not routed, and ``invalid`` counts them, because a check would wait for the
            device.
    """
    tokens, experts = _matrix("hidden_logits_TE", hidden_logits_TE, _FLOATS)
    if norm not in GATE_NORMS:
        raise ModelError(f"norm is {norm!r}; allowed are {', '.join(GATE_NORMS)}")
    if not 1 <= top_k <= experts:
        raise ModelError(f"top_k is {top_k}; expected 1 to the number of experts, {experts}")
    _check("profile_index_T", profile_index_T, (torch.int64,), (tokens,), hidden_logits_TE)
    if profile_logits_NE is not None:
        _check("profile_logits_NE", profile_logits_NE, _FLOATS, (None, experts), hidden_logits_TE)
    top_k = experts if norm == "softmax" else top_k
    eager_cpu = (
        hidden_logits_TE.device.type == "cpu" and not torch.compiler.is_compiling() and not is_fake(hidden_logits_TE)
    )
    if eager_cpu and tokens:
        _check_range(profile_index_T, None if profile_logits_NE is None else profile_logits_NE.shape[0])
    if _compiled(hidden_logits_TE) and experts <= 512 and (norm == "softmax" or top_k <= _MOST_CHOICES):
        profile_logits_NE = None if profile_logits_NE is None else profile_logits_NE.float()
        out = GateOutput(
            *torch.ops.cuma_ds.gate(hidden_logits_TE, profile_logits_NE, profile_index_T, top_k, GATE_NORMS.index(norm))
        )
    else:
        out = reference.demographic_gate(hidden_logits_TE, profile_logits_NE, profile_index_T, top_k, norm)
    if eager_cpu and out.invalid.item():
        broken = f"the router logits of {int(out.invalid)} of {tokens} tokens are NaN or inf"
        raise ModelError(f"{broken}; the input or the router's weights are broken")
    return out


def gate_scale(z_TER: Tensor, weight_TK: Tensor, expert_TK: Tensor, num_experts: int, scale: float = 1.0) -> Tensor:
    """scale * g_i * z_i for the chosen experts, zero for the others.

    One dense product with all B then sums over the experts.

    Args:
        z_TER: [T, E, r], or [T, 1, r] when one A serves all experts.
        weight_TK, expert_TK: of the gate.
        num_experts: E.
        scale: alpha / r.

    Returns:
        [T, E, r] in the dtype of ``z_TER``. Differentiable in ``z_TER`` and ``weight_TK``.

    Raises:
        ModelError: shapes, dtypes or devices that do not fit.
    """
    _check_scale(z_TER, weight_TK, expert_TK, num_experts)
    if _compiled(z_TER):
        return torch.ops.cuma_ds.gate_scale(z_TER, weight_TK.float(), expert_TK, num_experts, scale)
    return reference.gate_scale(z_TER, weight_TK, expert_TK, num_experts, scale)


def describe() -> str:
    """One line: what computes the operators here, and why not the compiled ones if not."""
    if library.reason:
        return f"operators: plain PyTorch ({library.reason})"
    if library.architectures:
        return f"operators: compiled for the CPU and for CUDA ({', '.join(library.architectures)})"
    return "operators: compiled for the CPU; plain PyTorch on CUDA (built without nvcc or with CUMA_DS_CUDA=0)"


def _matrix(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> tuple[int, int]:
    _check(name, tensor, dtypes, (None, None), tensor)
    return tensor.shape[0], tensor.shape[1]


def _check(
    name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], shape: tuple[int | None, ...], beside: Tensor
) -> None:
    if tensor.dtype not in dtypes:
        raise ModelError(f"{name} is {_short(tensor.dtype)}; expected {' or '.join(map(_short, dtypes))}")
    if tensor.dim() != len(shape) or any(
        want is not None and have != want for have, want in zip(tensor.shape, shape, strict=True)
    ):
        expected = ", ".join("*" if size is None else str(size) for size in shape)
        raise ModelError(f"{name} has shape {list(tensor.shape)}; expected [{expected}]")
    if tensor.device != beside.device:
        raise ModelError(f"{name} is on {tensor.device}; the other arguments are on {beside.device}")


def _check_range(profile_index_T: Tensor, profiles: int | None) -> None:
    low, high = (int(bound) for bound in profile_index_T.aminmax())
    if low < -1 or (profiles is not None and high >= profiles):
        wrong = low if low < -1 else high
        rows = "a row" if profiles is None else f"a row below {profiles}"
        raise ModelError(f"profile_index_T reaches {wrong}; expected -1 (padding) or {rows}")


def _check_scale(z_TER: Tensor, weight_TK: Tensor, expert_TK: Tensor, num_experts: int) -> None:
    _check("z_TER", z_TER, _FLOATS, (None, None, None), z_TER)
    if z_TER.shape[1] not in (1, num_experts):
        raise ModelError(f"z_TER has {z_TER.shape[1]} experts; expected {num_experts}, or 1 when they share A")
    _check("weight_TK", weight_TK, _FLOATS, (z_TER.shape[0], None), z_TER)
    _check("expert_TK", expert_TK, (torch.int32,), tuple(weight_TK.shape), z_TER)


def _compiled(tensor: Tensor) -> bool:
    return library.supports(tensor.dtype, tensor.device.type)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
