"""How the next token of a sequence is chosen: by temperature, top-p and the sequence's own seed.

Shapes: B sequences, U rows of logits, C distributions, D draws from one, V vocabulary.
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


def next_tokens(logits_UV: Tensor, samplers: Sequence[Sampler], rows: Sequence[int] | None = None) -> list[int]:
    """One token id for each sequence.

    Args:
        logits_UV: of the last position, any float dtype.
        samplers: B of them.
        rows: of the logits, for each sampler; several may share one. None for one row each, in order.
    """
    rows = range(len(samplers)) if rows is None else rows
    best_U = logits_UV.argmax(dim=-1).tolist()
    tokens = [best_U[row] for row in rows]
    # Sequences that draw from one distribution share its order.
    places: dict[tuple[int, float, float], list[int]] = {}
    for place, (row, sampler) in enumerate(zip(rows, samplers, strict=True)):
        if sampler.temperature:
            places.setdefault((row, sampler.temperature, sampler.top_p), []).append(place)
    if places:
        drawn = _draw(logits_UV, list(places), [[samplers[place].draw() for place in own] for own in places.values()])
        for own, found in zip(places.values(), drawn, strict=True):
            for place, token in zip(own, found, strict=False):  # rows are as long as the longest
                tokens[place] = token
    return tokens


def log_probabilities(logits_BV: Tensor, tokens: Sequence[int]) -> list[float]:
    """The log-probability, in nats, of one token per row among the whole vocabulary at temperature 1."""
    chosen_B1 = torch.tensor(tokens, device=logits_BV.device)[:, None]
    return logits_BV.float().log_softmax(dim=-1).gather(1, chosen_B1)[:, 0].tolist()


def _draw(
    logits_UV: Tensor, distributions: Sequence[tuple[int, float, float]], draws: Sequence[Sequence[float]]
) -> list[list[int]]:
    """Token ids of each distribution's draws: their places in the cumulated probabilities of the smallest set that
    holds top_p.

    Args:
        logits_UV: of the last position.
        distributions: C times a row of the logits, the temperature and top_p.
        draws: uniform numbers for each; shorter rows are filled up.
    """
    rows, temperatures, shares = zip(*distributions, strict=True)

    def numbers(values: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits_UV.device)

    probabilities_CV = (logits_UV[list(rows)].float() / numbers(temperatures)[:, None]).softmax(dim=-1)
    sorted_CV, order_CV = probabilities_CV.sort(dim=-1, descending=True, stable=True)
    before_CV = sorted_CV.cumsum(dim=-1) - sorted_CV
    least = torch.finfo(torch.float32).tiny  # so that the most probable token is always kept
    kept_CV = sorted_CV * (before_CV < numbers([max(share, least) for share in shares])[:, None])
    cumulated_CV = kept_CV.cumsum(dim=-1)
    most = max(map(len, draws))
    draws_CD = numbers([[*own, *[0.0] * (most - len(own))] for own in draws])
    place_CD = torch.searchsorted(cumulated_CV, draws_CD * cumulated_CV[:, -1:], right=True)
    # A row of NaN keeps nothing; it must not fail the others.
    last_C1 = ((kept_CV > 0).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    return order_CV.gather(1, place_CD.minimum(last_C1)).tolist()
