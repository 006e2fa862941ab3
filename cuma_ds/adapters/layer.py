"""One adapted linear: h' = W0 h + (alpha / r) * sum_i g_i B_i A_i h (method, step 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cuma_ds.adapters.config import CumaConfig
from cuma_ds.adapters.context import RoutingContext, TokenIndex
from cuma_ds.adapters.experts import Dispatcher, Experts, LocalDispatcher
from cuma_ds.adapters.mixture import GradientMask
from cuma_ds.adapters.router import Router
from cuma_ds.ops import GateOutput, dense_gate


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
        if not self.context.enabled:
            return self.base(x)
        tokens = self.context.state.tokens(x)
        (router,) = self._router_ref
        x_TD = F.dropout(x.reshape(-1, x.shape[-1]), self.config.dropout, self.training)
        if router is None:
            gate, z_TC = _whole_gate(tokens), None
        else:
            gate, z_TC = router(x, self.context, self.owns_router, self._first_rows(x_TD))
        mask = self._gradient_mask(gate, tokens)
        self.dispatcher.begin(x_TD)
        out = self.base(x)
        return self.experts(x_TD, gate, self.dispatcher, mask, z_TC, out.reshape(-1, out.shape[-1])).view(out.shape)

    def _first_rows(self, x_TD: Tensor) -> Tensor | None:
        """A of all experts, to be multiplied in the router's product, where both read the same x and learn from the same tokens."""
        dropped = self.training and self.config.dropout > 0
        masked = self.config.gradient_mask != "none" or self.context.state.gradient_mask_NE is not None
        return None if dropped or masked else self.dispatcher.first_rows(x_TD, self.experts, self.config.top_k)

    def _gradient_mask(self, gate: GateOutput, tokens: TokenIndex) -> GradientMask | None:
        """M of the method's table, or None for all ones (the paper)."""
        state = self.context.state
        mask_NE = state.gradient_mask_NE
        if mask_NE is None and self.config.gradient_mask == "dominant" and self.training:
            gate_TE = dense_gate(gate.weight_TK.detach(), gate.expert_TK, self.config.num_experts)
            mass_NE = gate_TE.new_zeros(state.num_profiles, self.config.num_experts).index_add_(
                0, tokens.row_T, gate_TE
            )
            mask_NE = F.one_hot(mass_NE.argmax(dim=1), self.config.num_experts).to(mass_NE.dtype)
        return None if mask_NE is None else GradientMask(mask_NE, tokens.profile_T)


def _whole_gate(tokens: TokenIndex) -> GateOutput:
    """Plain LoRA: the one expert answers every real token."""
    weight_T1 = tokens.real_T[:, None].to(torch.float32)
    total_1 = weight_T1.sum(dim=0)
    nothing = total_1.new_zeros(())
    return GateOutput(weight_T1, tokens.real_T[:, None].to(torch.int32) - 1, total_1, total_1, nothing, nothing)
