"""One adapted linear: h' = W0 h + (alpha / r) * sum_i g_i B_i A_i h (method, step 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cuma_ds.adapters.config import CumaConfig
from cuma_ds.adapters.context import RoutingContext, TokenIndex
from cuma_ds.adapters.experts import Dispatcher, Experts, LocalDispatcher
from cuma_ds.adapters.gate import Gate
from cuma_ds.adapters.router import Router


class AdaptedLinear(nn.Module):
    """Wraps a frozen linear (never copies it) and adds the mixture of experts.

    Args:
        base: the frozen linear, [.., D] -> [.., O].
        config: the adapters' configuration.
        context: who is asking; shared by all layers of the model.
        router: this layer's router, or None for plain LoRA.
        owns_router: whether the router is registered here; layers that share one leave it to the first of them.
    """

    def __init__(
        self,
        base: nn.Module,
        config: CumaConfig,
        context: RoutingContext,
        experts: Experts,
        router: Router | None,
        owns_router: bool,
    ) -> None:
        super().__init__()
        self.base = base
        self.config = config
        self.context = context
        self.experts = experts
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.owns_router = owns_router
        if owns_router:
            self.router = router
        # A tuple keeps the shared router out of this module's parameters.
        self._router_ref = (router,)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] or [T, D] -> the same with O features, in the dtype of ``x``."""
        out = self.base(x)
        if not self.context.enabled:
            return out
        tokens = self.context.state.tokens(x)
        (router,) = self._router_ref
        gate = _whole_gate(tokens) if router is None else router(x, self.context, self.owns_router)
        x_TD = F.dropout(x.reshape(-1, x.shape[-1]), self.config.dropout, self.training)
        y_TO = self.experts(x_TD, gate, self.dispatcher, self._gradient_mask(gate, tokens))
        return out + (y_TO * self.config.scaling).view(out.shape)

    def _gradient_mask(self, gate: Gate, tokens: TokenIndex) -> Tensor | None:
        """M [T, E] of the method's table, or None for all ones (the paper)."""
        state = self.context.state
        mask_NE = state.gradient_mask_NE
        if mask_NE is None and self.config.gradient_mask == "dominant" and self.training:
            mass_NE = gate.weight_TE.new_zeros(state.num_profiles, gate.weight_TE.shape[1])
            mass_NE.index_add_(0, tokens.row_T, gate.weight_TE.detach())
            mask_NE = F.one_hot(mass_NE.argmax(dim=1), mass_NE.shape[1]).to(mass_NE.dtype)
        return None if mask_NE is None else mask_NE[tokens.row_T]


def _whole_gate(tokens: TokenIndex) -> Gate:
    """Plain LoRA: the one expert answers every real token."""
    chosen_TE = tokens.real_T[:, None]
    return Gate(chosen_TE.to(torch.float32), chosen_TE)
