"""The numbers a run is judged by, as pure functions of NumPy arrays.

Shapes: M examples, n options of one question (in their order), E experts, R routers.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cuma_ds.errors import DataError

Array = NDArray[np.float64]
Name = TypeVar("Name", bound=Hashable)


def entropy(p: ArrayLike) -> Array:
    """Entropy in nats of [..., n] probabilities, with 0 log 0 = 0."""
    p = np.asarray(p, dtype=np.float64)
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)


def macro_f1(true: ArrayLike, predicted: ArrayLike, both: ArrayLike) -> Array:
    """Unweighted mean over letters of F1 = 2 both / (true + predicted); letters that neither side uses do not count.

    Args:
        true, predicted, both: [..., n] how often each letter was the answer, was predicted, and was both at once.
    """
    used = np.asarray(true, dtype=np.float64) + np.asarray(predicted, dtype=np.float64)
    scores = np.divide(2 * np.asarray(both, dtype=np.float64), used, out=np.zeros_like(used), where=used > 0)
    return scores.sum(axis=-1) / np.maximum((used > 0).sum(axis=-1), 1)


def calibration_error(right: ArrayLike, confidence: ArrayLike, total: ArrayLike) -> Array:
    """Expected calibration error: mean over answers of |accuracy - confidence| of the bin they fall into.

    Args:
        right, confidence: [..., bins] correct answers of each bin, and summed probability of the predicted option.
        total: [...] answers in all.
    """
    gap = np.abs(np.asarray(right, dtype=np.float64) - np.asarray(confidence, dtype=np.float64)).sum(axis=-1)
    total = np.asarray(total, dtype=np.float64)
    return np.divide(gap, total, out=np.full_like(gap, np.nan), where=total > 0)


def inequity(accuracies: Sequence[ArrayLike], size: int = 1) -> Array:
    """Sigma-inequity: mean over profile fields of the standard deviation (of the population) of subgroup accuracy.

    Args:
        accuracies: for each field [size, subgroups]; nan for a subgroup without answers.
        size: length of the result, nan where no field has two subgroups with answers.
    """
    spreads = []
    for values in accuracies:
        values = np.asarray(values, dtype=np.float64)
        known = np.isfinite(values)
        count = known.sum(axis=-1)
        mean = np.where(known, values, 0.0).sum(axis=-1) / np.maximum(count, 1)
        square = np.where(known, (values - mean[..., None]) ** 2, 0.0).sum(axis=-1) / np.maximum(count, 1)
        spreads.append(np.where(count > 1, np.sqrt(square), np.nan))
    if not spreads:
        return np.full(size, np.nan)
    stacked = np.stack(spreads)
    known = np.isfinite(stacked)
    return np.divide(
        np.where(known, stacked, 0.0).sum(axis=0), known.sum(axis=0), out=np.full(size, np.nan), where=known.any(axis=0)
    )


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct-n: different n-grams over all n-grams of the texts' words (lower case); nan where there are none."""
    grams = [
        tuple(words[start : start + n])
        for words in (text.lower().split() for text in texts)
        for start in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else float("nan")


def mean_collapse_recovered(collapse: float, oracle: float, value: float) -> float | None:
    """Share of the way from one global distribution to each group's own: (collapse - value) / (collapse - oracle).

    1 = as close as the group's own training answers, 0 = everyone gets the global distribution; beyond both is
    possible. None where groups do not differ more than sampling noise (oracle not below collapse).
    """
    span = collapse - oracle
    return (collapse - value) / span if span > 0 else None


def normalise(counts: ArrayLike) -> Array:
    """Counts [n] as a distribution; uniform where nothing was counted."""
    values = np.asarray(counts, dtype=np.float64)
    total = values.sum()
    return values / total if total > 0 else np.full_like(values, 1.0 / len(values))


@dataclass(frozen=True)
class Cells:
    """Examples gathered by (question, group): the unit whose answer distribution is judged.

    Attributes:
        members: examples of each cell.
        observed: answer distribution of each cell, [n].
        answers: number of answers of each cell, [cells].
        left_out: number of cells with fewer answers than asked for.
        left_out_answers: answers in those.
    """

    keys: list[tuple[str, str]]
    members: list[list[int]]
    observed: list[Array]
    answers: Array
    left_out: int
    left_out_answers: float

    @property
    def examples(self) -> list[int]:
        """Examples that belong to any cell, in cell order."""
        return [example for members in self.members for example in members]


def gather_cells(
    questions: Sequence[str], groups: Sequence[str], counts: Sequence[ArrayLike], min_answers: int
) -> Cells:
    """Gather M examples into (question, group) cells, in order of first appearance, without the small ones.

    Args:
        questions, groups: of each example.
        counts: answers of each example, [n].
        min_answers: cells with fewer answers are counted, not kept.

    Raises:
        DataError: examples of one cell have different numbers of options.
    """
    members: dict[tuple[str, str], list[int]] = {}
    for example, key in enumerate(zip(questions, groups, strict=True)):
        members.setdefault(key, []).append(example)
    kept: list[tuple[str, str]] = []
    observed, answers = [], []
    left_out, left_out_answers = 0, 0.0
    for key, examples in members.items():
        lengths = {len(np.asarray(counts[example])) for example in examples}
        if len(lengths) > 1:
            raise DataError(
                f"question {key[0]!r} has examples with {sorted(lengths)} options; one question has one list of options"
            )
        total = np.sum([np.asarray(counts[example], dtype=np.float64) for example in examples], axis=0)
        if total.sum() < min_answers:
            left_out += 1
            left_out_answers += float(total.sum())
            continue
        kept.append(key)
        observed.append(normalise(total))
        answers.append(float(total.sum()))
    return Cells(kept, [members[key] for key in kept], observed, np.array(answers), left_out, left_out_answers)


def predicted_distributions(
    cells: Cells, probabilities: Sequence[ArrayLike], counts: Sequence[ArrayLike]
) -> list[Array]:
    """The distribution predicted for each cell: its examples' probabilities, weighted by their answers.

    Args:
        probabilities, counts: of all M examples, [n] each.
    """
    result = []
    for members in cells.members:
        weights = np.array([np.sum(counts[example]) for example in members], dtype=np.float64)
        stacked = np.stack([np.asarray(probabilities[example], dtype=np.float64) for example in members])
        result.append(normalise(weights @ stacked))
    return result


def mean_by_group(values: NDArray[np.floating], groups: Sequence[Name], weights: ArrayLike) -> dict[Name, Array]:
    """Weighted mean over the examples of each group.

    Args:
        values: [M, ...].
        groups: M names.
        weights: [M], not all zero within a group.
    """
    weights = np.asarray(weights, dtype=np.float64)
    index: dict[Name, list[int]] = {}
    for example, group in enumerate(groups):
        index.setdefault(group, []).append(example)
    return {
        group: np.average(values[rows].astype(np.float64), axis=0, weights=weights[rows])
        for group, rows in index.items()
    }
