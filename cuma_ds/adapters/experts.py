"""The LoRA experts of one linear layer, and how tokens and experts come together.

Shapes: T tokens, I input features, O output features, E experts, K active experts, r rank, M rows that the experts of
this rank answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from cuma_ds.adapters.config import CumaConfig
from cuma_ds.adapters.mixture import Routes, mixture


class ExpertWeights(NamedTuple):
    """The weights of one mixture: see ``lora_a`` and ``lora_b`` of :func:`cuma_ds.adapters.mixture.mixture`."""

    lora_a: Tensor | None
    lora_b: Tensor


class MixtureInputs(NamedTuple):
    """What :class:`Experts` takes.

    x_MI: [M, I] rows.  routes: their experts.  weights: None for the module's own.
    """

    x_MI: Tensor
    routes: Routes
    weights: ExpertWeights | None = None


class Experts(nn.Module):
    """E low-rank experts: A_i [r, I] and B_i [O, r]. One A may serve all of them (HydraLoRA).

    Under expert parallelism this module holds the experts ``first .. first + E_local`` of ``num_experts``.

    lora_a: [E_local, r, I], or [r, I] when shared.  lora_b: [E_local, O, r].  Both float32 unless an engine casts them.
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
        """A as in LoRA (Kaiming uniform, a = sqrt 5), B at zero, so that the adapted model starts as the backbone."""
        bound = 1 / math.sqrt(self.lora_a.shape[-1])
        self.lora_a.copy_((torch.rand(self.lora_a.shape, generator=generator, dtype=torch.float32) * 2 - 1) * bound)
        self.lora_b.zero_()

    def sharded_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters with an expert dimension (dimension 0), by name. A shared A has none."""
        return {"lora_b": self.lora_b} if self.shared_a else {"lora_a": self.lora_a, "lora_b": self.lora_b}

    def forward(self, x_MI: Tensor, routes: Routes, weights: ExpertWeights | None = None) -> Tensor:
        """(alpha / r) * sum_i g_i B_i A_i x, [M, O].

        A module reads its own weights here only: ZeRO-3 gathers them for this call.
        """
        lora_a, lora_b = weights or ExpertWeights(self.lora_a, self.lora_b)
        return mixture(x_MI, routes, lora_a, lora_b, self.scaling)

    def keep(self, first: int, count: int) -> None:
        """Hold only the experts ``first .. first + count`` from now on (expert parallelism)."""
        for name, parameter in self.sharded_parameters().items():
            setattr(self, name, nn.Parameter(parameter.detach()[first : first + count].clone()))
        self.first = first


class Dispatched(Protocol):
    """What :meth:`Dispatcher.dispatch` sent, and what :meth:`Dispatcher.combine` needs."""

    def wait(self) -> MixtureInputs:
        """The inputs of this rank's experts, once they are here."""
        ...


class Dispatcher(Protocol):
    """Brings tokens and experts together. The classes that cross ranks are in cuma_ds.parallel.dispatch."""

    def dispatch(self, x_TI: Tensor, routes: Routes, experts: Experts) -> Dispatched:
        """Start whatever must be sent so that the tokens meet their experts."""
        ...

    def combine(self, y_MO: Tensor, sent: Dispatched) -> Tensor:
        """The sum over the experts of each token, [T, O], from the experts' answers to ``sent``."""
        ...


@dataclass(frozen=True)
class Here:
    """Rows that are on the rank of their experts."""

    inputs: MixtureInputs

    def wait(self) -> MixtureInputs:
        """See :class:`Dispatched`."""
        return self.inputs


class Local:
    """The dispatcher of a model whose experts are all on this rank: nothing is sent."""

    def dispatch(self, x_TI: Tensor, routes: Routes, experts: Experts) -> Dispatched:
        """See :class:`Dispatcher`."""
        return Here(MixtureInputs(x_TI, routes))

    def combine(self, y_MO: Tensor, sent: Dispatched) -> Tensor:
        """See :class:`Dispatcher`."""
        return y_MO
