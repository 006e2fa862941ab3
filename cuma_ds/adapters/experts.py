"""The LoRA experts of one linear layer, and the mixture they make.

Shapes: T tokens, D input features, O output features, E experts, r rank (R in names), N profiles.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cuma_ds.adapters.config import CumaConfig
from cuma_ds.adapters.gate import Gate


class Experts(nn.Module):
    """E low-rank experts: A_i [r, D] and B_i [O, r]; A may be one for all (HydraLoRA style).

    Under expert parallelism this module holds the experts ``first .. first + E_local`` of ``num_experts``.

    lora_a: [E_local, r, D], or [r, D] when shared.  lora_b: [E_local, O, r].  Both float32 unless an engine casts them.
    """

    def __init__(self, config: CumaConfig, in_features: int, out_features: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.first = 0
        self.shared_a = config.shared_a
        a_shape = (config.lora_r, in_features) if config.shared_a else (config.num_experts, config.lora_r, in_features)
        self.lora_a = nn.Parameter(torch.empty(a_shape, dtype=torch.float32, device=device))
        self.lora_b = nn.Parameter(torch.empty(config.num_experts, out_features, config.lora_r, dtype=torch.float32, device=device))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """A as LoRA initialises it (Kaiming uniform, a = sqrt 5), B at zero: the adapted model starts as the backbone."""
        bound = 1 / math.sqrt(self.lora_a.shape[-1])
        self.lora_a.copy_((torch.rand(self.lora_a.shape, generator=generator, dtype=torch.float32) * 2 - 1) * bound)
        self.lora_b.zero_()

    def sharded_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters with an expert dimension (dimension 0), by name; a shared A has none."""
        return {"lora_b": self.lora_b} if self.shared_a else {"lora_a": self.lora_a, "lora_b": self.lora_b}

    def forward(self, x_TD: Tensor, gate: Gate, dispatcher: Dispatcher, gradient_mask_TE: Tensor | None) -> Tensor:
        """sum_i g_i B_i A_i x, [T, D] -> [T, O]; run as a module so that parameter-sharding hooks see it."""
        return dispatcher.mix(x_TD, gate, self, gradient_mask_TE)

    def keep(self, first: int, count: int) -> None:
        """Hold only the experts ``first .. first + count`` from now on (expert parallelism)."""
        for name, parameter in self.sharded_parameters().items():
            setattr(self, name, nn.Parameter(parameter.detach()[first : first + count].clone()))
        self.first = first


class Dispatcher(Protocol):
    """Brings tokens and experts together; the expert-parallel ones live in cuma_ds.parallel."""

    def mix(self, x_TD: Tensor, gate: Gate, experts: Experts, gradient_mask_TE: Tensor | None) -> Tensor:
        """sum_i g_i B_i A_i x for every token: [T, D] -> [T, O]."""
        ...


class LocalDispatcher:
    """All experts are here."""

    def mix(self, x_TD: Tensor, gate: Gate, experts: Experts, gradient_mask_TE: Tensor | None) -> Tensor:
        """See :class:`Dispatcher`."""
        return mixture(x_TD, gate.weight_TE, experts.lora_a, experts.lora_b, gradient_mask_TE)


def mixture(x_TD: Tensor, gate_TE: Tensor, lora_a: Tensor, lora_b: Tensor, gradient_mask_TE: Tensor | None = None) -> Tensor:
    """sum_i g_i B_i A_i x (method, step 4, without the frozen part and alpha / r), masked-dense.

    One product with all A, scaling by the gate (zero where not routed), one product with all B: no permutation, no
    device sync. Computed in the dtype of ``x_TD``.

    Args:
        x_TD: [T, D].
        gate_TE: [T, E] mixture weights.
        lora_a: [E, r, D], or [r, D] shared by all experts.
        lora_b: [E, O, r].
        gradient_mask_TE: [T, E] in [0, 1] or None. Scales the *weight* gradients a token sends to an expert; outputs, input
            gradients and gate gradients are untouched.

    Returns:
        [T, O] in the dtype of ``x_TD``.
    """
    lora_a, lora_b, gate_TE = lora_a.to(x_TD.dtype), lora_b.to(x_TD.dtype), gate_TE.to(x_TD.dtype)
    if gradient_mask_TE is not None:
        return _MaskedGradientMixture.apply(x_TD, gate_TE, lora_a, lora_b, gradient_mask_TE.to(x_TD.dtype))
    z_TER = _down(x_TD, lora_a) * gate_TE[:, :, None]
    return _up(z_TER, lora_b)


def _down(x_TD: Tensor, lora_a: Tensor) -> Tensor:
    """[T, E, r], or [T, 1, r] for a shared A."""
    return F.linear(x_TD, lora_a.reshape(-1, lora_a.shape[-1])).view(x_TD.shape[0], -1, lora_a.shape[-2])


def _up(z_TER: Tensor, lora_b: Tensor) -> Tensor:
    return z_TER.flatten(1) @ lora_b.transpose(1, 2).reshape(-1, lora_b.shape[1])


class _MaskedGradientMixture(torch.autograd.Function):
    """``mixture`` whose weight gradients see only the allowed share of each token."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, gate_TE: Tensor, lora_a: Tensor, lora_b: Tensor, mask_TE: Tensor) -> Tensor:
        z_TER = _down(x_TD, lora_a)
        ctx.save_for_backward(x_TD, gate_TE, lora_a, lora_b, mask_TE, z_TER)
        return _up(z_TER * gate_TE[:, :, None], lora_b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TO,) = grads
        x_TD, gate_TE, lora_a, lora_b, mask_TE, z_TER = ctx.saved_tensors
        dh_TER = torch.einsum("to,eor->ter", dy_TO, lora_b)
        dgate_TE = (dh_TER * z_TER).sum(dim=-1)
        dz_TER = dh_TER * gate_TE[:, :, None]
        allowed_TER = dz_TER * mask_TE[:, :, None]
        if lora_a.dim() == 2:
            dx_TD = dz_TER.sum(dim=1) @ lora_a
            da = allowed_TER.sum(dim=1).T @ x_TD
        else:
            dx_TD = dz_TER.flatten(1) @ lora_a.flatten(0, 1)
            da = (allowed_TER.flatten(1).T @ x_TD).view_as(lora_a)
        db = torch.einsum("to,ter->eor", dy_TO, z_TER * (gate_TE * mask_TE)[:, :, None])
        return dx_TD, dgate_TE, da, db, None
