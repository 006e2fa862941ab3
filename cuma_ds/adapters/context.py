"""Who is asking in this forward pass: the routing context that every adapted layer reads.

Shapes: B sequences, S positions, T = B * S tokens, N profiles of this batch, P profile width, E experts, R routers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cuma_ds.errors import ModelError
from cuma_ds.ops import GateOutput, dense_gate


class TokenIndex:
    """Which profile row and which sequence each of the T tokens of a layer's input belongs to.

    profile_T: [T] int64, row of the profile, -1 for padding.  real_T: [T] bool.  sequence_T: [T] int64, row of the batch.
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

    load_E: assignments per expert (int counts as float32).  probability_sum_E: summed p_i of the balance loss, differentiable.
    entropy_sum: summed gate entropy in nats.  tokens: number of real tokens.  gate_BE: mean gate per sequence, when recorded.
    """

    load_E: Tensor
    probability_sum_E: Tensor
    entropy_sum: Tensor
    tokens: Tensor
    gate_BE: Tensor | None


@dataclass
class RoutingState:
    """The profiles of one forward and what the routers did with them."""

    profiles_NP: Tensor | None = None
    profile_index: Tensor | None = None
    attention_mask_BS: Tensor | None = None
    gradient_mask_NE: Tensor | None = None
    rows: int = 0
    num_profiles: int = 0
    collect: bool = False
    full_softmax: bool = False
    record_sequences: bool = False
    statistics: dict[int, RouterStatistics] = field(default_factory=dict)
    _indices: dict[tuple[int, int], TokenIndex] = field(default_factory=dict)

    def tokens(self, x: Tensor) -> TokenIndex:
        """Locate the tokens of a layer's input ``x`` ([B, S, D], or [T, D] flattened) in the batch.

        A batch that generation expanded (beams, several returned sequences) repeats each profile in place. With a KV cache the
        input holds the last S positions of the attention mask.

        Raises:
            ModelError: the input's tokens cannot be those of the batch.
        """
        if x.dim() >= 3:
            batch, length = x.shape[0], x.shape[1:-1].numel()
        else:
            batch, length = self.rows, x.shape[0] // max(self.rows, 1)
        if self.rows == 0 or batch % self.rows or (x.dim() < 3 and batch * length != x.shape[0]):
            raise ModelError(
                f"an adapted layer received an input of shape {tuple(x.shape)} while the batch has {self.rows} sequences; "
                "only layers that see every token of the batch can be adapted"
            )
        key = (batch, length)
        if key not in self._indices:
            self._indices[key] = TokenIndex(self._profile_BS(batch, length, x.device))
        return self._indices[key]

    def _profile_BS(self, batch: int, length: int, device: torch.device) -> Tensor:
        assert self.profile_index is not None
        index = self.profile_index.to(device)
        index_BS = index[:, None].expand(-1, length) if index.dim() == 1 else index[:, -length:]
        mask_BS = self.attention_mask_BS
        if mask_BS is not None and mask_BS.dim() == 2 and mask_BS.shape[1] >= length:
            index_BS = index_BS.masked_fill(mask_BS[:, -length:].to(device) == 0, -1)
        return index_BS.repeat_interleave(batch // self.rows, dim=0)


class RoutingContext:
    """Shared by all adapted layers of one model; holds the state of the forward that is running or ran last.

    The state stays after the forward so that activation checkpointing can recompute with it.
    """

    def __init__(self) -> None:
        self.state = RoutingState()
        self.enabled = True

    def collect(self, router_index: int, gate: GateOutput, probability_sum_E: Tensor, tokens: TokenIndex) -> None:
        """Add one router's gate to the statistics of this forward (once per router, never while recomputing)."""
        if not self.state.collect:
            return
        gate_BE = None
        if self.state.record_sequences:
            gate_TE = dense_gate(gate.weight_TK.detach(), gate.expert_TK, len(gate.load_E))
            sums_BE = gate_TE.new_zeros(tokens.batch, gate_TE.shape[1]).index_add_(0, tokens.sequence_T, gate_TE)
            counts_B = gate_TE.new_zeros(tokens.batch).index_add_(0, tokens.sequence_T, tokens.real_T.to(gate_TE.dtype))
            gate_BE = sums_BE / counts_B.clamp(min=1)[:, None]
        self.state.statistics[router_index] = RouterStatistics(
            gate.load_E, probability_sum_E, gate.entropy, tokens.real_T.sum().to(gate.load_E.dtype), gate_BE
        )

    def checkpoint_contexts(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """``context_fn`` of torch.utils.checkpoint: recompute with the state this forward had, without counting twice."""
        return contextlib.nullcontext(), self._replay(self.state)

    @contextlib.contextmanager
    def _replay(self, state: RoutingState) -> Iterator[None]:
        current = self.state
        self.state = replace(state, collect=False)
        try:
            yield
        finally:
            self.state = current
