"""The LoRA experts of one linear layer, and the mixture they make.

Shapes: T tokens, D input features, O output features, E experts, r rank (R in names), N profiles.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from cuma_ds.adapters.config import CumaConfig
from cuma_ds.adapters.mixture import GradientMask, all_a, mixture
from cuma_ds.ops import GateOutput


class Experts(nn.Module):
    """E low-rank experts: A_i [r, D] and B_i [O, r]; A may be one for all (HydraLoRA style).

    Under expert parallelism this module holds the experts ``first .. first + E_local`` of ``num_experts``.

    lora_a: [E_local, r, D], or [r, D] when shared.  lora_b: [E_local, O, r].  Both float32 unless an engine casts them.
    """

    def __init__(
        self, config: CumaConfig, in_features: int, out_features: int, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.first = 0
        self.shared_a = config.shared_a
        self.scaling = config.scaling
        a_shape = (config.lora_r, in_features) if config.shared_a else (config.num_experts, config.lora_r, in_features)
        self.lora_a = nn.Parameter(torch.empty(a_shape, dtype=torch.float32, device=device))
        self.lora_b = nn.Parameter(
            torch.empty(config.num_experts, out_features, config.lora_r, dtype=torch.float32, device=device)
        )

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """A as LoRA initialises it (Kaiming uniform, a = sqrt 5), B at zero: the adapted model starts as the backbone."""
        bound = 1 / math.sqrt(self.lora_a.shape[-1])
        self.lora_a.copy_((torch.rand(self.lora_a.shape, generator=generator, dtype=torch.float32) * 2 - 1) * bound)
        self.lora_b.zero_()

    def sharded_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters with an expert dimension (dimension 0), by name; a shared A has none."""
        return {"lora_b": self.lora_b} if self.shared_a else {"lora_a": self.lora_a, "lora_b": self.lora_b}

    def forward(
        self,
        x_TD: Tensor,
        gate: GateOutput,
        dispatcher: Dispatcher,
        mask: GradientMask | None,
        z_TC: Tensor | None,
        frozen_TO: Tensor,
    ) -> Tensor:
        """W0 x + (alpha / r) * sum_i g_i B_i A_i x, [T, O]; run as a module so that parameter-sharding hooks see it."""
        return dispatcher.mix(x_TD, gate, self, mask, z_TC, frozen_TO)

    def keep(self, first: int, count: int) -> None:
        """Hold only the experts ``first .. first + count`` from now on (expert parallelism)."""
        for name, parameter in self.sharded_parameters().items():
            setattr(self, name, nn.Parameter(parameter.detach()[first : first + count].clone()))
        self.first = first


class Dispatcher(Protocol):
    """Brings tokens and experts together; the expert-parallel ones live in cuma_ds.parallel."""

    def first_rows(self, x_TD: Tensor, experts: Experts, top_k: int) -> Tensor | None:
        """What multiplies every token of the next :meth:`mix` first, [C, D], so that the router's product can do it; None to keep it."""
        ...

    def begin(self, x_TD: Tensor) -> None:
        """What the next :meth:`mix` reads is on its way; the work given to the device from here on may run beside that mix."""
        ...

    def mix(
        self,
        x_TD: Tensor,
        gate: GateOutput,
        experts: Experts,
        mask: GradientMask | None,
        z_TC: Tensor | None,
        frozen_TO: Tensor,
    ) -> Tensor:
        """The frozen part [T, O] + (alpha / r) * sum_i g_i B_i A_i x for every token; z [T, C] is x times :meth:`first_rows`, if made."""
        ...


class LocalDispatcher:
    """All experts are here.

    Args:
        stacked: whether A can be read before the experts run; not where parameters come and go with their module (ZeRO-3).
    """

    def __init__(self, stacked: bool = True) -> None:
        self.stacked = stacked

    def first_rows(self, x_TD: Tensor, experts: Experts, top_k: int) -> Tensor | None:
        """See :class:`Dispatcher`."""
        return all_a(x_TD, experts.lora_a, experts.lora_b, top_k) if self.stacked else None

    def begin(self, x_TD: Tensor) -> None:
        """See :class:`Dispatcher`."""

    def mix(
        self,
        x_TD: Tensor,
        gate: GateOutput,
        experts: Experts,
        mask: GradientMask | None,
        z_TC: Tensor | None,
        frozen_TO: Tensor,
    ) -> Tensor:
        """See :class:`Dispatcher`."""
        a, b, scale = experts.lora_a, experts.lora_b, experts.scaling
        return mixture(x_TD, gate.weight_TK, gate.expert_TK, a, b, scale, mask, z_TC=z_TC, onto_TO=frozen_TO)
