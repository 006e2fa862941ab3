"""The router: logits from what is asked (the token) and who is asking (the profile).

Shapes: T tokens, D input features, E experts, H hidden width, N profiles of the batch, P profile width.
"""

from __future__ import annotations

import itertools
import math
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cuma_ds.adapters.config import CumaConfig
from cuma_ds.adapters.context import RoutingContext, RoutingState, TokenIndex
from cuma_ds.adapters.mixture import project, without_autocast
from cuma_ds.ops import GateOutput, demographic_gate


class Router(nn.Module):
    """s = W_h h + W_p e_d (method, step 2), or an MLP whose first layer is that sum.

    The concatenation [h (+) e_d] is never built: its second half is one small product per *profile*, looked up per token.
    Layers that share a router (q,k,v; gate,up) ask with the same input; the gate is computed for the first of them only.
    """

    def __init__(self, config: CumaConfig, in_features: int, index: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.config = config
        self.index = index
        self.sharers = 1
        mlp = config.router == "mlp"
        bias = mlp if config.router_bias is None else config.router_bias
        width = config.router_hidden if mlp else config.num_experts

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=torch.float32, device=device))

        self.weight_h = empty(width, in_features)
        self.weight_p = empty(width, config.profile_dim) if config.profile_dim else None
        self.bias = empty(width) if bias else None
        hidden = [width] * (config.router_layers - 1) + [config.num_experts] if mlp else []
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=bias, device=device) for i, o in itertools.pairwise(hidden))
        self._cached: _CachedGate | None = None

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """W_h ~ N(0, 0.02^2), W_p ~ N(0, 1/P), later layers ~ N(0, 1/H), biases 0."""
        _normal_(self.weight_h, 0.02, generator)
        if self.weight_p is not None:
            _normal_(self.weight_p, 1 / math.sqrt(self.weight_p.shape[1]), generator)
        if self.bias is not None:
            self.bias.zero_()
        for layer in self._linears():
            _normal_(layer.weight, 1 / math.sqrt(layer.in_features), generator)
            if layer.bias is not None:
                layer.bias.zero_()

    def _linears(self) -> list[nn.Linear]:
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    def logits(
        self, h_TD: Tensor, profiles_NP: Tensor | None, profile_T: Tensor, beside_CD: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the gate adds up, in float32 (float64 stays): the tokens' logits [T, E], and the profiles' [N, E] or None; h beside^T.

        Args:
            h_TD: [T, D] the adapted linear's input.
            profiles_NP: [N, P] standardised embeddings of the batch's profiles, or None (semantic-only routing).
            profile_T: [T] int64, each token's row in ``profiles_NP``, -1 for padding.
            beside_CD: other rows that ``h_TD`` is to be multiplied with in the same product; their [T, C] comes back last, else None.
        """
        first_TW, *others = project(h_TD, self.weight_h, *([] if beside_CD is None else [beside_CD]))
        s_TW, z_TC = _at_least_float32(first_TW), others[0] if others else None
        bias_W = None if self.bias is None else self.bias.to(s_TW.dtype)
        who_NW = None
        if self.weight_p is not None and profiles_NP is not None:
            weight_p = _at_least_float32(self.weight_p)
            who_NW = F.linear(profiles_NP.to(weight_p.dtype), weight_p).to(s_TW.dtype)
        layers = self._linears()
        if not layers:
            return (s_TW if bias_W is None else s_TW + bias_W), who_NW, z_TC
        if who_NW is not None:
            # An embedding: its gradient is summed in one fixed order, and faster than that of an indexed tensor.
            s_TW = s_TW + F.embedding(profile_T.clamp(min=0), who_NW if bias_W is None else who_NW + bias_W)
        elif bias_W is not None:
            s_TW = s_TW + bias_W
        for layer in layers:
            s_TW = F.dropout(F.relu(s_TW), self.config.dropout, self.training)
            s_TW = F.linear(
                s_TW, layer.weight.to(s_TW.dtype), None if layer.bias is None else layer.bias.to(s_TW.dtype)
            )
        return s_TW, None, z_TC

    def forward(
        self, x: Tensor, context: RoutingContext, is_leader: bool = True, beside_CD: Tensor | None = None
    ) -> tuple[GateOutput, Tensor | None]:
        """The gate of one layer input, and x beside^T where the gate had to be computed.

        Args:
            x: [B, S, D] or [T, D].
            context: profiles and masks of this forward.
            is_leader: whether the caller is the first of the layers sharing this router; it alone counts statistics.
            beside_CD: as in :meth:`logits`.
        """
        cached = self._cached
        if (
            cached is not None
            and cached.x() is x
            and cached.state is context.state
            and cached.grad == torch.is_grad_enabled()
        ):
            cached.readers -= 1
            if not cached.readers:
                self._cached = None
            return cached.gate, None
        tokens = context.state.tokens(x)
        with without_autocast(x):
            x_TD, profiles_NP = x.reshape(-1, x.shape[-1]), context.state.profiles_NP
            hidden_TE, profile_NE, z_TC = self.logits(x_TD, profiles_NP, tokens.profile_T, beside_CD)
        gate = demographic_gate(hidden_TE, profile_NE, tokens.profile_T, self.config.top_k, self.config.gate_norm)
        if is_leader:
            sums_E = gate.weight_sum_E
            if context.state.full_softmax:
                sums_E = _probability_sum(hidden_TE, profile_NE, tokens)
            context.collect(self.index, gate, sums_E, tokens)
        if self.sharers > 1:
            self._cached = _CachedGate(weakref.ref(x), context.state, torch.is_grad_enabled(), gate, self.sharers - 1)
        return gate, z_TC


@dataclass
class _CachedGate:
    """A gate waiting for the other layers that share the router; dropped when the last has read it."""

    x: weakref.ref[Tensor]
    state: RoutingState
    grad: bool
    gate: GateOutput
    readers: int


def _probability_sum(hidden_TE: Tensor, profile_NE: Tensor | None, tokens: TokenIndex) -> Tensor:
    """Softmax over all E logits, summed over real tokens: [E]. It has a gradient for experts that no token is routed to."""
    logits_TE = hidden_TE if profile_NE is None else hidden_TE + F.embedding(tokens.row_T, profile_NE)
    real_T = tokens.real_T
    p_TE = logits_TE.masked_fill(~real_T[:, None], 0.0).softmax(dim=-1)
    return real_T.to(p_TE.dtype) @ p_TE


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _normal_(weight: Tensor, std: float, generator: torch.Generator) -> None:
    weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float32) * std)
