"""Answers to choice questions: the probability of each option, from one forward per prompt.

Shapes: M examples, n options, R routers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cuma_ds.data.batch import EncodedExample
from cuma_ds.inference.forward import ForwardOptions, RoutingTally, asked_as, distinct, forward_batches


@dataclass(frozen=True)
class ChoicePredictions:
    """Option probabilities of M examples, and where each was routed.

    Attributes:
        probabilities: M arrays float64 [n].
        letter_mass_M: share of the next-token probability that falls on the option letters, float64 [M]. Where it is
            small, other tokens are more probable, and the options' probabilities tell little.
        gates_MRE: mean gate weight over the prompt's tokens, float32 [M, R, E]; None if not recorded.
        router_names: R names; empty if not recorded.
        routing: of all distinct prompts together.
    """

    probabilities: list[NDArray[np.float64]]
    letter_mass_M: NDArray[np.float64]
    gates_MRE: NDArray[np.float32] | None = None
    router_names: tuple[str, ...] = ()
    routing: RoutingTally = field(default_factory=RoutingTally)

    def averaged_with(self, other: ChoicePredictions) -> ChoicePredictions:
        """Means with the answers to the same questions with options in another order. The routing stays as it is."""
        pairs = zip(self.probabilities, other.probabilities, strict=True)
        mass_M = (self.letter_mass_M + other.letter_mass_M) / 2
        return replace(self, probabilities=[(p + q) / 2 for p, q in pairs], letter_mass_M=mass_M)


def predict_choices(
    model: nn.Module,
    examples: Sequence[EncodedExample],
    embeddings_NP: Tensor | None,
    batch_size: int,
    pad_id: int,
    **options: Unpack[ForwardOptions],
) -> ChoicePredictions:
    """Softmax over the option letters' logits at the last position, float32; equal prompts of equal profiles run once.

    Arguments as in :func:`cuma_ds.inference.forward.forward_batches`. ``examples`` have one target (a letter) per
    option.
    """
    asked, place = distinct(asked_as(examples, options.pop("profiles", None)), by_profile=embeddings_NP is not None)
    answers: list[NDArray[np.float64]] = [np.empty(0)] * len(asked)
    mass = np.zeros(len(asked))
    routing = RoutingTally()
    for indices, batch, logits, gates_BRE in forward_batches(
        model, asked, embeddings_NP, batch_size, pad_id, **options
    ):
        letters = logits[batch.targets.row_L, batch.targets.position_L, batch.targets.token_L].cpu()
        whole = logits.logsumexp(dim=-1)[batch.targets.row_L, batch.targets.position_L].cpu()
        rows = batch.targets.row_L.cpu()
        for row, index in enumerate(indices):
            own = rows == row
            answers[index] = torch.softmax(letters[own], dim=0).double().numpy()
            mass[index] = float((letters[own] - whole[own]).double().exp().sum())
        routing.add(model, indices, gates_BRE)
    answers_M = [answers[index] for index in place]
    return ChoicePredictions(answers_M, mass[place], routing.gates_of(place), routing.router_names, routing)
