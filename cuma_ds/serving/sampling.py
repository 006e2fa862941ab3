"""The next token of every sequence of a batch, each with its own temperature, top-p and seed.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cuma_ds.evaluation.decoding import COLDEST


class Sampler:
    """How one sequence chooses: the most probable token at temperature 0, else a sample of the top-p mass.

    What it draws depends on its seed and its own logits alone, not on who else is in the batch.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> None:
        self.temperature, self.top_p = 0.0 if temperature < COLDEST else temperature, top_p
        self._generator = torch.Generator().manual_seed(seed) if self.temperature else None

    def draw(self) -> float:
        """The next uniform number in [0, 1)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


def next_tokens(logits_BV: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """One token id for each sequence.

    Args:
        logits_BV: of the last position, any float dtype.
        samplers: B of them.
    """
    tokens = logits_BV.argmax(dim=-1).tolist()
    drawing = [row for row, sampler in enumerate(samplers) if sampler.temperature]
    if drawing:
        chosen = [samplers[row] for row in drawing]
        for row, token in zip(drawing, _sample(logits_BV[drawing], chosen).tolist(), strict=True):
            tokens[row] = token
    return tokens


def _sample(logits_BV: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """[B] token ids: the draw's place in the cumulated probabilities of the smallest set that holds top_p."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits_BV.device)[:, None]

    probabilities_BV = (logits_BV.float() / column([sampler.temperature for sampler in samplers])).softmax(dim=-1)
    sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
    least = torch.finfo(torch.float32).tiny  # so that the most probable token is always kept
    kept_BV = sorted_BV * (before_BV < column([max(sampler.top_p, least) for sampler in samplers]))
    cumulated_BV = kept_BV.cumsum(dim=-1)
    target_B1 = column([sampler.draw() for sampler in samplers]) * cumulated_BV[:, -1:]
    place_B1 = torch.searchsorted(cumulated_BV, target_B1, right=True)
    # A row of NaN keeps nothing; it must not fail the others.
    last_B1 = ((kept_BV > 0).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    return order_BV.gather(1, place_B1.minimum(last_B1))[:, 0]
