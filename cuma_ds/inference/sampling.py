"""How the next token of a sequence is chosen: by temperature, top-p and the sequence's own seed.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cuma_ds.errors import ConfigError

# Logits divided by less than this overflow float32. What would be drawn there is the most probable token.
COLDEST = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How long answers are and how their tokens are chosen.

    Attributes:
        max_new_tokens: most tokens of one answer.
        temperature: 0 takes the most probable token; otherwise logits are divided by it.
        top_p: tokens are drawn from the smallest set of most probable tokens that holds this share.
        seed: of the draws.

    Raises:
        ConfigError: a number is out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens is {self.max_new_tokens}; at least 1 is needed")
        if not 0 <= self.temperature < float("inf") or not 0 < self.top_p <= 1:
            given = f"--temperature {self.temperature} --top-p {self.top_p}"
            raise ConfigError(f"{given}: allowed are temperatures from 0 and top-p in (0, 1]")


class Sampler:
    """How one sequence chooses its tokens (arguments as in :class:`Sampling`).

    What it draws is a function of its seed and its own logits. The other sequences of the batch do not matter.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> None:
        self.temperature, self.top_p = 0.0 if temperature < COLDEST else temperature, top_p
        self._generator = torch.Generator().manual_seed(seed) if self.temperature else None

    def draw(self) -> float:
        """The next uniform number in [0, 1)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


def mixed_seed(*numbers: int) -> int:
    """A seed for one of many sequences: the first 63 bits of numpy's ``SeedSequence(numbers)``."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


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


def log_probabilities(logits_BV: Tensor, tokens: Sequence[int]) -> list[float]:
    """The log-probability, in nats, of one token per row among the whole vocabulary at temperature 1."""
    chosen_B1 = torch.tensor(tokens, device=logits_BV.device)[:, None]
    return logits_BV.float().log_softmax(dim=-1).gather(1, chosen_B1)[:, 0].tolist()


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
