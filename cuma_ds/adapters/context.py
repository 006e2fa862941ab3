"""The routing context that every adapted layer reads: the profiles of this forward, the routers, and what they did.

Shapes: B sequences, S positions, T = B * S tokens, N profiles of this batch, P profile width, E experts, R routers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from cuma_ds.adapters.router import Router
from cuma_ds.errors import ModelError
from cuma_ds.ops import GateOutput, dense_gate


class TokenIndex:
    """Which profile row and which sequence each of the T tokens of a layer's input belongs to.

    profile_T: [T] int64, row of the profile, -1 for padding.  real_T: [T] bool.  sequence_T: [T] int64, row of the
    batch.
    """

    def __init__(self, profile_BS: Tensor) -> None:
        batch, length = profile_BS.shape
        self.profile_T = profile_BS.reshape(-1)
        self.real_T = self.profile_T >= 0
        self.row_T = self.profile_T.clamp(min=0)
        self.sequence_T = torch.arange(batch, device=profile_BS.device).repeat_interleave(length)
        self.batch = batch


@dataclass
class RouterStatistics:
    """What one router did in one forward, over real tokens only.

    load_E: assignments per expert (int counts as float32).  probability_sum_E: summed p_i of the balance loss,
    differentiable.
    entropy_sum: summed gate entropy in nats.  tokens: number of real tokens.  gate_BE: mean gate per sequence, when
    recorded.
    """

    load_E: Tensor
    probability_sum_E: Tensor
    entropy_sum: Tensor
    tokens: Tensor
    gate_BE: Tensor | None


class _LatestGate(NamedTuple):
    """The gate of the input that a router saw last, and whether autograd recorded it."""

    router_index: int
    x: Tensor
    recorded: bool
    gate: GateOutput


@dataclass
class RoutingState:
    """The profiles of one forward and what the routers did with them.

    profiles_NP: [N, P] standardised embeddings, or None without profiles.  profile_BS: [B, S] row of each position, -1
    for none.
    attention_mask_BS: [B, S_total], zero for padding.  gradient_mask_NE: [N, E], see docs/method.md.  num_profiles: N.
    collect: whether to keep statistics.  full_softmax: whether p_i of the balance loss is the softmax over all experts.
    record_sequences: whether to keep the mean gate of each sequence.  statistics: by router.
    """

    profiles_NP: Tensor | None = None
    profile_BS: Tensor | None = None
    attention_mask_BS: Tensor | None = None
    gradient_mask_NE: Tensor | None = None
    num_profiles: int = 0
    collect: bool = False
    full_softmax: bool = False
    record_sequences: bool = False
    statistics: dict[int, RouterStatistics] = field(default_factory=dict)
    latest: _LatestGate | None = field(default=None, init=False)
    _indices: dict[tuple[int, int], TokenIndex] = field(default_factory=dict)

    def tokens(self, x: Tensor) -> TokenIndex:
        """Locate the tokens of a layer's input ``x`` ([B, S, D], or [T, D] flattened) in the batch.

        A batch that generation expanded (beams, several returned sequences) repeats each profile in place. With a KV
        cache the input holds the last S positions of the attention mask.

        Raises:
            ModelError: the input's tokens cannot be those of the batch.
        """
        rows = 0 if self.profile_BS is None else self.profile_BS.shape[0]
        if x.dim() >= 3:
            batch, length = x.shape[0], x.shape[1:-1].numel()
        else:
            batch, length = rows, x.shape[0] // max(rows, 1)
        if rows == 0 or batch % rows or (x.dim() < 3 and batch * length != x.shape[0]):
            raise ModelError(
                f"an adapted layer received an input of shape {tuple(x.shape)} while the batch has {rows} sequences; "
                "only layers that see every token of the batch can be adapted"
            )
        key = (batch, length)
        if key not in self._indices:
            self._indices[key] = TokenIndex(self._profile_of_input(batch, length, x.device))
        return self._indices[key]

    def _profile_of_input(self, batch: int, length: int, device: torch.device) -> Tensor:
        """[batch, length] profile rows of the last positions. Generated ones have their sequence's last profile."""
        assert self.profile_BS is not None
        profile_BS = self.profile_BS.to(device)
        rows, known = profile_BS.shape
        if length > known:
            profile_BS = torch.cat([profile_BS, profile_BS[:, -1:].expand(-1, length - known)], dim=1)
        profile_BS = profile_BS[:, -length:]
        mask_BS = self.attention_mask_BS
        if mask_BS is not None and mask_BS.dim() == 2 and mask_BS.shape[1] >= length:
            profile_BS = profile_BS.masked_fill(mask_BS[:, -length:].to(device) == 0, -1)
        return profile_BS.repeat_interleave(batch // rows, dim=0)


class RoutingContext:
    """Shared by all adapted layers of one model; holds the state of the forward that is running or ran last.

    The state stays after the forward so that activation checkpointing can recompute with it.

    Attributes:
        state: of this forward.
        enabled: False makes the model the bare backbone.
        routers: in module order; layers that share one have the same index.
    """

    def __init__(self) -> None:
        self.state = RoutingState()
        self.enabled = True
        self.routers: list[Router] = []

    def gate(self, router_index: int, x: Tensor) -> GateOutput:
        """The gate of one layer input ([B, S, D] or [T, D]).

        Layers that share a router (q,k,v; gate,up) ask one after another with the same tensor, so the latest gate is
        kept: each router runs once per input. Only one input is kept, because those of all layers together would cost
        as much memory as activation checkpointing saves.
        """
        state = self.state
        recorded = torch.is_grad_enabled()
        latest = state.latest
        if latest is not None and latest.x is x and (latest.router_index, latest.recorded) == (router_index, recorded):
            return latest.gate
        tokens = state.tokens(x)
        gate, probability_sum_E = self.routers[router_index](
            x.reshape(-1, x.shape[-1]), state.profiles_NP, tokens.profile_T, state.full_softmax
        )
        if state.collect:
            gate_BE = _mean_gate(gate, tokens) if state.record_sequences else None
            real = tokens.real_T.sum().to(gate.load_E.dtype)
            state.statistics[router_index] = RouterStatistics(
                gate.load_E, probability_sum_E, gate.entropy, real, gate_BE
            )
        state.latest = _LatestGate(router_index, x, recorded, gate)
        return gate

    def checkpoint_contexts(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """``context_fn`` of torch.utils.checkpoint: recomputes with the state of this forward and counts nothing."""
        return contextlib.nullcontext(), self._replay(self.state)

    @contextlib.contextmanager
    def _replay(self, state: RoutingState) -> Iterator[None]:
        current = self.state
        self.state = replace(state, collect=False)
        try:
            yield
        finally:
            self.state = current


def _mean_gate(gate: GateOutput, tokens: TokenIndex) -> Tensor:
    """[B, E] mean gate over the real tokens of each sequence."""
    gate_TE = dense_gate(gate.weight_TK.detach(), gate.expert_TK, len(gate.load_E))
    sums_BE = gate_TE.new_zeros(tokens.batch, gate_TE.shape[1]).index_add_(0, tokens.sequence_T, gate_TE)
    counts_B = gate_TE.new_zeros(tokens.batch).index_add_(0, tokens.sequence_T, tokens.real_T.to(gate_TE.dtype))
    return sums_BE / counts_B.clamp(min=1)[:, None]
