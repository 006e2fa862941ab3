"""Scores of one split of choice questions with bootstrap intervals.

Every score is a function of per-person sums, so all replicates are one matrix product.

Shapes: M examples, A answers, Y kinds of people, N most options of any question, C cells (question, group), Q
questions, G groups, S subgroups of all profile fields, K bins of confidence, B replicates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from cuma_ds.distances import distance, jensen_shannon, total_variation
from cuma_ds.evaluation.columns import Labels, Ragged
from cuma_ds.evaluation.examples import ChoiceExamples
from cuma_ds.evaluation.metrics import (
    calibration_error,
    entropy,
    gather_cells,
    inequity,
    macro_f1,
    mean_collapse_recovered,
    pooled,
    question_figures,
)
from cuma_ds.evaluation.noise import Truth
from cuma_ds.evaluation.resampling import Answers, interval, resample
from cuma_ds.evaluation.subgroups import coded
from cuma_ds.evaluation.sums import Block, Layout, join, mean, ratio

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

BINS = 15
# The log-score takes no probability for less than this, so that one answer that was held impossible does not decide.
LEAST = 1e-6
# Most numbers of one chunk of replicates: 64 MB of float64.
_CHUNK = 8_000_000


@dataclass(frozen=True)
class Score:
    """One number and its bootstrap interval (None without replicates, or where it is no number)."""

    value: float | None
    interval: tuple[float, float] | None = None


class Worst(NamedTuple):
    """A group, its answers in cells that are large enough, and the mean distance there."""

    group: str
    answers: float
    distance: float


@dataclass(frozen=True)
class SplitScores:
    """What :meth:`Scorer.scores` found.

    Attributes:
        rows: contender -> metric -> score.
        differences: contender -> metric -> score of the main contender less its own, over the same drawn people.
        reliability: contender -> (accuracy, mean confidence, answers) of each bin [K]; nan where a bin is empty.
        subgroups: field -> label -> contender -> accuracy, of subgroups large enough to be named.
        worst: contender -> the group that it is farthest from; none where no group has a cell.
    """

    rows: dict[str, dict[str, Score]]
    differences: dict[str, dict[str, Score]]
    reliability: dict[str, tuple[Array, Array, Array]]
    subgroups: dict[str, dict[str, dict[str, Score]]]
    worst: dict[str, Worst]


class Pairs(NamedTuple):
    """Observed and predicted distributions of D cells (or questions) in B replicates.

    Attributes:
        observed, predicted: [B, D, N]; nan where nothing was drawn, as the others.
        answers: [B, D].
        distance: [B, D] what the split is judged by.
    """

    observed: Array
    predicted: Array
    answers: Array
    distance: Array

    def mean(self, values_BD: Array) -> Array:
        """[B] the mean, weighted by answers."""
        return ratio(np.where(self.answers > 0, values_BD * self.answers, 0.0).sum(axis=1), self.answers.sum(axis=1))


class Scorer:
    """Judges predictions for the examples of one split.

    The distance ``emd`` is that of cells (question, group) with at least ``min_answers`` answers; everything else
    counts every answer. It is EMD, and for nominal questions total variation.

    Args:
        examples: the split.
        fields: subgroup of every profile, by field (as :func:`cuma_ds.evaluation.subgroups.subgroups` returns them).
        min_answers: smaller cells and subgroups are not looked at alone.
        min_subgroup: people a group needs to count in macro accuracy and inequity.

    Attributes:
        sizes: field -> label -> number of people, for every subgroup.
    """

    def __init__(
        self,
        examples: ChoiceExamples,
        fields: Mapping[str, Sequence[str | None]],
        min_answers: int = 30,
        min_subgroup: int = 5,
    ) -> None:
        self.examples = examples
        self.cells = gather_cells(examples.questions, examples.groups, examples.counts, min_answers)
        self.answers = Answers.of(examples)
        self.min_answers = min_answers
        kind_U, self._people_Y = self.answers.kinds()
        # One person stands for all of a kind.
        first_Y = np.unique(kind_U, return_index=True)[1]
        chosen_A = np.isin(self.answers.person_A, first_Y)
        self._kind_A, self._weight_A = kind_U[self.answers.person_A[chosen_A]], self.answers.weight_A[chosen_A]
        self._example_A, self._option_A = self.answers.example_A[chosen_A], self.answers.option_A[chosen_A]

        self._options_M = examples.counts.lengths_M
        self._width = int(self._options_M.max(initial=1))
        self._cell_M = self.cells.cell_M
        self._question_M = examples.questions.code_M
        self._steps_C = np.array([max(len(shares) - 1, 1) for shares in self.cells.observed], dtype=np.float64)
        self._steps_Q = np.ones(int(self._question_M.max(initial=-1)) + 1)
        self._steps_Q[self._question_M] = np.maximum(self._options_M - 1, 1)
        self._nominal_C = np.array([question in examples.nominal for question, _ in self.cells.keys], dtype=bool)
        self._nominal_Q = np.array([question in examples.nominal for question in examples.questions.names], dtype=bool)
        self._group_C = Labels.of([group for _, group in self.cells.keys])

        group_M = examples.groups.code_M
        self._group_M = np.where(self._people_of(group_M)[group_M] >= min_subgroup, group_M, -1)
        self.sizes: dict[str, dict[str, int]] = {}
        self._labels: list[tuple[str, str, bool]] = []
        self._subgroup_M: list[Indices] = []
        for field, labels in fields.items():
            names, code_M = coded([labels[profile] for profile in examples.profiles])
            people = self._people_of(code_M)
            self.sizes[field] = {name: int(people[index]) for index, name in enumerate(names)}
            self._subgroup_M.append(np.where(code_M >= 0, code_M + len(self._labels), -1))
            self._labels += [(field, name, self.sizes[field][name] >= min_subgroup) for name in names]

    def scores(
        self,
        contenders: Mapping[str, Sequence[ArrayLike]],
        replicates: int = 0,
        seed: int = 0,
        against: str = "trained",
    ) -> SplitScores:
        """Score the option probabilities of every contender.

        Args:
            contenders: M arrays [n] each; ``collapse`` and ``oracle`` give ``recovered`` its ends.
            replicates: bootstrap samples of people; 0 gives no intervals.
            seed: of the bootstrap; all contenders are judged by the same people.
            against: the contender that differences are taken from.
        """
        found = {}
        for key, values_B in self._drawn(contenders, replicates, seed, against).items():
            number = float(values_B[0])
            spread = interval(values_B[1:], number) if len(values_B) > 1 else None
            found[key] = Score(number if np.isfinite(number) else None, spread)
        subgroups: dict[str, dict[str, dict[str, Score]]] = {}
        for place, score in found.items():
            if place[0] == "subgroup" and self.sizes[place[2]][place[3]] >= self.min_answers:
                subgroups.setdefault(place[2], {}).setdefault(place[3], {})[place[1]] = score
        return SplitScores(
            worst=self._worst_groups(contenders),
            rows=_nested(found, "row"),
            differences=_nested(found, "difference"),
            reliability={name: self._reliability(probabilities) for name, probabilities in contenders.items()},
            subgroups=subgroups,
        )

    def replicates(
        self, contenders: Mapping[str, Sequence[ArrayLike]], replicates: int, seed: int = 0
    ) -> dict[str, dict[str, Array]]:
        """Contender -> score -> [1 + B], the value over all people and then of each bootstrap sample.

        Arguments as in :meth:`scores`. The n-th sample is of the same people for all contenders.
        """
        found: dict[str, dict[str, Array]] = {name: {} for name in contenders}
        for place, values_B in self._drawn(contenders, replicates, seed, "").items():
            if place[0] == "row":
                found[place[1]][place[2]] = values_B
        return found

    def _drawn(
        self, contenders: Mapping[str, Sequence[ArrayLike]], replicates: int, seed: int, against: str
    ) -> dict[tuple[str, ...], Array]:
        """Scores [1 + B], of all people and of each bootstrap sample.

        Returns:
            By ("row", contender, metric), ("difference", contender, metric), ("subgroup", contender, field, label).
        """
        # One contender at a time: the sums of all of them may not fit in memory.
        own = {name: self._samples(probabilities, replicates, seed) for name, probabilities in contenders.items()}
        rows = {name: {key[1]: values for key, values in one.items() if key[0] == "row"} for name, one in own.items()}
        if {"collapse", "oracle"} <= rows.keys():
            ends = rows["collapse"]["emd"], rows["oracle"]["emd"]
            for row in rows.values():
                row["recovered"] = np.array(
                    [_or_nan(mean_collapse_recovered(c, o, v)) for c, o, v in zip(*ends, row["emd"], strict=True)]
                )
        found: dict[tuple[str, ...], Array] = {
            ("row", name, metric): values for name, row in rows.items() for metric, values in row.items()
        }
        for name, row in rows.items():
            if against in rows and name != against:
                found |= {
                    ("difference", name, metric): rows[against][metric] - values for metric, values in row.items()
                }
        for name, one in own.items():
            found |= {("subgroup", name, *key[1:]): values for key, values in one.items() if key[0] == "subgroup"}
        return found

    def _samples(self, probabilities: Sequence[ArrayLike], replicates: int, seed: int) -> dict[tuple[str, ...], Array]:
        """Scores [1 + B] of one contender, by ("row", metric) and ("subgroup", field, label)."""
        layout = Layout([self._shared(), self._of(probabilities)], self._kind_A, self._weight_A, len(self._people_Y))
        parts = [self._scored(*layout.sums(self._people_Y[None].astype(np.float64)))]
        if replicates and len(self._people_Y):
            chunk = int(np.clip(_CHUNK // max(layout.width, len(self._people_Y)), 1, replicates))
            for weights_BY in resample(self._people_Y, replicates, seed, chunk):
                parts.append(self._scored(*layout.sums(weights_BY)))
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def _scored(self, shared: dict[str, Array], own: dict[str, Array]) -> dict[tuple[str, ...], Array]:
        found: dict[tuple[str, ...], Array] = {
            ("row", metric): values_B for metric, values_B in self._row(shared, own).items()
        }
        accuracy_BS = ratio(own["subgroup_right"], shared["subgroup"])
        for s, (field, label, _) in enumerate(self._labels):
            found["subgroup", field, label] = accuracy_BS[:, s]
        return found

    def cell_truth(self) -> Truth:
        """The observed distributions of the cells."""
        observed = Ragged.of(self.cells.observed).padded(self._width)
        return Truth(observed, self.cells.answers, self._nominal_C, self._steps_C)

    def question_truth(self) -> Truth:
        """The observed distributions of the questions, over all people."""
        counts, questions = self.examples.counts, len(self._steps_Q)
        total = pooled(self._question_M, questions, counts.padded(self._width), np.ones(len(counts)))
        asked = total.sum(axis=1) > 0
        answers_D = total[asked].sum(axis=1)
        return Truth(total[asked] / answers_D[:, None], answers_D, self._nominal_Q[asked], self._steps_Q[asked])

    def _people_of(self, code_M: Indices) -> Indices:
        """Number of different people behind the examples of each code >= 0."""
        code_A = code_M[self.answers.example_A]
        known = code_A >= 0
        pairs = np.unique(code_A[known] * self.answers.people + self.answers.person_A[known])
        return np.bincount(pairs // max(self.answers.people, 1), minlength=int(code_M.max(initial=-1)) + 1)

    def _shared(self) -> dict[str, Block]:
        example_A, option_A, width = self._example_A, self._option_A, self._width
        one_A = np.ones(len(example_A))
        return {
            "cell": Block(len(self._steps_C) * width, [(join(self._cell_M[example_A], option_A, width), one_A)]),
            "question": Block(
                len(self._steps_Q) * width, [(join(self._question_M[example_A], option_A, width), one_A)]
            ),
            "group": Block(int(self._group_M.max(initial=-1)) + 1, [(self._group_M[example_A], one_A)]),
            "subgroup": Block(len(self._labels), [(code_M[example_A], one_A) for code_M in self._subgroup_M]),
        }

    def _of(self, probabilities: Sequence[ArrayLike]) -> dict[str, Block]:
        example_A, option_A, width = self._example_A, self._option_A, self._width
        shares_MN = self._shares(probabilities)
        confidence_M, entropy_M = shares_MN.max(axis=1), entropy(shares_MN)
        # Options that tie for the mode share it; the first of them is no better a guess than the others.
        mode_MN = (shares_MN == confidence_M[:, None]).astype(np.float64)
        mode_MN /= mode_MN.sum(axis=1, keepdims=True)
        right_A = mode_MN[example_A, option_A]
        bin_A = np.minimum((confidence_M * BINS).astype(np.int64), BINS - 1)[example_A]
        cell_A, question_A = self._cell_M[example_A], self._question_M[example_A]

        def spread(code_A: Indices, values_MN: Array) -> list[tuple[Indices, Array]]:
            return [
                (join(code_A, np.full_like(code_A, option), width), values_MN[example_A, option])
                for option in range(width)
            ]

        return {
            "cell_predicted": Block(len(self._steps_C) * width, spread(cell_A, shares_MN)),
            "question_predicted": Block(len(self._steps_Q) * width, spread(question_A, shares_MN)),
            "question_mode": Block(len(self._steps_Q) * width, spread(question_A, mode_MN)),
            "question_both": Block(len(self._steps_Q) * width, [(join(question_A, option_A, width), right_A)]),
            "group_right": Block(int(self._group_M.max(initial=-1)) + 1, [(self._group_M[example_A], right_A)]),
            "subgroup_right": Block(len(self._labels), [(code_M[example_A], right_A) for code_M in self._subgroup_M]),
            "bin_right": Block(BINS, [(bin_A, right_A)]),
            "bin_confidence": Block(BINS, [(bin_A, confidence_M[example_A])]),
            "entropy": Block(1, [(np.zeros_like(option_A), entropy_M[example_A])]),
            "log_score": Block(
                1, [(np.zeros_like(option_A), np.log(np.maximum(shares_MN, LEAST))[example_A, option_A])]
            ),
        }

    def _shares(self, probabilities: Sequence[ArrayLike]) -> Array:
        """[M, N] probabilities that sum to one over each example's own options; uniform where they are all zero."""
        shares = Ragged.of(probabilities)
        total_M = shares.sums()[:, None]
        uniform_MN = (np.arange(self._width) < self._options_M[:, None]) / np.maximum(self._options_M[:, None], 1)
        return np.where(total_M > 0, shares.padded(self._width) / np.where(total_M > 0, total_M, 1.0), uniform_MN)

    def _row(self, shared: dict[str, Array], own: dict[str, Array]) -> dict[str, Array]:
        total_B = shared["question"].sum(axis=1)
        by_question = [
            self._by_question(sums) for sums in (shared["question"], own["question_mode"], own["question_both"])
        ]

        cells = self._pairs(shared["cell"], own["cell_predicted"], self._steps_C, self._nominal_C)
        full = self._pairs(shared["question"], own["question_predicted"], self._steps_Q, self._nominal_Q)
        modes = self._pairs(shared["question"], own["question_mode"], self._steps_Q, self._nominal_Q)
        return {
            "emd": cells.mean(cells.distance),
            "total_variation": cells.mean(total_variation(cells.predicted, cells.observed)),
            "similarity": cells.mean(1 - jensen_shannon(cells.predicted, cells.observed)),
            "emd_worst_group": self._worst(cells),
            "emd_questions": mean(full.distance),
            "emd_argmax": mean(modes.distance),
            **{f"questions_{name}": value for name, value in question_figures(full.distance).items()},
            **{f"argmax_{name}": value for name, value in question_figures(modes.distance).items()},
            "accuracy": ratio(own["question_both"].sum(axis=1), total_B),
            "macro_f1": macro_f1(*(sums.sum(axis=1) for sums in by_question)),
            "macro_f1_questions": mean(np.where(by_question[0].any(axis=-1), macro_f1(*by_question), np.nan)),
            "group_accuracy": mean(ratio(own["group_right"], shared["group"])),
            "inequity": self._inequity(ratio(own["subgroup_right"], shared["subgroup"])),
            "entropy": ratio(own["entropy"][:, 0], total_B),
            "log_score": ratio(own["log_score"][:, 0], total_B),
            "calibration_error": calibration_error(own["bin_right"], own["bin_confidence"], total_B),
        }

    def _pairs(self, observed: Array, predicted: Array, steps: Array, nominal: NDArray[np.bool_]) -> Pairs:
        """Distributions that stand side by side in sums [B, D * N], and their distances."""
        shape = (len(observed), len(steps), self._width)
        observed, predicted = observed.reshape(shape), predicted.reshape(shape)
        answers = observed.sum(axis=-1)
        observed, predicted = ratio(observed, answers[..., None]), ratio(predicted, answers[..., None])
        return Pairs(observed, predicted, answers, distance(predicted, observed, nominal, steps))

    def _worst(self, cells: Pairs) -> Array:
        """[B] the largest of the groups' own mean distances."""
        return _largest(self._by_group(cells))

    def _by_group(self, cells: Pairs) -> Array:
        """[B, G] mean distance of each group that has a cell, weighted by answers; nan where none of it was drawn."""
        code_C, groups = self._group_C.code_M, len(self._group_C.names)
        member_CG = csr_array((np.ones(len(code_C)), (np.arange(len(code_C)), code_C)), (len(code_C), groups))
        weighted = np.where(cells.answers > 0, cells.distance * cells.answers, 0.0)
        return ratio(weighted @ member_CG, cells.answers @ member_CG)

    def _by_question(self, sums: Array) -> Array:
        return sums.reshape(len(sums), len(self._steps_Q), self._width)

    def _worst_groups(self, contenders: Mapping[str, Sequence[ArrayLike]]) -> dict[str, Worst]:
        found: dict[str, Worst] = {}
        names, code_C, answers_C = self._group_C.names, self._group_C.code_M, self.cells.answers
        if not names:
            return found
        answers_M, cells = self.examples.counts.sums(), len(code_C)
        observed = Ragged.of(self.cells.observed).padded(self._width)
        total_G = np.bincount(code_C, answers_C)
        for name, probabilities in contenders.items():
            predicted = pooled(self._cell_M, cells, self._shares(probabilities), answers_M) / answers_C[:, None]
            distances = distance(predicted, observed, self._nominal_C, self._steps_C)
            mean_G = np.bincount(code_C, distances * answers_C) / total_G
            worst = int(mean_G.argmax())
            found[name] = Worst(names[worst], float(total_G[worst]), float(mean_G[worst]))
        return found

    def _inequity(self, accuracy_BS: Array) -> Array:
        fields = dict.fromkeys(field for field, _, _ in self._labels)
        columns = [
            [s for s, (name, _, counts) in enumerate(self._labels) if name == field and counts] for field in fields
        ]
        return inequity([accuracy_BS[:, chosen] for chosen in columns if len(chosen) > 1], len(accuracy_BS))

    def _reliability(self, probabilities: Sequence[ArrayLike]) -> tuple[Array, Array, Array]:
        row = self._of(probabilities)
        parts = {name: row[name] for name in ("bin_right", "bin_confidence")}
        bin_A, _ = parts["bin_right"].parts[0]
        parts["total"] = Block(BINS, [(bin_A, np.ones(len(bin_A)))])
        (sums,) = Layout([parts], self._kind_A, self._weight_A, len(self._people_Y)).sums(
            self._people_Y[None].astype(np.float64)
        )
        total = sums["total"][0]
        return ratio(sums["bin_right"][0], total), ratio(sums["bin_confidence"][0], total), total


def _nested(found: Mapping[tuple[str, ...], Score], kind: str) -> dict[str, dict[str, Score]]:
    result: dict[str, dict[str, Score]] = {}
    for key, score in found.items():
        if key[0] == kind:
            result.setdefault(key[1], {})[key[2]] = score
    return result


def _largest(values_BG: Array) -> Array:
    """[B] the largest number of each row; nan where there is none."""
    largest = np.where(np.isfinite(values_BG), values_BG, -np.inf).max(axis=1, initial=-np.inf)
    return np.where(np.isfinite(largest), largest, np.nan)


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
