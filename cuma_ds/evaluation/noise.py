"""The noise floor: how far from the observed answers even the truth is, because only so many people were asked.

A few people never answer exactly as their population does. With 21 answers to a question, the answers of 21 other
people of the same population are about 0.1 away (EMD), with 200 answers 0.034. No model can be expected to be nearer.

Shapes: D cells (or questions), N most options of any of them, R draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cuma_ds.distances import distance, jensen_shannon, total_variation
from cuma_ds.evaluation.metrics import question_figures

Array = NDArray[np.float64]
DRAWS = 200


class Truth(NamedTuple):
    """What is taken for the truth of D cells, and how many answers were drawn from it.

    Attributes:
        shares_DN: distributions; zeros behind the options of shorter questions.
        answers_D: number of answers.
        nominal_D: whether the options have no order.
        steps_D: number of options less one.
    """

    shares_DN: Array
    answers_D: Array
    nominal_D: NDArray[np.bool_]
    steps_D: Array


class Floor(NamedTuple):
    """Expected distances of what cannot be improved upon.

    Attributes:
        truth: of the true distributions themselves from as many answers as were observed.
        sampler: of as many answers that were drawn from the true distributions, too.
    """

    truth: dict[str, float]
    sampler: dict[str, float]


def cell_floor(cells: Truth, draws: int = DRAWS, seed: int = 0) -> Floor:
    """Expected ``emd``, ``total_variation`` and ``similarity``, means over cells weighted by answers.

    Args:
        cells: the observed distributions, taken for the truth.
        draws: R, pairs of samples.
        seed: of the draws.
    """
    found: list[dict[str, list[float]]] = [{}, {}]
    for sample_DN, other_DN in _samples(cells, draws, seed):
        for predicted_DN, row in zip((cells.shares_DN, other_DN), found, strict=True):
            values = {
                "emd": distance(predicted_DN, sample_DN, cells.nominal_D, cells.steps_D),
                "total_variation": total_variation(predicted_DN, sample_DN),
                "similarity": 1 - jensen_shannon(predicted_DN, sample_DN),
            }
            for name, value_D in values.items():
                row.setdefault(name, []).append(float(np.average(value_D, weights=cells.answers_D)))
    return _means(found)


def question_floor(questions: Truth, draws: int = DRAWS, seed: int = 0) -> Floor:
    """Expected mean, median, share within 0.2 and area under the curve of the questions' distances.

    Arguments as in :func:`cell_floor`. The names are ``emd_questions``, and ``questions_median`` and so on.
    """
    found: list[dict[str, list[float]]] = [{}, {}]
    for sample_DN, other_DN in _samples(questions, draws, seed):
        for predicted_DN, row in zip((questions.shares_DN, other_DN), found, strict=True):
            value_D = distance(predicted_DN, sample_DN, questions.nominal_D, questions.steps_D)
            row.setdefault("emd_questions", []).append(float(value_D.mean()))
            for name, value in question_figures(value_D).items():
                row.setdefault(f"questions_{name}", []).append(float(value))
    return _means(found)


def _samples(truth: Truth, draws: int, seed: int) -> Iterator[tuple[Array, Array]]:
    """Two samples of answers at a time, each as shares [D, N]; none without cells."""
    generator = np.random.default_rng(seed)
    count_D = np.maximum(np.rint(truth.answers_D), 1).astype(np.int64)
    for _ in range(draws if len(count_D) else 0):
        one, other = (generator.multinomial(count_D, truth.shares_DN) / count_D[:, None] for _ in range(2))
        yield one, other


def _means(found: list[dict[str, list[float]]]) -> Floor:
    truth, sampler = ({name: float(np.mean(values)) for name, values in row.items()} for row in found)
    return Floor(truth, sampler)
