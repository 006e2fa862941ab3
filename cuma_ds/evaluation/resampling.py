"""The answers of a split one by one, and bootstrap samples of people with all of their answers.

Shapes: A answers, M examples, U people, Y kinds of people (with exactly the same answers), B replicates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cuma_ds.evaluation.examples import ChoiceExamples

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Answers:
    """The answers of a split one by one.

    Attributes:
        person_A, example_A, option_A: who answered (0 to U - 1), which example, and with which option.
        weight_A: the survey weight of each answer, 1 where the data has none.
        known: False where the data does not say who answered; then every answer stands for a person of its own.
    """

    person_A: Indices
    example_A: Indices
    option_A: Indices
    weight_A: Array
    known: bool

    @classmethod
    def of(cls, examples: ChoiceExamples) -> Answers:
        """Unfold the answer counts of ``examples``."""
        counts = examples.counts if examples.answers is None else examples.answers
        repeats_F = counts.values_F.astype(np.int64)
        example_A, option_A = np.repeat(counts.row_F, repeats_F), np.repeat(counts.place_F, repeats_F)
        weight_A = np.ones(len(example_A)) if examples.weights is None else examples.weights.values_F.astype(np.float64)
        if examples.people is None:
            return cls(np.arange(len(example_A)), example_A, option_A, weight_A, known=False)
        person_A = np.unique(examples.people.values_F, return_inverse=True)[1]
        return cls(person_A.astype(np.int64), example_A, option_A, weight_A, known=True)

    @property
    def people(self) -> int:
        """U."""
        return int(self.person_A.max()) + 1 if len(self.person_A) else 0

    def kinds(self) -> tuple[Indices, Indices]:
        """People with the same answers to the same examples, and with the same weight, are one kind.

        Returns:
            The kind of each person [U], and how many people are of each kind [Y].
        """
        # The sum of one random number per (example, option, weight) tells sets of answers apart.
        width = int(self.option_A.max(initial=0)) + 1
        weights, weight_of_A = np.unique(self.weight_A, return_inverse=True)
        key_A = (self.example_A * width + self.option_A) * len(weights) + weight_of_A
        values, place_A = np.unique(key_A, return_inverse=True)
        marks = np.random.default_rng(0).integers(0, 2**63, size=len(values), dtype=np.uint64)
        sums_U = np.zeros(self.people, dtype=np.uint64)
        np.add.at(sums_U, self.person_A, marks[place_A])
        _, kind_U, people_Y = np.unique(sums_U, return_inverse=True, return_counts=True)
        return kind_U.astype(np.int64), people_Y.astype(np.int64)


def resample(people_Y: Indices, replicates: int, seed: int, chunk: int) -> Iterator[Array]:
    """How often each kind of people is drawn when as many people are drawn as there are, with replacement.

    Args:
        people_Y: number of people of each kind.
        replicates: B.
        seed: the same seed draws the same people, whatever ``chunk`` is.
        chunk: most replicates at a time.

    Yields:
        [up to ``chunk``, Y] float64; rows sum to the number of people.
    """
    generator = np.random.default_rng(seed)
    share_Y = people_Y / people_Y.sum()
    for start in range(0, replicates, chunk):
        size = min(chunk, replicates - start)
        yield generator.multinomial(int(people_Y.sum()), share_Y, size=size).astype(np.float64)


def interval(values_B: Array, value: float, level: float = 0.95) -> tuple[float, float] | None:
    """The percentile interval of bootstrap replicates, moved so that their mean is the measured value.

    Drawing people adds noise that a distance counts as distance. Without the move, the interval of a small EMD would
    lie above the EMD. The measured value always lies inside, also where almost all replicates are equal.

    Returns:
        The ends; None where the value, or more than ``1 - level`` of the replicates, are no numbers.
    """
    values = values_B[np.isfinite(values_B)]
    if not len(values) or len(values) < level * len(values_B) or not np.isfinite(value):
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2]) + (value - values.mean())
    return float(min(low, value)), float(max(high, value))
