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

    load_RE: [R, E] top-k assignments.  probability_sum_RE: [R, E] summed p_i of the balance loss (differentiable).
    entropy_R: [R] summed gate entropy, nats.  tokens: [] number of real tokens.  gate_RBE: mean gate per sequence, only
    when recorded.
    """

    load_RE: Tensor
    probability_sum_RE: Tensor
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
            probability_sum_RE=torch.stack([row.probability_sum_E.to(device) for row in rows]),
            entropy_R=torch.stack([row.entropy_sum.to(device) for row in rows]),
            tokens=rows[0].tokens,
            gate_RBE=torch.stack(gates) if gates else None,
        )


def balance_loss(
    statistics: RoutingStatistics,
    share_RE: Tensor | None = None,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """L_balance = sum over routers of E * sum_i f_i p_i, over real tokens only (method, step 5).

    f_i is the share of the top-k assignments that went to expert i; it carries no gradient. p_i is the mean probability
    of expert i.

    Args:
        statistics: of one forward.
        share_RE: [R, E] f_i of the run so far (:func:`follow_shares`). The loss is then a mean over the tokens of this
            forward, so that the mean over several forwards, weighted by their tokens, does not depend on how a step was
            cut into micro batches and ranks. None takes f_i of this forward alone (``balance_scope: micro_batch``).
        sum_over_ranks: without ``share_RE``, sums a detached tensor over the data-parallel ranks. f_i and the token
            count are then those of all ranks, and the *mean over ranks* of the returned value is the loss of the joined
            batch.

    Returns:
        A scalar; 1 per router at perfect balance. Zero when there is no real token.
    """
    load_RE, tokens = statistics.load_RE, statistics.tokens
    world: Tensor | float = 1.0
    if share_RE is None:
        if sum_over_ranks is not None:
            packed = torch.cat([load_RE.flatten(), tokens[None], torch.ones_like(tokens)[None]])
            packed = sum_over_ranks(packed)
            load_RE, tokens, world = packed[:-2].view_as(load_RE), packed[-2], packed[-1]
        share_RE = load_RE / load_RE.sum(dim=1, keepdim=True).clamp(min=1)
    mean_RE = statistics.probability_sum_RE * world / tokens.clamp(min=1)
    return load_RE.shape[1] * (share_RE.to(mean_RE.dtype) * mean_RE).sum()


def follow_shares(share_RE: Tensor, load_RE: Tensor, decay: float) -> Tensor:
    """The running shares after one more optimizer step, [R, E]: decay * f + (1 - decay) * the step's own shares.

    Args:
        share_RE: [R, E] running shares; 1 / E each at the start of a run.
        load_RE: [R, E] top-k assignments of the whole step, of all ranks and micro batches. A router without any keeps
            its shares.
        decay: weight of what was, in [0, 1).
    """
    total_R1 = load_RE.sum(dim=1, keepdim=True)
    now_RE = torch.where(total_R1 > 0, load_RE / total_R1.clamp(min=1), share_RE.to(load_RE.dtype))
    return share_RE.lerp(now_RE.to(share_RE.dtype), 1 - decay)
