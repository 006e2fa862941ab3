"""The router: logits from the token and from the profile of the person who asks.

Shapes: T tokens, D input features, E experts, H hidden width, N profiles of the batch, P profile width.
"""

from __future__ import annotations

import itertools
import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cuma_ds.adapters.config import CumaConfig
from cuma_ds.adapters.mixture import AutogradContext, without_autocast
from cuma_ds.ops import GateOutput, demographic_gate

_Logits = TypeVar("_Logits", Tensor, Tensor | None)


class Router(nn.Module):
    """s = W_h h + W_p e_d (method, step 2), or an MLP whose first layer is that sum.

    The concatenation [h (+) e_d] is never built: its second half is one small product per *profile*, looked up per
    token. With ``router_input: profile`` there is no first half: s = W_p e_d, the same for all tokens of a sequence.
    """

    def __init__(self, config: CumaConfig, in_features: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.config = config
        mlp = config.router == "mlp"
        bias = mlp if config.router_bias is None else config.router_bias
        width = config.router_hidden if mlp else config.num_experts

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=torch.float32, device=device))

        self.weight_h = empty(width, in_features) if config.router_input == "token_and_profile" else None
        self.weight_p = empty(width, config.profile_dim) if config.profile_dim else None
        self.bias = empty(width) if bias else None
        hidden = [width] * (config.router_layers - 1) + [config.num_experts] if mlp else []
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=bias, device=device) for i, o in itertools.pairwise(hidden))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """W_h ~ N(0, 0.02^2), W_p ~ N(0, 1/P), later layers ~ N(0, 1/H), biases 0."""
        if self.weight_h is not None:
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

    def logits(self, h_TD: Tensor, profiles_NP: Tensor | None, profile_T: Tensor) -> tuple[Tensor, Tensor | None]:
        """The two terms of the logits over ``gate_temperature``: [T, E] of tokens, and [N, E] of profiles or None.

        They are products of float32 numbers on every device, because rounding them to 16 bits makes experts tie and
        change between machines. float64 stays.

        Args:
            h_TD: [T, D] the adapted linear's input.
            profiles_NP: [N, P] standardised embeddings of the batch's profiles, or None (semantic-only routing).
            profile_T: [T] int64, each token's row in ``profiles_NP``, -1 for padding.
        """
        s_TW = self._of_tokens(h_TD)
        bias_W = None if self.bias is None else self.bias.to(s_TW.dtype)
        profile_NW = None
        if self.weight_p is not None and profiles_NP is not None:
            weight_p = _at_least_float32(self.weight_p)
            profile_NW = F.linear(profiles_NP.to(weight_p.dtype), weight_p).to(s_TW.dtype)
        layers = self._linears()
        if not layers:
            return self._cooled(s_TW if bias_W is None else s_TW + bias_W), self._cooled(profile_NW)
        if profile_NW is not None:
            # An embedding: its gradient is summed in one fixed order, and faster than that of an indexed tensor.
            s_TW = s_TW + F.embedding(profile_T.clamp(min=0), profile_NW if bias_W is None else profile_NW + bias_W)
        elif bias_W is not None:
            s_TW = s_TW + bias_W
        for layer in layers:
            s_TW = F.dropout(F.relu(s_TW), self.config.dropout, self.training)
            bias = None if layer.bias is None else layer.bias.to(s_TW.dtype)
            s_TW = F.linear(s_TW, layer.weight.to(s_TW.dtype), bias)
        return self._cooled(s_TW), None

    def _of_tokens(self, h_TD: Tensor) -> Tensor:
        """W_h h, [T, W] in float32 (float64 stays); zeros where the router reads the profile alone."""
        if self.weight_h is not None:
            return _product(h_TD, self.weight_h)
        assert self.weight_p is not None
        dtype = torch.float64 if h_TD.dtype == torch.float64 else torch.float32
        return h_TD.new_zeros(len(h_TD), self.weight_p.shape[0], dtype=dtype)

    def _cooled(self, s: _Logits) -> _Logits:
        return s if s is None or self.config.gate_temperature == 1 else s / self.config.gate_temperature

    def forward(
        self, h_TD: Tensor, profiles_NP: Tensor | None, profile_T: Tensor, full_softmax: bool = False
    ) -> tuple[GateOutput, Tensor]:
        """The gate of one input, and p_i of the balance loss summed over real tokens, [E].

        Args:
            h_TD, profiles_NP, profile_T: as in :meth:`logits`.
            full_softmax: whether p_i is the softmax over all E logits, or the gate (``config.balance_probability``).
        """
        with without_autocast(h_TD):
            hidden_TE, profile_NE = self.logits(h_TD, profiles_NP, profile_T)
        gate = demographic_gate(hidden_TE, profile_NE, profile_T, self.config.top_k, self.config.gate_norm)
        if not full_softmax:
            return gate, gate.weight_sum_E
        if profile_NE is not None:
            hidden_TE = hidden_TE + F.embedding(profile_T.clamp(min=0), profile_NE)
        real_T = profile_T >= 0
        p_TE = hidden_TE.masked_fill(~real_T[:, None], 0.0).softmax(dim=-1)
        return gate, real_T.to(p_TE.dtype) @ p_TE


def _product(h_TD: Tensor, weight_WD: Tensor) -> Tensor:
    """h W^T, [T, W] in float32 (float64 stays)."""
    if h_TD.dtype in (torch.bfloat16, torch.float16):
        return _Float32Product.apply(h_TD, weight_WD.float())
    return F.linear(h_TD, weight_WD.to(h_TD.dtype))


class _Float32Product(torch.autograd.Function):
    """h W^T in float32 of a 16-bit h [T, D] and a float32 W [W, D].

    The backward pass keeps h in 16 bits. A float32 copy for each router would be twice the memory of its input.
    """

    @staticmethod
    def forward(ctx: AutogradContext, h_TD: Tensor, weight_WD: Tensor) -> Tensor:
        ctx.save_for_backward(h_TD, weight_WD)
        return F.linear(h_TD.float(), weight_WD)

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (ds_TW,), (h_TD, weight_WD) = grads, ctx.saved_tensors
        dh_TD = (ds_TW @ weight_WD).to(h_TD.dtype) if ctx.needs_input_grad[0] else None
        dweight_WD = ds_TW.T @ h_TD.float() if ctx.needs_input_grad[1] else None
        return dh_TD, dweight_WD


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _normal_(weight: Tensor, std: float, generator: torch.Generator) -> None:
    weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float32) * std)
