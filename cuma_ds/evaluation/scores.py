"""Scores of one split of choice questions with bootstrap intervals.

Every score is a function of per-person sums, so all replicates are one matrix product.

Shapes: M examples, A answers, Y kinds of people, N most options of any question, C cells (question, group), Q
questions, G groups, S subgroups of all profile fields, K bins of confidence, B replicates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cuma_ds.distances import distance
from cuma_ds.evaluation.examples import ChoiceExamples
from cuma_ds.evaluation.metrics import (
    calibration_error,
    entropy,
    gather_cells,
    inequity,
    macro_f1,
    mean_collapse_recovered,
    normalise,
)
from cuma_ds.evaluation.resampling import Answers, interval, resample
from cuma_ds.evaluation.subgroups import coded
from cuma_ds.evaluation.sums import Block, Layout, codes, join, mean, ratio

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

BINS = 15
# Most numbers of one chunk of replicates: 64 MB of float64.
_CHUNK = 8_000_000


@dataclass(frozen=True)
class Score:
    """One number and its bootstrap interval (None without replicates, or where it is no number)."""

    value: float | None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class SplitScores:
    """What :meth:`Scorer.scores` found.

    Attributes:
        rows: contender -> metric -> score.
        differences: contender -> metric -> score of the main contender less its own, over the same drawn people.
        reliability: contender -> (accuracy, mean confidence, answers) of each bin [K]; nan where a bin is empty.
        subgroups: field -> label -> contender -> accuracy, of subgroups large enough to be named.
    """

    rows: dict[str, dict[str, Score]]
    differences: dict[str, dict[str, Score]]
    reliability: dict[str, tuple[Array, Array, Array]]
    subgroups: dict[str, dict[str, dict[str, Score]]]


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

        self._options_M = np.array([len(counts) for counts in examples.counts], dtype=np.int64)
        self._width = int(self._options_M.max(initial=1))
        self._cell_M = np.full(len(examples), -1)
        for cell, members in enumerate(self.cells.members):
            self._cell_M[members] = cell
        self._question_M = codes(examples.questions)
        self._steps_C = np.array([max(len(shares) - 1, 1) for shares in self.cells.observed], dtype=np.float64)
        self._steps_Q = np.ones(int(self._question_M.max(initial=-1)) + 1)
        self._steps_Q[self._question_M] = np.maximum(self._options_M - 1, 1)
        self._nominal_C = np.array([question in examples.nominal for question, _ in self.cells.keys], dtype=bool)
        self._nominal_Q = np.array(
            [question in examples.nominal for question in dict.fromkeys(examples.questions)], dtype=bool
        )

        group_M = codes(examples.groups)
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
        """What :meth:`_all` finds, [1 + B]: of all people, and of each bootstrap sample."""
        shared, blocks = self._shared(), {name: self._of(probabilities) for name, probabilities in contenders.items()}
        layout = Layout([shared, *blocks.values()], self._kind_A, self._weight_A, len(self._people_Y))
        parts = [self._all(layout.sums(self._people_Y[None].astype(np.float64)), list(contenders), against)]
        if replicates and len(self._people_Y):
            chunk = int(np.clip(_CHUNK // max(layout.width, len(self._people_Y)), 1, replicates))
            for weights_BY in resample(self._people_Y, replicates, seed, chunk):
                parts.append(self._all(layout.sums(weights_BY), list(contenders), against))
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

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
        shares_MN = np.zeros((len(self.examples), width))
        for example, shares in enumerate(probabilities):
            shares_MN[example, : self._options_M[example]] = normalise(shares)
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
        }

    def _all(self, sums: list[dict[str, Array]], names: list[str], against: str) -> dict[tuple[str, ...], Array]:
        """Scores [B] by ("row", contender, metric), ("difference", ...), ("subgroup", contender, field, label)."""
        shared, *rest = sums
        by_name = {name: self._row(shared, own) for name, own in zip(names, rest, strict=True)}
        if {"collapse", "oracle"} <= by_name.keys():
            ends = by_name["collapse"]["emd"], by_name["oracle"]["emd"]
            for row in by_name.values():
                row["recovered"] = np.array(
                    [_or_nan(mean_collapse_recovered(c, o, v)) for c, o, v in zip(*ends, row["emd"], strict=True)]
                )
        found: dict[tuple[str, ...], Array] = {
            ("row", name, metric): value for name, row in by_name.items() for metric, value in row.items()
        }
        for name, row in by_name.items():
            if against in by_name and name != against:
                found |= {
                    ("difference", name, metric): by_name[against][metric] - value for metric, value in row.items()
                }
        for name, own in zip(names, rest, strict=True):
            accuracy_BS = ratio(own["subgroup_right"], shared["subgroup"])
            found |= {
                ("subgroup", name, field, label): accuracy_BS[:, s] for s, (field, label, _) in enumerate(self._labels)
            }
        return found

    def _row(self, shared: dict[str, Array], own: dict[str, Array]) -> dict[str, Array]:
        total_B = shared["question"].sum(axis=1)
        by_question = [
            self._by_question(sums) for sums in (shared["question"], own["question_mode"], own["question_both"])
        ]

        def questions(predicted: Array) -> Array:
            return self._distance(shared["question"], predicted, self._steps_Q, self._nominal_Q, by_answers=False)

        return {
            "emd": self._distance(
                shared["cell"], own["cell_predicted"], self._steps_C, self._nominal_C, by_answers=True
            ),
            "emd_questions": questions(own["question_predicted"]),
            "emd_argmax": questions(own["question_mode"]),
            "accuracy": ratio(own["question_both"].sum(axis=1), total_B),
            "macro_f1": macro_f1(*(sums.sum(axis=1) for sums in by_question)),
            "macro_f1_questions": mean(np.where(by_question[0].any(axis=-1), macro_f1(*by_question), np.nan)),
            "group_accuracy": mean(ratio(own["group_right"], shared["group"])),
            "inequity": self._inequity(ratio(own["subgroup_right"], shared["subgroup"])),
            "entropy": ratio(own["entropy"][:, 0], total_B),
            "calibration_error": calibration_error(own["bin_right"], own["bin_confidence"], total_B),
        }

    def _distance(
        self, observed: Array, predicted: Array, steps: Array, nominal: NDArray[np.bool_], by_answers: bool
    ) -> Array:
        """Mean distance [B] of distributions that stand side by side, ``width`` options each."""
        shape = (len(observed), len(steps), self._width)
        observed, predicted = observed.reshape(shape), predicted.reshape(shape)
        answers = observed.sum(axis=-1)
        distances = distance(ratio(predicted, answers[..., None]), ratio(observed, answers[..., None]), nominal, steps)
        weights = answers if by_answers else (answers > 0).astype(np.float64)
        return ratio(np.where(answers > 0, distances * weights, 0.0).sum(axis=1), weights.sum(axis=1))

    def _by_question(self, sums: Array) -> Array:
        return sums.reshape(len(sums), len(self._steps_Q), self._width)

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


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
