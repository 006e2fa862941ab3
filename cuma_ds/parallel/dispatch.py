"""Bring tokens and experts of different ranks together: move the tokens, or move the experts.

The maths is in cuma_ds.adapters.mixture.

Shapes: T tokens, I input features, O output features, E experts, L experts on this rank, r rank, M (token, expert)
pairs. Every rank of an expert-parallel group must call ``dispatch`` and ``combine`` the same number of times, with zero
tokens too.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from cuma_ds.adapters.experts import Dispatched, Dispatcher, Experts, ExpertWeights, MixtureInputs
from cuma_ds.adapters.mixture import Routes, times_a, with_gradient_of
from cuma_ds.methods.cuma import shapes_of
from cuma_ds.ops import permute_gather, permute_scatter, sort_by_expert
from cuma_ds.parallel.wire import Payload, cheaper_dispatch

DispatchKind = Literal["auto", "all_to_all", "gather_experts"]


class ExpertGroup:
    """The ranks that share the experts, and what this rank has sent to the others.

    Args:
        group: the expert-parallel group.
        overlap: start collectives and wait for them where their result is read. False waits at once.

    Attributes:
        bytes_sent: payload bytes this rank sent to others, by collective.
    """

    def __init__(self, group: dist.ProcessGroup, overlap: bool = False) -> None:
        self.group = group
        self.overlap = overlap
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.bytes_sent: Counter[str] = Counter()

    def all_to_all(self, rows: Tensor, send: list[int], receive: list[int]) -> _Arriving:
        """Send ``send[rank]`` rows to every rank: [sum(receive), *]."""
        arriving = rows.new_empty(sum(receive), *rows.shape[1:])
        elsewhere = sum(send) - send[self.rank]
        self.bytes_sent["all_to_all"] += elsewhere * rows.shape[1:].numel() * rows.element_size()
        rows = rows.contiguous()
        work = dist.all_to_all_single(arriving, rows, receive, send, group=self.group, async_op=self.overlap)
        return _Arriving(arriving, rows, work)

    def all_gather(self, shard: Tensor) -> _Arriving:
        """The shards of all ranks along dimension 0."""
        shard = shard.contiguous()
        whole = shard.new_empty(shard.shape[0] * self.size, *shard.shape[1:])
        self.bytes_sent["all_gather"] += shard.numel() * shard.element_size() * (self.size - 1)
        work = dist.all_gather_into_tensor(whole, shard, group=self.group, async_op=self.overlap)
        return _Arriving(whole, shard, work)

    def reduce_scatter(self, whole: Tensor) -> _Arriving:
        """This rank's shard along dimension 0 of the sum over ranks."""
        whole = whole.contiguous()
        shard = whole.new_empty(whole.shape[0] // self.size, *whole.shape[1:])
        self.bytes_sent["reduce_scatter"] += shard.numel() * shard.element_size() * (self.size - 1)
        work = dist.reduce_scatter_tensor(shard, whole, group=self.group, async_op=self.overlap)
        return _Arriving(shard, whole, work)


class ExpertParallelDispatcher(Dispatcher):
    """What the dispatchers that cross ranks have in common."""

    def __init__(self, ranks: ExpertGroup) -> None:
        self.ranks = ranks

    def take_bytes_sent(self) -> dict[str, int]:
        """Payload bytes this rank sent to others, by collective, since the last call."""
        counted, self.ranks.bytes_sent = dict(self.ranks.bytes_sent), Counter()
        return counted

    def agree_on_tokens(self, real_tokens: Tensor) -> None:
        """Tell the group how many real tokens (a scalar tensor) this rank's forward has.

        ``auto`` alone asks for them.
        """


class GatherExperts(ExpertParallelDispatcher):
    """All-gathers the group's (small) LoRA weights in the dtype of x, and mixes this rank's tokens here."""

    def dispatch(self, x_TI: Tensor, routes: Routes, experts: Experts) -> Dispatched:
        """See :class:`cuma_ds.adapters.experts.Dispatcher`."""
        lora_a = None if experts.shared_a else self._gather(experts.lora_a, x_TI.dtype)
        return _Weights(x_TI, routes, experts, lora_a, self._gather(experts.lora_b, x_TI.dtype))

    def combine(self, y_MO: Tensor, sent: Dispatched) -> Tensor:
        """See :class:`cuma_ds.adapters.experts.Dispatcher`."""
        return y_MO

    def _gather(self, weight: Tensor, dtype: torch.dtype) -> _InFlight:
        return _depart(weight, _Gathering(self.ranks, dtype, weight.dtype))


class AllToAll(ExpertParallelDispatcher):
    """Sends each token to the ranks that hold its experts, and their answers back."""

    def dispatch(self, x_TI: Tensor, routes: Routes, experts: Experts) -> Dispatched:
        """See :class:`cuma_ds.adapters.experts.Dispatcher`. The host waits for the row counts."""
        order_M, position_TK, end_E = sort_by_expert(routes.expert_TK, experts.num_experts)  # by owner, too
        counts_RL = end_E.diff(prepend=end_E.new_zeros(1)).long().view(self.ranks.size, -1)
        per_rank = [1] * self.ranks.size
        by_source = self.ranks.all_to_all(counts_RL, per_rank, per_rank).wait().tolist()
        send, receive = counts_RL.sum(dim=1).tolist(), [sum(row) for row in by_source]

        def gather(rows: Tensor) -> Tensor:
            return permute_gather(rows, order_M, position_TK)[: sum(send)]

        share_M1 = None
        if routes.share_TK is not None:
            share_T1 = routes.share_TK.reshape(-1, 1).to(x_TI.dtype)
            share_M1 = permute_gather(share_T1, order_M, position_TK.reshape(-1, 1))[: sum(send)]
        if not experts.shared_a:
            payload = gather(x_TI)
        elif share_M1 is None:
            payload = gather(times_a(x_TI, experts.lora_a).to(x_TI.dtype))
        else:
            value = gather(times_a(x_TI, experts.lora_a.detach()).to(x_TI.dtype))
            learner = gather(times_a(x_TI.detach(), experts.lora_a).to(x_TI.dtype))
            payload = with_gradient_of(value, share_M1 * learner)
        there = _Exchange(self.ranks, send, receive)
        share = None if share_M1 is None else _depart(share_M1, _Exchange(self.ranks, send, receive))
        return _Rows(_depart(payload, there), share, experts, by_source, _Way(there, routes, order_M, position_TK))

    def combine(self, y_MO: Tensor, sent: Dispatched) -> Tensor:
        """See :class:`cuma_ds.adapters.experts.Dispatcher`."""
        assert isinstance(sent, _Rows)
        there, routes, order_M, position_TK = sent.way
        answers = _depart(y_MO, _Exchange(self.ranks, there.receive, there.send)).arrive()
        unsent = answers.new_zeros(len(order_M) - len(answers), answers.shape[1])
        return permute_scatter(torch.cat([answers, unsent]), order_M, position_TK, routes.weight_TK)


class CheaperDispatch(ExpertParallelDispatcher):
    """``auto``: for each layer, the one of the two that sends fewer bytes (cuma_ds.parallel.wire).

    Args:
        ranks: as above.
        top_k: K, experts per token.
        forwards: how often a step runs each forward; 2 with activation checkpointing.
    """

    def __init__(self, ranks: ExpertGroup, top_k: int, forwards: int = 1) -> None:
        super().__init__(ranks)
        self.top_k = top_k
        self.forwards = forwards
        self.tokens = 0.0
        self.gather = GatherExperts(ranks)
        self.exchange = AllToAll(ranks)

    def dispatch(self, x_TI: Tensor, routes: Routes, experts: Experts) -> Dispatched:
        """See :class:`cuma_ds.adapters.experts.Dispatcher`."""
        backward = torch.is_grad_enabled()
        payload = Payload(
            self.ranks.size,
            compute_bytes=x_TI.element_size(),
            weight_bytes=experts.lora_b.element_size(),
            forwards=self.forwards if backward else 1,
            backward=backward,
        )
        kind = cheaper_dispatch(shapes_of(experts), payload, self.tokens, min(self.top_k, experts.num_experts))
        chosen = self.gather if kind == "gather_experts" else self.exchange
        return chosen.dispatch(x_TI, routes, experts)

    def combine(self, y_MO: Tensor, sent: Dispatched) -> Tensor:
        """See :class:`cuma_ds.adapters.experts.Dispatcher`."""
        return (self.exchange if isinstance(sent, _Rows) else self.gather).combine(y_MO, sent)

    def agree_on_tokens(self, real_tokens: Tensor) -> None:
        """Average the number of real tokens (a scalar tensor) over the group, so that all its ranks choose alike."""
        total = real_tokens.clone()
        dist.all_reduce(total, group=self.ranks.group)
        self.tokens = float(total) / self.ranks.size


def make_dispatcher(kind: DispatchKind, ranks: ExpertGroup, top_k: int, forwards: int = 1) -> ExpertParallelDispatcher:
    """The dispatcher that ``parallel.dispatch`` names. The last two arguments are those of :class:`CheaperDispatch`."""
    if kind == "auto":
        return CheaperDispatch(ranks, top_k, forwards)
    return GatherExperts(ranks) if kind == "gather_experts" else AllToAll(ranks)


@dataclass(frozen=True)
class _Weights:
    """Weights on their way to this rank's rows."""

    x_TI: Tensor
    routes: Routes
    experts: Experts
    lora_a: _InFlight | None
    lora_b: _InFlight

    def arrive(self) -> MixtureInputs:
        lora_a = self.experts.lora_a if self.lora_a is None else self.lora_a.arrive()
        return MixtureInputs(self.x_TI, self.routes, ExpertWeights(lora_a, self.lora_b.arrive()))


class _Way(NamedTuple):
    """How rows were sent, so that the answers find back."""

    there: _Exchange
    routes: Routes
    order_M: Tensor
    position_TK: Tensor


@dataclass(frozen=True)
class _Rows:
    """Rows on their way to this rank's experts. by_source: [ranks, L] how many rows of each rank for each expert."""

    rows: _InFlight
    share: _InFlight | None
    experts: Experts
    by_source: list[list[int]]
    way: _Way

    def arrive(self) -> MixtureInputs:
        """The rows with K = 1: every row is for one expert of this rank, with weight 1."""
        rows = self.rows.arrive()
        expert_L = torch.arange(len(self.by_source[0]), dtype=torch.int32).repeat(len(self.by_source))
        expert_M = expert_L.repeat_interleave(torch.tensor(self.by_source).flatten()).to(rows.device)
        weight_M1 = torch.ones(len(rows), 1, device=rows.device)
        routes = Routes(weight_M1, expert_M[:, None], None if self.share is None else self.share.arrive())
        if self.experts.shared_a:
            return MixtureInputs(rows, routes, ExpertWeights(None, self.experts.lora_b))
        return MixtureInputs(rows, routes)


class _Arriving(NamedTuple):
    """The result of a collective that may still be running. sent: kept alive until it is done."""

    tensor: Tensor
    sent: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.tensor


class _Trip:
    """A collective, and the one that brings its gradient back.

    Each is started in one place and waited for in another.
    """

    arriving: _Arriving

    def there(self, tensor: Tensor) -> _Arriving:
        raise NotImplementedError

    def back(self, gradient: Tensor) -> _Arriving:
        raise NotImplementedError


@dataclass
class _Exchange(_Trip):
    """All-to-all of rows."""

    ranks: ExpertGroup
    send: list[int]
    receive: list[int]

    def there(self, tensor: Tensor) -> _Arriving:
        return self.ranks.all_to_all(tensor, self.send, self.receive)

    def back(self, gradient: Tensor) -> _Arriving:
        return self.ranks.all_to_all(gradient, self.receive, self.send)


@dataclass
class _Gathering(_Trip):
    """All-gather of a weight in the dtype of x. Its gradient is reduce-scattered in the dtype of the weight."""

    ranks: ExpertGroup
    dtype: torch.dtype
    weight_dtype: torch.dtype

    def there(self, tensor: Tensor) -> _Arriving:
        return self.ranks.all_gather(tensor.to(self.dtype))

    def back(self, gradient: Tensor) -> _Arriving:
        return self.ranks.reduce_scatter(gradient.to(self.weight_dtype))


class _InFlight(NamedTuple):
    """A tensor that must not be read before :meth:`arrive`."""

    tensor: Tensor
    trip: _Trip

    def arrive(self) -> Tensor:
        return _Finish.apply(self.tensor, self.trip)


def _depart(tensor: Tensor, trip: _Trip) -> _InFlight:
    return _InFlight(_Start.apply(tensor, trip), trip)


class _Context(Protocol):
    """What torch gives to the forward and the backward of the two functions below."""

    trip: _Trip


class _Start(torch.autograd.Function):
    """Starts a trip; in the backward pass, waits for its gradient.

    What lies between start and finish in the forward lies between them in the backward, so both overlap with it.
    """

    @staticmethod
    def forward(ctx: _Context, tensor: Tensor, trip: _Trip) -> Tensor:
        ctx.trip, trip.arriving = trip, trip.there(tensor)
        return trip.arriving.tensor

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor, None]:
        gradient = ctx.trip.arriving.wait()
        del ctx.trip.arriving
        return gradient, None


class _Finish(torch.autograd.Function):
    """Waits for a trip; in the backward pass, starts the return of the gradient.

    The gradient itself comes out of :class:`_Start`: autograd takes only tensors of the arrived shape from here.
    """

    @staticmethod
    def forward(ctx: _Context, arriving: Tensor, trip: _Trip) -> Tensor:
        ctx.trip, tensor = trip, trip.arriving.wait()
        del trip.arriving
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.trip.arriving = ctx.trip.back(grads[0])
        return grads[0], None
