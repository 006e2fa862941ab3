"""Bring tokens and experts of different ranks together: send the tokens, or send the experts' weights.

The maths is in cuma_ds.adapters.mixture. With ``overlap`` every collective runs beside what lies between its start and
the wait for its result: the frozen product, in the forward and in the backward pass.

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
from cuma_ds.adapters.pairs import Pairs, rows_of_pairs, sort_by_expert
from cuma_ds.methods.cuma import shapes_of
from cuma_ds.parallel.wire import Payload, cheaper_dispatch

DispatchKind = Literal["auto", "all_to_all", "gather_experts"]


class ExpertGroup:
    """The ranks that share the experts, and what this rank has sent to the others.

    Args:
        group: the expert-parallel group.
        overlap: start collectives and wait for them where their result is read. False waits at once.

    Attributes:
        bytes_sent: payload bytes this rank sent to others, by collective.
        bytes_to: the same bytes by the rank (of all ranks) that they were sent to.
    """

    def __init__(self, group: dist.ProcessGroup, overlap: bool = False) -> None:
        self.group = group
        self.overlap = overlap
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.bytes_sent: Counter[str] = Counter()
        self.bytes_to: Counter[int] = Counter()
        self._ranks = dist.get_process_group_ranks(group)

    def take_bytes_to(self) -> dict[int, int]:
        """Payload bytes sent to each other rank since the last call."""
        counted, self.bytes_to = dict(self.bytes_to), Counter()
        return counted

    def _count(self, collective: str, sent: list[int]) -> None:
        """Count bytes sent to each rank of the group; those to this rank itself are left out."""
        for place, (rank, count) in enumerate(zip(self._ranks, sent, strict=True)):
            if place != self.rank:
                self.bytes_sent[collective] += count
                self.bytes_to[rank] += count

    def all_to_all(self, rows: Tensor, send: list[int], receive: list[int]) -> _Running:
        """Send ``send[rank]`` rows to every rank and receive ``receive[rank]`` rows from it."""
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        row_bytes = rows.shape[1:].numel() * rows.element_size()
        self._count("all_to_all", [count * row_bytes for count in send])
        rows = rows.contiguous()
        work = dist.all_to_all_single(received, rows, receive, send, group=self.group, async_op=self.overlap)
        return _Running(received, rows, work)

    def all_gather(self, shard: Tensor) -> _Running:
        """The shards of all ranks along dimension 0."""
        shard = shard.contiguous()
        whole = shard.new_empty(shard.shape[0] * self.size, *shard.shape[1:])
        self._count("all_gather", [shard.numel() * shard.element_size()] * self.size)
        work = dist.all_gather_into_tensor(whole, shard, group=self.group, async_op=self.overlap)
        return _Running(whole, shard, work)

    def reduce_scatter(self, whole: Tensor) -> _Running:
        """This rank's shard along dimension 0 of the sum over ranks."""
        whole = whole.contiguous()
        shard = whole.new_empty(whole.shape[0] // self.size, *whole.shape[1:])
        self._count("reduce_scatter", [shard.numel() * shard.element_size()] * self.size)
        work = dist.reduce_scatter_tensor(shard, whole, group=self.group, async_op=self.overlap)
        return _Running(shard, whole, work)


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
        return _SentWeights(x_TI, routes, experts, lora_a, self._gather(experts.lora_b, x_TI.dtype))

    def combine(self, y_MO: Tensor, sent: Dispatched) -> Tensor:
        """See :class:`cuma_ds.adapters.experts.Dispatcher`."""
        return y_MO

    def _gather(self, weight: Tensor, dtype: torch.dtype) -> _Pending:
        return _start(weight, _GatherWeight(self.ranks, dtype, weight.dtype))


class AllToAll(ExpertParallelDispatcher):
    """Sends each token to the ranks that hold its experts, and their answers back."""

    def dispatch(self, x_TI: Tensor, routes: Routes, experts: Experts) -> Dispatched:
        """See :class:`cuma_ds.adapters.experts.Dispatcher`. The host waits for the row counts."""
        pairs = sort_by_expert(routes.expert_TK, experts.num_experts)  # and so by rank
        counts_RL = pairs.end_E.diff(prepend=pairs.end_E.new_zeros(1)).long().view(self.ranks.size, -1)
        per_rank = [1] * self.ranks.size
        by_source = self.ranks.all_to_all(counts_RL, per_rank, per_rank).wait().tolist()
        send, receive = counts_RL.sum(dim=1).tolist(), [sum(row) for row in by_source]

        def gather(rows: Tensor) -> Tensor:
            return rows_of_pairs(rows, pairs)[: sum(send)]

        share_M1 = None
        if routes.share_TK is not None:
            share_M1 = routes.share_TK.flatten()[pairs.order_M[: sum(send)], None].to(x_TI.dtype)
        if not experts.shared_a:
            payload = gather(x_TI)
        elif share_M1 is None:
            payload = gather(times_a(x_TI, experts.lora_a).to(x_TI.dtype))
        else:
            value = gather(times_a(x_TI, experts.lora_a.detach()).to(x_TI.dtype))
            learner = gather(times_a(x_TI.detach(), experts.lora_a).to(x_TI.dtype))
            payload = with_gradient_of(value, share_M1 * learner)
        rows = _start(payload, _ExchangeRows(self.ranks, send, receive))
        share = None if share_M1 is None else _start(share_M1, _ExchangeRows(self.ranks, send, receive))
        back = _Return(_ExchangeRows(self.ranks, receive, send), pairs, routes.weight_TK)
        return _SentRows(rows, share, experts, by_source, back)

    def combine(self, y_MO: Tensor, sent: Dispatched) -> Tensor:
        """See :class:`cuma_ds.adapters.experts.Dispatcher`."""
        assert isinstance(sent, _SentRows)
        exchange, pairs, weight_TK = sent.back
        answers = _start(y_MO, exchange).wait()
        unsent = answers.new_zeros(len(pairs.order_M) - len(answers), answers.shape[1])
        y_MO = torch.cat([answers, unsent]).index_select(0, pairs.position_TK.flatten())
        return (y_MO.view(*weight_TK.shape, -1) * weight_TK[:, :, None]).sum(dim=1).to(answers.dtype)


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
        return (self.exchange if isinstance(sent, _SentRows) else self.gather).combine(y_MO, sent)

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
class _SentWeights:
    """The rows of this rank, and the weights of all ranks once they are gathered."""

    x_TI: Tensor
    routes: Routes
    experts: Experts
    lora_a: _Pending | None
    lora_b: _Pending

    def wait(self) -> MixtureInputs:
        lora_a = self.experts.lora_a if self.lora_a is None else self.lora_a.wait()
        return MixtureInputs(self.x_TI, self.routes, ExpertWeights(lora_a, self.lora_b.wait()))


class _Return(NamedTuple):
    """How the experts' answers are sent back and summed per token."""

    exchange: _ExchangeRows
    pairs: Pairs
    weight_TK: Tensor


@dataclass(frozen=True)
class _SentRows:
    """The rows for this rank's experts. by_source: [ranks, L] number of rows from each rank for each expert."""

    rows: _Pending
    share: _Pending | None
    experts: Experts
    by_source: list[list[int]]
    back: _Return

    def wait(self) -> MixtureInputs:
        """The received rows with K = 1: each is for one expert of this rank, with weight 1."""
        rows = self.rows.wait()
        expert_L = torch.arange(len(self.by_source[0]), dtype=torch.int32).repeat(len(self.by_source))
        expert_M = expert_L.repeat_interleave(torch.tensor(self.by_source).flatten()).to(rows.device)
        weight_M1 = torch.ones(len(rows), 1, device=rows.device)
        routes = Routes(weight_M1, expert_M[:, None], None if self.share is None else self.share.wait())
        if self.experts.shared_a:
            return MixtureInputs(rows, routes, ExpertWeights(None, self.experts.lora_b))
        return MixtureInputs(rows, routes)


class _Running(NamedTuple):
    """A collective that may still be running. sent: its input, which must live until it is done."""

    result: Tensor
    sent: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.result


class _Collective:
    """A collective, and the one that its gradient takes. Each is started in one place and waited for in another."""

    running: _Running

    def forward(self, tensor: Tensor) -> _Running:
        raise NotImplementedError

    def backward(self, gradient: Tensor) -> _Running:
        raise NotImplementedError


@dataclass
class _ExchangeRows(_Collective):
    """All-to-all of rows."""

    ranks: ExpertGroup
    send: list[int]
    receive: list[int]

    def forward(self, tensor: Tensor) -> _Running:
        return self.ranks.all_to_all(tensor, self.send, self.receive)

    def backward(self, gradient: Tensor) -> _Running:
        return self.ranks.all_to_all(gradient, self.receive, self.send)


@dataclass
class _GatherWeight(_Collective):
    """All-gather of a weight in the dtype of x. Its gradient is reduce-scattered in the dtype of the weight."""

    ranks: ExpertGroup
    dtype: torch.dtype
    weight_dtype: torch.dtype

    def forward(self, tensor: Tensor) -> _Running:
        return self.ranks.all_gather(tensor.to(self.dtype))

    def backward(self, gradient: Tensor) -> _Running:
        return self.ranks.reduce_scatter(gradient.to(self.weight_dtype))


class _Pending(NamedTuple):
    """A tensor that must not be read before :meth:`wait`."""

    tensor: Tensor
    collective: _Collective

    def wait(self) -> Tensor:
        return _Finish.apply(self.tensor, self.collective)


def _start(tensor: Tensor, collective: _Collective) -> _Pending:
    return _Pending(_Start.apply(tensor, collective), collective)


class _Context(Protocol):
    """What torch gives to the forward and the backward of the two functions below."""

    collective: _Collective


class _Start(torch.autograd.Function):
    """Starts a collective. The backward pass waits here for the gradient's collective.

    What lies between start and finish in the forward lies between them in the backward, so both overlap with it.
    """

    @staticmethod
    def forward(ctx: _Context, tensor: Tensor, collective: _Collective) -> Tensor:
        ctx.collective, collective.running = collective, collective.forward(tensor)
        return collective.running.result

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor, None]:
        gradient = ctx.collective.running.wait()
        del ctx.collective.running
        return gradient, None


class _Finish(torch.autograd.Function):
    """Waits for a collective. The backward pass starts the gradient's collective here.

    Its result comes out of :class:`_Start`, because autograd takes only a gradient of the input's shape from here.
    """

    @staticmethod
    def forward(ctx: _Context, pending: Tensor, collective: _Collective) -> Tensor:
        ctx.collective, result = collective, collective.running.wait()
        del collective.running
        return result.view_as(result)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.collective.running = ctx.collective.backward(grads[0])
        return grads[0], None
