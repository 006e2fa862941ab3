"""One adapted linear: h' = W0 h + (alpha / r) * sum_i g_i B_i A_i h (method, step 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cuma_ds.adapters.config import CumaConfig
from cuma_ds.adapters.context import RoutingContext, TokenIndex
from cuma_ds.adapters.experts import Dispatcher, Experts, Local
from cuma_ds.adapters.mixture import Routes
from cuma_ds.adapters.router import Router
from cuma_ds.ops import dense_gate


class AdaptedLinear(nn.Module):
    """Wraps a frozen linear (never copies it) and adds the mixture of experts.

    Args:
        base: the frozen linear, [.., I] -> [.., O].
        config: the adapters' configuration.
        context: the profiles and routers of the model, shared by all its layers.
        experts: this layer's experts.
        router_index: which of ``context.routers`` this layer asks. None for plain LoRA.

    Attributes:
        router: the router that has its parameters under this layer's name: that of the first layer of those that share
            it. None elsewhere.
        dispatcher: how tokens and experts come together.
    """

    def __init__(
        self, base: nn.Module, config: CumaConfig, context: RoutingContext, experts: Experts, router_index: int | None
    ) -> None:
        super().__init__()
        self.base = base
        self.config = config
        self.context = context
        self.experts = experts
        self.router: Router | None = None
        self.router_index = router_index
        self.dispatcher: Dispatcher = Local()

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, I] or [T, I] -> the same with O features.

        What is sent between ranks is sent beside the frozen product.
        """
        if not self.context.enabled:
            return self.base(x)
        x_TI = F.dropout(x.reshape(-1, x.shape[-1]), self.config.dropout, self.training)
        sent = self.dispatcher.dispatch(x_TI, self._routes(x), self.experts)
        out = self.base(x)
        y_MO = self.experts(*sent.wait())
        return out + self.dispatcher.combine(y_MO, sent).view(out.shape)

    def _routes(self, x: Tensor) -> Routes:
        tokens = self.context.state.tokens(x)
        if self.router_index is None:  # plain LoRA: the one expert answers every real token
            real_T1 = tokens.real_T[:, None]
            routes = Routes(real_T1.to(torch.float32), real_T1.to(torch.int32) - 1)
        else:
            gate = self.context.gate(self.router_index, x)
            routes = Routes(gate.weight_TK, gate.expert_TK)
        mask_NE = self._gradient_mask(routes, tokens)
        if mask_NE is None:
            return routes
        share_TK = mask_NE[tokens.row_T].gather(1, routes.expert_TK.clamp(min=0).long())
        return routes._replace(share_TK=share_TK)

    def _gradient_mask(self, routes: Routes, tokens: TokenIndex) -> Tensor | None:
        """The gradient mask [N, E] of docs/method.md, or None for all ones (the paper)."""
        state = self.context.state
        if state.gradient_mask_NE is not None or self.config.gradient_mask != "dominant" or not self.training:
            return state.gradient_mask_NE
        gate_TE = dense_gate(routes.weight_TK.detach(), routes.expert_TK, self.config.num_experts)
        mass_NE = gate_TE.new_zeros(state.num_profiles, self.config.num_experts).index_add_(0, tokens.row_T, gate_TE)
        return F.one_hot(mass_NE.argmax(dim=1), self.config.num_experts).to(mass_NE.dtype)
