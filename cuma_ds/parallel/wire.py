"""How many bytes the expert-parallel and ZeRO collectives send.

``dispatch: auto`` and the planner decide by these numbers.

Counted is the payload that one rank sends to others. A collective that hands a shard to n - 1 ranks sends it n - 1
times. An all-reduce is a reduce-scatter and an all-gather. Names: E experts, K active, r rank, D input and O output
features, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from cuma_ds.methods.model import ExpertShapes

# Row counts are exchanged as int64.
_COUNT_BYTES = 8


class Payload(NamedTuple):
    """How the numbers of one linear are sent.

    ep_size: ranks that share the experts.  compute_bytes: bytes of a number in the forward (weights are sent in the
    activations' dtype).
    weight_bytes: bytes of a number of a trained weight (gradients are sent in the weights' dtype).  forwards: 2 with
    activation checkpointing, which runs every forward twice.  backward: False for evaluation.
    """

    ep_size: int
    compute_bytes: int
    weight_bytes: int = 4
    forwards: int = 1
    backward: bool = True


def gather_experts_bytes(experts: ExpertShapes, payload: Payload) -> dict[str, int]:
    """Bytes one rank sends, by collective, to mix one linear by moving the experts; exact."""
    moved = experts.elements // payload.ep_size * (payload.ep_size - 1)
    return _without_zeros(
        {
            "all_gather": payload.forwards * moved * payload.compute_bytes,
            "reduce_scatter": moved * payload.weight_bytes * payload.backward,
        }
    )


def all_to_all_bytes(
    experts: ExpertShapes,
    payload: Payload,
    sent: float,
    received: float,
    input_gradient: bool = True,
    masked: bool = False,
) -> dict[str, int]:
    """Bytes one rank sends, by collective, to mix one linear by moving the tokens; exact when the numbers of pairs are.

    Args:
        experts, payload: the linear's experts and how its numbers are sent.
        sent: (token, expert) pairs of this rank whose expert lives on another rank.
        received: pairs of other ranks whose expert lives here.
        input_gradient: whether the linear's input needs a gradient (the first adapted layer's does not).
        masked: whether each pair brings its share of a gradient mask.
    """
    to_expert = experts.sent_per_pair + (1 if masked else 0)
    forward = sent * to_expert + received * experts.out_features
    back = sent * experts.out_features + received * (experts.sent_per_pair if input_gradient or experts.shared_a else 0)
    counts = experts.num_experts // payload.ep_size * (payload.ep_size - 1) * _COUNT_BYTES
    numbers = payload.forwards * forward + payload.backward * back
    return _without_zeros({"all_to_all": round(numbers * payload.compute_bytes + payload.forwards * counts)})


def balanced_pairs(tokens: float, top_k: int, ep_size: int) -> float:
    """Pairs that leave a rank (and arrive there) when routing is balanced: T K (ep - 1) / ep."""
    return tokens * top_k * (ep_size - 1) / ep_size


def cheaper_dispatch(experts: ExpertShapes, payload: Payload, tokens: float, top_k: int) -> str:
    """``gather_experts`` or ``all_to_all``, whichever sends fewer bytes under balanced routing.

    Args:
        experts, payload: the linear's experts and how its numbers are sent.
        tokens: real tokens per rank, averaged over the group.
        top_k: K, experts per token.
    """
    pairs = balanced_pairs(tokens, top_k, payload.ep_size)
    gather = sum(gather_experts_bytes(experts, payload).values())
    exchange = sum(all_to_all_bytes(experts, payload, pairs, pairs).values())
    return "gather_experts" if gather <= exchange else "all_to_all"


def all_gather_bytes(shard_bytes: int, ranks: int) -> int:
    """Bytes one rank sends so that every rank gets every shard."""
    return shard_bytes * (ranks - 1)


def all_reduce_bytes(tensor_bytes: int, ranks: int) -> int:
    """Bytes one rank sends in a ring all-reduce (reduce-scatter, then all-gather)."""
    return 2 * tensor_bytes * (ranks - 1) // ranks


def _without_zeros(sent: dict[str, int]) -> dict[str, int]:
    return {collective: count for collective, count in sent.items() if count}
