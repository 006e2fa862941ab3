"""How probable a model holds the chosen and the rejected answer of held-out preferences.

Shapes: M pairs of answers, R routers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cuma_ds.data.batch import EncodedExample
from cuma_ds.inference.forward import ForwardOptions, RoutingTally, asked_as, distinct, forward_batches

Array = NDArray[np.float64]
# The chosen answer, and the rejected one to the same conversation.
Pair = tuple[EncodedExample, EncodedExample]


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of both answers of M pairs, the chosen one first, and where each pair was routed.

    Attributes:
        logps_M2: log p(answer | conversation, profile) in nats, summed over the answer's tokens, float64 [M, 2].
        tokens_M2: number of those tokens, float64 [M, 2].
        gates_MRE: mean gate weight over the tokens of both sequences, float32 [M, R, E]; None if not recorded.
        routing: of all distinct sequences together.
    """

    logps_M2: Array
    tokens_M2: Array
    gates_MRE: NDArray[np.float32] | None = None
    routing: RoutingTally = field(default_factory=RoutingTally)


def pair_log_probabilities(
    model: nn.Module,
    pairs: Sequence[Pair],
    embeddings_NP: Tensor | None,
    batch_size: int,
    pad_id: int,
    **options: Unpack[ForwardOptions],
) -> PairLogps:
    """Log-probabilities of M pairs, in float32 before they are summed.

    Equal sequences of equal profiles run once, even where the model does not see the profile: all contenders then run
    the same batches, and adapters that change nothing tie with their backbone exactly.

    Arguments as in :func:`cuma_ds.inference.forward.forward_batches`; ``batch_size`` counts sequences, and
    ``profiles`` has one row per pair.
    """
    profiles = options.pop("profiles", None)
    both = None if profiles is None else [profile for profile in profiles for _ in range(2)]
    answers = asked_as([answer for pair in pairs for answer in pair], both)
    asked, place = distinct(answers, by_profile=True)
    logps, routing = np.zeros(len(asked)), RoutingTally()
    for indices, batch, logits, gates_BRE in forward_batches(
        model, asked, embeddings_NP, batch_size, pad_id, **options
    ):
        weighted_L = batch.targets.log_probabilities(logits) * batch.targets.weight_L
        logps_B = torch.zeros(len(indices), dtype=torch.float64)
        logps_B.index_add_(0, batch.targets.example_L.cpu(), weighted_L.double().cpu())
        logps[indices] = logps_B.numpy()
        routing.add(model, indices, gates_BRE)
    tokens = np.array([sum(example.target_weight) for example in asked])
    gates = routing.gates_of(place)
    gates_MRE = None if gates is None else gates.reshape(-1, 2, *gates.shape[1:]).mean(axis=1)
    return PairLogps(logps[place].reshape(-1, 2), tokens[place].reshape(-1, 2), gates_MRE, routing)
