"""How many bytes the expert-parallel and ZeRO collectives send: the model that ``dispatch: auto`` and the planner decide by.

Counted is the payload that one rank sends to others: a collective that hands a shard to n - 1 ranks sends it n - 1 times, an
all-reduce is a reduce-scatter and an all-gather. Names: E experts, K active, r rank, D input and O output features, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

# Row counts are exchanged as int64.
_COUNT_BYTES = 8


@dataclass(frozen=True)
class ExpertShapes:
    """The experts of one adapted linear, over all ranks."""

    num_experts: int
    lora_r: int
    in_features: int
    out_features: int
    shared_a: bool

    @property
    def elements(self) -> int:
        """Numbers in all experts that live on one rank only (a shared A lives on every rank)."""
        return self.num_experts * self.lora_r * (self.out_features + (0 if self.shared_a else self.in_features))

    @property
    def sent_per_pair(self) -> int:
        """Numbers that travel to an expert for one (token, expert) pair: x, or A x where A is shared."""
        return self.lora_r if self.shared_a else self.in_features


def gather_experts_bytes(
    experts: ExpertShapes,
    ep_size: int,
    compute_bytes: int,
    weight_bytes: int = 4,
    forwards: int = 1,
    backward: bool = True,
) -> dict[str, int]:
    """Bytes one rank sends to mix one linear by moving the experts; exact.

    Args:
        experts: the linear's experts.
        ep_size: ranks that share them.
        compute_bytes: bytes of a number in the forward (weights travel in the activations' dtype).
        weight_bytes: bytes of a number of a trained weight (gradients travel in the weights' dtype).
        forwards: 2 with activation checkpointing, which runs every forward twice.
        backward: False for evaluation.
    """
    moved = experts.elements // ep_size * (ep_size - 1)
    return _without_zeros(
        {"all_gather": forwards * moved * compute_bytes, "reduce_scatter": moved * weight_bytes * backward}
    )


def all_to_all_bytes(
    experts: ExpertShapes,
    ep_size: int,
    compute_bytes: int,
    sent: float,
    received: float,
    forwards: int = 1,
    backward: bool = True,
    input_gradient: bool = True,
    masked: bool = False,
) -> dict[str, int]:
    """Bytes one rank sends to mix one linear by moving the tokens; exact when the numbers of pairs are.

    Args:
        experts, ep_size, compute_bytes, forwards, backward: as in :func:`gather_experts_bytes`.
        sent: (token, expert) pairs of this rank whose expert lives on another rank.
        received: pairs of other ranks whose expert lives here.
        input_gradient: whether the linear's input needs a gradient (the first adapted layer's does not).
        masked: whether a gradient mask travels along.
    """
    to_expert = experts.sent_per_pair + (1 if masked else 0)
    forward = sent * to_expert + received * experts.out_features
    back = sent * experts.out_features + received * (experts.sent_per_pair if input_gradient or experts.shared_a else 0)
    counts = experts.num_experts // ep_size * (ep_size - 1) * _COUNT_BYTES
    return _without_zeros(
        {"all_to_all": round(forwards * (forward * compute_bytes + counts) + back * compute_bytes * backward)}
    )


def balanced_pairs(tokens: float, top_k: int, ep_size: int) -> float:
    """Pairs that leave a rank (and arrive there) when routing is balanced: T K (ep - 1) / ep."""
    return tokens * top_k * (ep_size - 1) / ep_size


def cheaper_dispatch(
    experts: ExpertShapes,
    ep_size: int,
    tokens: float,
    top_k: int,
    compute_bytes: int,
    weight_bytes: int = 4,
    forwards: int = 1,
    backward: bool = True,
) -> str:
    """``gather_experts`` or ``all_to_all``, whichever sends fewer bytes under balanced routing.

    Args:
        tokens: real tokens per rank, averaged over the group.
    """
    pairs = balanced_pairs(tokens, top_k, ep_size)
    gather = sum(gather_experts_bytes(experts, ep_size, compute_bytes, weight_bytes, forwards, backward).values())
    exchange = sum(all_to_all_bytes(experts, ep_size, compute_bytes, pairs, pairs, forwards, backward).values())
    return "gather_experts" if gather <= exchange else "all_to_all"


def all_gather_bytes(shard_bytes: int, ranks: int) -> int:
    """Bytes one rank sends so that every rank gets every shard."""
    return shard_bytes * (ranks - 1)


def all_reduce_bytes(tensor_bytes: int, ranks: int) -> int:
    """Bytes one rank sends in a ring all-reduce (reduce-scatter, then all-gather)."""
    return 2 * tensor_bytes * (ranks - 1) // ranks


def _without_zeros(sent: dict[str, int]) -> dict[str, int]:
    return {collective: count for collective, count in sent.items() if count}
