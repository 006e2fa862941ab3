"""What a model answers to choice questions: the probability of each option, from one forward per prompt.

Shapes: M examples, n options, N profiles, P profile width, R routers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cuma_ds.data.batching import EncodedExample
from cuma_ds.evaluation.forward import Progress, forward_batches


@dataclass(frozen=True)
class ChoicePredictions:
    """Option probabilities of M examples, and where each was routed.

    Attributes:
        probabilities: M arrays float64 [n].
        gates_MRE: mean gate weight over the prompt's tokens, float32 [M, R, E]; None if not recorded.
        router_names: R names; empty if not recorded.
    """

    probabilities: list[NDArray[np.float64]]
    gates_MRE: NDArray[np.float32] | None = None
    router_names: tuple[str, ...] = ()


def predict_choices(
    model: Any,
    examples: Sequence[EncodedExample],
    embeddings_NP: Tensor | None,
    batch_size: int,
    pad_id: int,
    device: torch.device | str = "cpu",
    profiles: Sequence[int] | None = None,
    record: bool = False,
    progress: Progress | None = None,
) -> ChoicePredictions:
    """Softmax over the option letters' logits at the last position, float32; equal prompts of equal profiles run once.

    Args:
        model: in eval mode.
        examples: encoded choice questions, one target (a letter) per option.
        embeddings_NP: raw profile embeddings [N, P]; None where the model takes none (then equal prompts have equal answers).
        batch_size: prompts per forward; does not change the result.
        profiles: rows of ``embeddings_NP`` to ask as, instead of the examples' own (the prompts stay as they are).
        record: also collect the routing.
        progress: called with (prompts done, prompts in all).
    """
    if profiles is not None:
        examples = [replace(example, profile=profile) for example, profile in zip(examples, profiles, strict=True)]
    first: dict[tuple, int] = {}
    distinct: list[EncodedExample] = []
    place = []
    for example in examples:
        asked_as = None if embeddings_NP is None else example.profile
        key = (tuple(example.input_ids), tuple(example.target_token), asked_as)
        if key not in first:
            first[key] = len(distinct)
            distinct.append(example)
        place.append(first[key])

    answers: list[NDArray[np.float64]] = [np.empty(0)] * len(distinct)
    gates: list[NDArray[np.float32]] = [np.empty(0, dtype=np.float32)] * len(distinct)
    for indices, batch, logits, gates_BRE in forward_batches(model, distinct, embeddings_NP, batch_size, pad_id, device, record, progress):
        letters = logits[batch.target_row, batch.target_position, batch.target_token].cpu()
        rows = batch.target_row.cpu()
        for row, index in enumerate(indices):
            answers[index] = torch.softmax(letters[rows == row], dim=0).double().numpy()
            if gates_BRE is not None:
                gates[index] = gates_BRE[row].numpy()
    recorded = record and bool(gates) and gates[0].size > 0
    return ChoicePredictions(
        probabilities=[answers[index] for index in place],
        gates_MRE=np.stack([gates[index] for index in place]) if recorded else None,
        router_names=tuple(model.router_names) if recorded else (),
    )
