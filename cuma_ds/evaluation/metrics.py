"""The numbers a run is judged by, as pure functions of NumPy arrays.

Shapes: M examples, n options of one question (in their order), E experts, R routers.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cuma_ds.errors import DataError
from cuma_ds.evaluation.columns import Indices, Labels, Ragged

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


# Thresholds of the curve in WorldValuesBench's evaluation_and_plot.ipynb, and the one that its paper tells by.
THRESHOLDS = np.arange(9) * 0.05
NEAR = 0.2


def question_figures(distances: ArrayLike) -> dict[str, Array]:
    """What WorldValuesBench (arXiv 2404.16308) tells of the distances of many questions.

    Args:
        distances: [..., Q] of each question, in [0, 1]; nan for a question that does not count.

    Returns:
        [...] each: ``median``; ``within``, the share of questions at most 0.2 away; ``auc``, the area under the curve
        of the share of questions that are at most 0, 0.05, ... 0.4 away, by the trapezoidal rule, divided by 0.4.
    """
    values = np.asarray(distances, dtype=np.float64)
    known = np.isfinite(values)

    def share(threshold: float) -> Array:
        # 0.05 * 4 is not the double next to 0.2: a rounding error must not decide.
        near, count = (known & (values <= threshold + 1e-12)).sum(axis=-1), known.sum(axis=-1)
        return np.divide(near, count, out=np.full(count.shape, np.nan), where=count > 0)

    curve = np.stack([share(threshold) for threshold in THRESHOLDS], axis=-1)
    area = ((curve[..., 1:] + curve[..., :-1]) / 2).mean(axis=-1)
    return {"median": _median(values), "within": share(NEAR), "auc": area}


def _median(values: Array) -> Array:
    """Median over the last axis of what is a number; nan where nothing is."""
    if not values.shape[-1]:
        return np.full(values.shape[:-1], np.nan)
    count, ordered = np.isfinite(values).sum(axis=-1)[..., None], np.sort(values, axis=-1)  # nan stands last
    low = np.take_along_axis(ordered, np.maximum(count - 1, 0) // 2, axis=-1)
    return ((low + np.take_along_axis(ordered, count // 2, axis=-1)) / 2)[..., 0]


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct-n: different n-grams over all n-grams of the texts' words (lower case); nan where there are none."""
    grams = [
        tuple(words[start : start + n])
        for words in (text.lower().split() for text in texts)
        for start in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else float("nan")


def equal_lengths(rows: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Answers to the same prompts, cut to the words of the shortest answer that any row has to the prompt.

    Distinct-n falls with length, because long texts repeat words. After the cut, all rows have equally many words.
    Prompts to which any row has an empty answer are left out.

    Args:
        rows: answers to the same prompts, in one order, by row.
    """
    words = {name: [text.split() for text in texts] for name, texts in rows.items()}
    shortest = [min(map(len, answers)) for answers in zip(*words.values(), strict=True)]
    return {
        name: [" ".join(text[:length]) for text, length in zip(texts, shortest, strict=True) if length]
        for name, texts in words.items()
    }


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
        keys: question and group of each cell.
        cell_M: the cell of each of M examples, -1 for those of cells that were left out.
        observed: answer distribution of each cell, [n].
        answers: number of answers of each cell, [cells].
        left_out: number of cells with fewer answers than asked for.
        left_out_answers: answers in those.
    """

    keys: list[tuple[str, str]]
    cell_M: Indices
    observed: list[Array]
    answers: Array
    left_out: int
    left_out_answers: float

    @property
    def members(self) -> list[list[int]]:
        """Examples of each cell."""
        order = np.argsort(self.cell_M, kind="stable")
        ends = np.searchsorted(self.cell_M[order], np.arange(len(self.keys) + 1))
        return [order[start:end].tolist() for start, end in itertools.pairwise(ends)]

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
    question, group, answers = Labels.of(questions), Labels.of(groups), Ragged.of(counts)
    _check_options(question, answers.lengths_M)
    codes = question.code_M * max(len(group.names), 1) + group.code_M
    numbers, first, which_M = np.unique(codes, return_index=True, return_inverse=True)
    total = np.bincount(which_M, answers.sums(), len(numbers)).astype(np.float64)
    order = np.argsort(first)
    kept = order[total[order] >= min_answers]
    place = np.full(len(numbers), -1)
    place[kept] = np.arange(len(kept))
    cell_M = place[which_M].astype(np.int64)
    width = int(answers.lengths_M.max(initial=1))
    counted = pooled(cell_M, len(kept), answers.padded(width), np.ones(len(cell_M)))
    options = answers.lengths_M[first[kept]]
    return Cells(
        keys=[(question[int(index)], group[int(index)]) for index in first[kept]],
        cell_M=cell_M,
        observed=[normalise(row[:size]) for row, size in zip(counted, options, strict=True)],
        answers=total[kept],
        left_out=len(numbers) - len(kept),
        left_out_answers=float(total[place < 0].sum()),
    )


def _check_options(questions: Labels, lengths_M: Indices) -> None:
    least, most = np.full(len(questions.names), np.iinfo(np.int64).max), np.zeros(len(questions.names), np.int64)
    np.minimum.at(least, questions.code_M, lengths_M)
    np.maximum.at(most, questions.code_M, lengths_M)
    for code in np.flatnonzero(least < most)[:1]:
        found = np.unique(lengths_M[questions.code_M == code]).tolist()
        raise DataError(
            f"question {questions.names[code]!r} has examples with {found} options; "
            "one question has one list of options"
        )


def pooled(cell_M: Indices, cells: int, values_MN: Array, weights_M: Array) -> Array:
    """Weighted sums [cells, N] of the rows that belong to each cell; rows of cell -1 belong to none."""
    width = values_MN.shape[1]
    some = np.flatnonzero(cell_M >= 0)
    place = cell_M[some][:, None] * width + np.arange(width)
    sums = np.bincount(place.ravel(), (values_MN[some] * weights_M[some][:, None]).ravel(), cells * width)
    return sums.astype(np.float64).reshape(cells, width)


def predicted_distributions(
    cells: Cells, probabilities: Sequence[ArrayLike], counts: Sequence[ArrayLike]
) -> list[Array]:
    """The distribution predicted for each cell: its examples' probabilities, weighted by their answers.

    Args:
        probabilities, counts: of all M examples, [n] each.
    """
    shares = Ragged.of(probabilities)
    table = pooled(
        cells.cell_M, len(cells.keys), shares.padded(int(shares.lengths_M.max(initial=1))), Ragged.of(counts).sums()
    )
    return [normalise(row[: len(observed)]) for row, observed in zip(table, cells.observed, strict=True)]


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
