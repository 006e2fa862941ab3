"""Bring tokens and experts together across ranks: move the tokens, or move the experts.

Shapes: T tokens, D input features, O output features, E experts, L experts on this rank, r rank, M (token, expert) pairs.
Every rank of an expert-parallel group must call ``mix`` the same number of times, with zero tokens too.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from cuma_ds.adapters.experts import Experts
from cuma_ds.adapters.mixture import GradientMask, compute_dtype, mixture
from cuma_ds.ops import GateOutput, permute_gather, permute_scatter, sort_by_expert
from cuma_ds.parallel.wire import ExpertShapes, cheaper_dispatch

DispatchKind = Literal["auto", "all_to_all", "gather_experts"]


class ExpertParallelDispatcher:
    """The distributed :class:`cuma_ds.adapters.experts.Dispatcher`.

    ``gather_experts`` all-gathers the group's (small) LoRA weights and mixes locally; ``all_to_all`` sends each token to the
    ranks that hold its experts and brings the answers back; ``auto`` takes whichever sends fewer bytes for the layer at hand
    (cuma_ds.parallel.wire).

    Args:
        kind: as above.
        group: the expert-parallel group.
        top_k: K, experts per token.
        forwards: how often a step runs each forward; 2 with activation checkpointing.

    Attributes:
        bytes_sent: payload bytes this rank sent to others, by collective, since the last :meth:`take_bytes_sent`.
        stream: the device stream that :meth:`mix` runs on, beside what else the device was given since :meth:`begin`; None for the
            caller's own.
        tokens: real tokens of this forward, averaged over the group; ``auto`` decides by it, so that all ranks decide alike.
    """

    def __init__(self, kind: DispatchKind, group: dist.ProcessGroup, top_k: int, forwards: int = 1) -> None:
        self.kind = kind
        self.group = group
        self.size = dist.get_world_size(group)
        self.top_k = top_k
        self.forwards = forwards
        self.tokens = 0.0
        self.bytes_sent: Counter[str] = Counter()
        self.stream: Any = None

    def agree_on_tokens(self, real_tokens: Tensor) -> None:
        """Tell the group how many real tokens (a scalar tensor) this rank's forward has; needed by ``auto`` alone."""
        if self.kind == "auto":
            total = real_tokens.clone()
            dist.all_reduce(total, group=self.group)
            self.tokens = float(total) / self.size

    def take_bytes_sent(self) -> dict[str, int]:
        """The counters so far; they start again at zero."""
        counted, self.bytes_sent = dict(self.bytes_sent), Counter()
        return counted

    def first_rows(self, x_TD: Tensor, experts: Experts, top_k: int) -> Tensor | None:
        """See :class:`cuma_ds.adapters.experts.Dispatcher`. Most A are elsewhere."""
        return None

    def begin(self, x_TD: Tensor) -> None:
        """See :class:`cuma_ds.adapters.experts.Dispatcher`."""
        if self.stream is not None:
            self.stream.wait_stream(torch.get_device_module(x_TD.device).current_stream())

    def mix(
        self,
        x_TD: Tensor,
        gate: GateOutput,
        experts: Experts,
        mask: GradientMask | None,
        z_TC: Tensor | None,
        frozen_TO: Tensor,
    ) -> Tensor:
        """See :class:`cuma_ds.adapters.experts.Dispatcher`."""
        if self.stream is None:
            return frozen_TO + self._mix(x_TD, gate, experts, mask)
        device = torch.get_device_module(x_TD.device)
        with device.stream(self.stream):
            y_TO = self._mix(x_TD, gate, experts, mask)
        here = device.current_stream()
        here.wait_stream(self.stream)
        if x_TD.is_cuda:
            # Memory of one stream that the other reads is not handed out again before that.
            for read in (x_TD, gate.weight_TK, gate.expert_TK, *(mask or ())):
                read.record_stream(self.stream)
            y_TO.record_stream(here)
        return frozen_TO + y_TO

    def _mix(self, x_TD: Tensor, gate: GateOutput, experts: Experts, mask: GradientMask | None) -> Tensor:
        if self._choose(experts, x_TD) == "gather_experts":
            return self._gather_experts(x_TD, gate, experts, mask)
        return self._all_to_all(x_TD, gate, experts, mask)

    def _choose(self, experts: Experts, x_TD: Tensor) -> str:
        if self.kind != "auto":
            return self.kind
        top_k = min(self.top_k, experts.num_experts)
        backward = torch.is_grad_enabled()
        return cheaper_dispatch(
            expert_shapes(experts),
            self.size,
            self.tokens,
            top_k,
            x_TD.element_size(),
            experts.lora_b.element_size(),
            forwards=self.forwards if backward else 1,
            backward=backward,
        )

    def _gather_experts(self, x_TD: Tensor, gate: GateOutput, experts: Experts, mask: GradientMask | None) -> Tensor:
        def gather(weight: Tensor) -> Tensor:
            return _GatherExperts.apply(weight, x_TD.dtype, self)

        lora_a = experts.lora_a if experts.shared_a else gather(experts.lora_a)
        return mixture(x_TD, gate.weight_TK, gate.expert_TK, lora_a, gather(experts.lora_b), experts.scaling, mask)

    def _all_to_all(self, x_TD: Tensor, gate: GateOutput, experts: Experts, mask: GradientMask | None) -> Tensor:
        local = experts.lora_b.shape[0]
        order_M, position_TK, end_E = sort_by_expert(
            gate.expert_TK, experts.num_experts
        )  # sorted by expert, so by owner
        counts_E = end_E.diff(prepend=end_E.new_zeros(1)).long()
        received_RL = torch.empty_like(counts_E).view(self.size, local)
        dist.all_to_all_single(received_RL, counts_E.view(self.size, local), group=self.group)
        self.bytes_sent["all_to_all"] += (self.size - 1) * local * counts_E.element_size()
        send = counts_E.view(self.size, local).sum(dim=1).tolist()
        by_source = received_RL.tolist()
        receive = [sum(row) for row in by_source]

        mask_M = None
        if mask is not None:
            assigned_M = order_M[: sum(send)].long()
            profile_M = mask.profile_T[assigned_M // gate.expert_TK.shape[1]]
            mask_M = mask.mask_NE[profile_M, gate.expert_TK.flatten()[assigned_M].long()].to(x_TD.dtype)
        # Weights and transport in the dtype of x, products in the compute dtype.
        compute, lora_a, lora_b = compute_dtype(x_TD), experts.lora_a.to(x_TD.dtype), experts.lora_b.to(x_TD.dtype)
        if not experts.shared_a:
            payload = permute_gather(x_TD, order_M, position_TK)[: sum(send)]
        elif mask_M is None:
            z_TR = _linear(x_TD.to(compute), lora_a, None)
            payload = permute_gather(z_TR.to(x_TD.dtype), order_M, position_TK)[: sum(send)]
        else:
            rows = permute_gather(x_TD, order_M, position_TK)[: sum(send)]
            payload = _linear(rows.to(compute), lora_a, mask_M).to(x_TD.dtype)

        def exchange(rows: Tensor, sizes_out: list[int], sizes_in: list[int]) -> Tensor:
            return _Exchange.apply(rows, sizes_out, sizes_in, self)

        arrived = exchange(payload, send, receive)
        arrived_mask = None if mask_M is None else exchange(mask_M[:, None], send, receive)[:, 0]
        order, sizes = _by_expert(by_source, arrived.device)
        masks = [None] * local if arrived_mask is None else arrived_mask[order].split(sizes)
        answers = []
        for i, (rows, m) in enumerate(zip(arrived[order].to(compute).split(sizes), masks, strict=True)):
            z = rows if experts.shared_a else _linear(rows, lora_a[i], m)
            answers.append(_linear(z, lora_b[i], m))
        returned = exchange(torch.cat(answers)[order.argsort()].to(x_TD.dtype), receive, send)
        unsent = returned.new_zeros(len(order_M) - len(returned), returned.shape[1])
        return permute_scatter(torch.cat([returned, unsent]), order_M, position_TK, experts.scaling * gate.weight_TK)


def expert_shapes(experts: Experts) -> ExpertShapes:
    """Sizes of one linear's experts over all ranks."""
    out_features, rank = experts.lora_b.shape[1:]
    return ExpertShapes(experts.num_experts, rank, experts.lora_a.shape[-1], out_features, experts.shared_a)


def _linear(x: Tensor, weight: Tensor, mask_M: Tensor | None) -> Tensor:
    """x W^T in the dtype of ``x``; with a mask, row m sends only ``mask[m]`` of its gradient to the weight."""
    weight = weight.to(x.dtype)
    if mask_M is None:
        return F.linear(x, weight)
    learned = F.linear(x.detach(), weight) * mask_M[:, None]
    return F.linear(x, weight.detach()) + (learned - learned.detach())


def _by_expert(by_source: list[list[int]], device: torch.device) -> tuple[Tensor, list[int]]:
    """Order that sorts arrived rows (by source, then expert) by expert, and the number of rows per expert."""
    experts = torch.arange(len(by_source[0])).repeat(len(by_source))
    labels = experts.repeat_interleave(torch.tensor(by_source).flatten())
    return labels.argsort(stable=True).to(device), [sum(column) for column in zip(*by_source, strict=True)]


class _GatherExperts(torch.autograd.Function):
    """All-gather along the expert dimension in the compute dtype; the gradient is reduce-scattered in the weight's dtype."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype, dispatcher: ExpertParallelDispatcher) -> Tensor:
        ctx.dispatcher, ctx.dtype, ctx.local = dispatcher, weight.dtype, weight.shape[0]
        shard = weight.to(dtype).contiguous()
        whole = shard.new_empty(shard.shape[0] * dispatcher.size, *shard.shape[1:])
        dist.all_gather_into_tensor(whole, shard, group=dispatcher.group)
        dispatcher.bytes_sent["all_gather"] += shard.numel() * shard.element_size() * (dispatcher.size - 1)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dispatcher: ExpertParallelDispatcher = ctx.dispatcher
        whole = grads[0].to(ctx.dtype).contiguous()
        shard = whole.new_empty(ctx.local, *whole.shape[1:])
        dist.reduce_scatter_tensor(shard, whole, group=dispatcher.group)
        dispatcher.bytes_sent["reduce_scatter"] += shard.numel() * shard.element_size() * (dispatcher.size - 1)
        return shard, None, None


class _Exchange(torch.autograd.Function):
    """All-to-all of rows; the gradient travels back the same way."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send: list[int], receive: list[int], dispatcher: ExpertParallelDispatcher
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.dispatcher = send, receive, dispatcher
        return _exchange(rows, send, receive, dispatcher)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grads[0], ctx.receive, ctx.send, ctx.dispatcher), None, None, None


def _exchange(rows: Tensor, send: list[int], receive: list[int], dispatcher: ExpertParallelDispatcher) -> Tensor:
    arrived = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), receive, send, group=dispatcher.group)
    elsewhere = sum(send) - send[dist.get_rank(dispatcher.group)]
    dispatcher.bytes_sent["all_to_all"] += elsewhere * rows.shape[1:].numel() * rows.element_size()
    return arrived
