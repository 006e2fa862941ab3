"""The load-balance loss and the routing statistics it is made of (method, step 5).

Shapes: R routers, E experts, B sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cuma_ds.adapters.context import RouterStatistics


@dataclass
class RoutingStatistics:
    """All routers' statistics of one forward, over real tokens.

    load_RE: [R, E] top-k assignments.  weight_sum_RE: [R, E] summed gate weights (differentiable).  entropy_R: [R] summed gate
    entropy, nats.  tokens: [] number of real tokens.  gate_RBE: mean gate per sequence, only when recorded.
    """

    load_RE: Tensor
    weight_sum_RE: Tensor
    entropy_R: Tensor
    tokens: Tensor
    gate_RBE: Tensor | None

    @classmethod
    def stack(cls, by_router: dict[int, RouterStatistics]) -> RoutingStatistics | None:
        """Collect the routers in module order; None when nothing was routed."""
        if not by_router:
            return None
        rows = [by_router[index] for index in sorted(by_router)]
        device = rows[0].load_E.device
        gates = [row.gate_BE.to(device) for row in rows if row.gate_BE is not None]
        return cls(
            load_RE=torch.stack([row.load_E.to(device) for row in rows]),
            weight_sum_RE=torch.stack([row.weight_sum_E.to(device) for row in rows]),
            entropy_R=torch.stack([row.entropy_sum.to(device) for row in rows]),
            tokens=rows[0].tokens,
            gate_RBE=torch.stack(gates) if gates else None,
        )


def balance_loss(statistics: RoutingStatistics, sum_over_ranks: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """L_balance = sum over routers of E * sum_i f_i p_i, over real tokens only.

    f_i is the share of the top-k assignments that went to expert i, p_i the mean gate weight of i; f carries no gradient.

    Args:
        statistics: of one forward.
        sum_over_ranks: sums a detached tensor over the data-parallel ranks. With it, f and the token count are those of all
            ranks together, and the *mean over ranks* of the returned value is the loss of the joined batch, so that the
            number of ranks does not change what is learned.

    Returns:
        A scalar; 1 per router at perfect balance. Zero when there is no real token.
    """
    load_RE, tokens = statistics.load_RE, statistics.tokens
    world: Tensor | float = 1.0
    if sum_over_ranks is not None:
        packed = torch.cat([load_RE.flatten(), tokens[None], torch.ones_like(tokens)[None]])
        packed = sum_over_ranks(packed)
        load_RE, tokens, world = packed[:-2].view_as(load_RE), packed[-2], packed[-1]
    share_RE = load_RE / load_RE.sum(dim=1, keepdim=True).clamp(min=1)
    mean_RE = statistics.weight_sum_RE * world / tokens.clamp(min=1)
    return load_RE.shape[1] * (share_RE * mean_RE).sum()
