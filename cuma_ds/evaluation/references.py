"""References of a report: what can be said about people without a model, from the training answers alone.

``collapse`` is a perfect dense model (everybody gets one distribution), ``oracle`` a perfectly informed one, and
``nearest`` a look-up of the most similar training profile. The training answers are read in pieces, so that memory
does not grow with them.

Shapes: M rows, F cells (row, option), K keys (a question, or a question and a group or profile), N most options of any
question, P profile width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cuma_ds.data.rows import Split
from cuma_ds.errors import DataError
from cuma_ds.evaluation.columns import Indices, Ragged
from cuma_ds.evaluation.examples import ChoiceExamples, group_names

Array = NDArray[np.float64]
# A question and a profile or group are one number: the question times this, plus the other.
_SHIFT = 2**31
# Test rows that are filled at a time.
_ROWS = 65_536
# Test profiles whose similarity to all training profiles is computed at a time.
_AT_A_TIME = 128


class Piece(NamedTuple):
    """Some training rows. Groups are numbers that mean the same in every piece."""

    question_M: Indices
    profile_M: Indices
    group_M: Indices
    counts: Ragged


class Histograms(NamedTuple):
    """Answer counts [K, N] of keys [K], which ascend."""

    key_K: Indices
    counts_KN: Array

    def place(self, key_M: Indices) -> Indices:
        """The row of each key, -1 where there is none."""
        return _place(self.key_K, key_M)


class TrainingAnswers:
    """Training answers by question, by question and group, and by question and profile.

    Args:
        questions, groups: names of the numbers in the pieces.
        pieces: all training rows; they are read several times.
        min_answers: a group or profile with fewer answers to a question has no distribution of its own.

    Attributes:
        min_answers: as given.
        profile_K: different profiles, ascending.
        group_K: the group of each.

    Raises:
        DataError: a question has rows with different numbers of options.
    """

    def __init__(
        self, questions: Sequence[str], groups: Sequence[str], pieces: Iterable[Piece], min_answers: int
    ) -> None:
        self.min_answers = min_answers
        self._question = {name: code for code, name in enumerate(questions)}
        self._group = {name: code for code, name in enumerate(groups)}
        self._options_Q = _options(questions, pieces)
        self.profile_K, self.group_K = _profiles(pieces)
        width = int(self._options_Q.max(initial=1))
        self._by_question = _histograms(pieces, lambda piece: piece.question_M, 0, width)
        self._by_group = _histograms(
            pieces, lambda piece: piece.question_M * _SHIFT + piece.group_M, min_answers, width
        )
        self._by_profile = _histograms(
            pieces, lambda piece: piece.question_M * _SHIFT + piece.profile_M, min_answers, width
        )

    @classmethod
    def of(cls, train: Split | ChoiceExamples, min_answers: int) -> TrainingAnswers:
        """The training answers of a split on disk, or of examples."""
        if isinstance(train, ChoiceExamples):
            piece = Piece(train.questions.code_M, train.profiles, train.groups.code_M, train.counts)
            return cls(train.questions.names, train.groups.names, [piece], min_answers)
        groups, questions = group_names(train.groups), train.questions.table["question_id"].to_pylist()
        return cls(questions, groups.names, _SplitPieces(train, groups.code_M), min_answers)

    def collapse(self, test: ChoiceExamples) -> Ragged:
        """Mean collapse: everyone gets the answer distribution of all training answers to the question.

        Returns:
            One distribution [n] per test example; uniform for a question without training answers.

        Raises:
            DataError: a question has another number of options in train than in test.
        """
        return self._filled(test, self._question_rows(test))

    def oracle(self, test: ChoiceExamples) -> Ragged:
        """Each example gets the training answers of its own people to its question.

        Its own people are those of the same profile where they gave at least ``min_answers`` training answers to the
        question, else those of the same group, else everybody. A profile that one or two people share says nothing
        about how the next of them answers.

        Returns:
            One distribution [n] per test example.

        Raises:
            DataError: a question has another number of options in train than in test.
        """
        return self._filled(test, self._own_rows(test, test.profiles, self._groups(test)))

    def nearest(self, test: ChoiceExamples, embeddings_NP: NDArray[np.floating]) -> Ragged:
        """Each example gets the :meth:`oracle` of the training profile with the nearest embedding (cosine).

        This is what a look-up by similarity achieves for profiles that were never trained on.

        Args:
            test: the examples.
            embeddings_NP: raw embeddings of all profiles.
        """
        asked, which_M = np.unique(test.profiles, return_inverse=True)
        known = _unit(embeddings_NP[self.profile_K])  # [K, P]
        nearest = np.concatenate(
            [
                (known @ _unit(embeddings_NP[asked[start : start + _AT_A_TIME]]).T).argmax(axis=0)
                for start in range(0, len(asked), _AT_A_TIME)
            ]
        )
        place_M = nearest[which_M]
        return self._filled(test, self._own_rows(test, self.profile_K[place_M], self.group_K[place_M]))

    def has_oracle(self, test: ChoiceExamples) -> bool:
        """Whether any (question, group) of ``test`` has ``min_answers`` answers in ``train``; else there is none."""
        question_M, group_M = self._questions(test), self._groups(test)
        known_M = (question_M >= 0) & (group_M >= 0)
        return bool((self._by_group.place((question_M * _SHIFT + group_M)[known_M]) >= 0).any())

    def knows(self, profile_M: Indices) -> NDArray[np.bool_]:
        """[M] whether each profile has training answers."""
        return np.isin(profile_M, self.profile_K)

    def _questions(self, test: ChoiceExamples) -> Indices:
        """[M] numbers of the questions here; -1 for one without training answers."""
        here = np.array([self._question.get(name, -1) for name in test.questions.names], dtype=np.int64)
        first = np.unique(test.questions.code_M, return_index=True)[1]
        for name, code, asked in zip(test.questions.names, here, test.counts.lengths_M[first], strict=True):
            before = asked if code < 0 else self._options_Q[code]
            if before not in (0, asked):
                raise _changed(name, int(before), int(asked))
        return here[test.questions.code_M]

    def _groups(self, test: ChoiceExamples) -> Indices:
        """[M] numbers of the groups here; -1 for one without training answers."""
        here = np.array([self._group.get(name, -1) for name in test.groups.names], dtype=np.int64)
        return here[test.groups.code_M]

    def _question_rows(self, test: ChoiceExamples) -> Indices:
        return self._by_question.place(self._questions(test))

    def _own_rows(self, test: ChoiceExamples, profile_M: Indices, group_M: Indices) -> Indices:
        """[M] rows of :meth:`_table`: of the profile where it has one, else of the group, else of the question."""
        question_M, row_M = self._questions(test), self._question_rows(test)
        before = len(self._by_question.key_K)
        for histograms, other_M in ((self._by_group, group_M), (self._by_profile, profile_M)):
            place_M = np.where(other_M >= 0, histograms.place(question_M * _SHIFT + other_M), -1)
            row_M = np.where((place_M >= 0) & (question_M >= 0), place_M + before, row_M)
            before += len(histograms.key_K)
        return row_M

    def _table(self) -> Array:
        """Distributions of all questions, then of all groups, then of all profiles."""
        counts = [part.counts_KN for part in (self._by_question, self._by_group, self._by_profile)]
        table = np.concatenate(counts)
        return table / table.sum(axis=1, keepdims=True)

    def _filled(self, test: ChoiceExamples, row_M: Indices) -> Ragged:
        """The distributions of these rows of :meth:`_table`; uniform for row -1."""
        lengths_M, table = test.counts.lengths_M, self._table()
        values_F, first = np.empty(len(test.counts.values_F)), 0
        for start in range(0, len(row_M), _ROWS):
            some = test.counts[start : start + _ROWS]
            row_F, size_F = row_M[start : start + _ROWS][some.row_F], some.lengths_M[some.row_F]
            known, values = row_F >= 0, 1.0 / size_F
            values[known] = table[row_F[known], some.place_F[known]]
            values_F[first : first + len(values)] = values
            first += len(values)
        return Ragged(values_F, lengths_M)


def references(
    train: TrainingAnswers, test: ChoiceExamples, embeddings_NP: NDArray[np.floating] | None
) -> dict[str, Ragged]:
    """Distributions [n] of every test example by each reference that the data allows."""
    found = {"collapse": train.collapse(test)}
    if train.has_oracle(test):
        found["oracle"] = train.oracle(test)
    if embeddings_NP is not None and not train.knows(test.profiles).any():
        found["nearest"] = train.nearest(test, embeddings_NP)
    return found


class _SplitPieces:
    """The rows of a split, some at a time."""

    def __init__(self, split: Split, group_of: Indices) -> None:
        self._split = split
        self._group_of = group_of

    def __iter__(self) -> Iterator[Piece]:
        for batch in self._split.rows.batches(["profile", "question", "counts"]):
            profile_M = batch.column("profile").to_numpy().astype(np.int64)
            question_M = batch.column("question").to_numpy().astype(np.int64)
            counts = Ragged.of_lists(pa.chunked_array([batch.column("counts")]))
            yield Piece(question_M, profile_M, self._group_of[profile_M], counts)


def _options(questions: Sequence[str], pieces: Iterable[Piece]) -> Indices:
    """[Q] number of options of each question, 0 where it has no rows."""
    options_Q = np.zeros(len(questions), np.int64)
    for piece in pieces:
        codes, first, which_M = np.unique(piece.question_M, return_index=True, return_inverse=True)
        found = piece.counts.lengths_M[first]
        expected = np.where(options_Q[codes] > 0, options_Q[codes], found)
        wrong = np.flatnonzero(piece.counts.lengths_M != expected[which_M])
        if len(wrong):
            question = which_M[wrong[0]]
            raise _changed(questions[codes[question]], int(expected[question]), int(piece.counts.lengths_M[wrong[0]]))
        options_Q[codes] = expected
    return options_Q


def _histograms(pieces: Iterable[Piece], key_of: Callable[[Piece], Indices], least: int, width: int) -> Histograms:
    """Answer counts of the keys that have at least ``least`` answers, and more than none."""
    kept = _frequent(pieces, key_of, least)
    counts = np.zeros((len(kept), width))
    for piece in pieces:
        row_M = _place(kept, key_of(piece))
        if not (row_M >= 0).any():
            continue
        cell = np.flatnonzero(piece.counts.values_F)
        row = row_M[piece.counts.row_F[cell]]
        known = row >= 0
        places = (row[known], piece.counts.place_F[cell][known])
        np.add.at(counts, places, piece.counts.values_F[cell][known])
    return Histograms(kept, counts)


def _frequent(pieces: Iterable[Piece], key_of: Callable[[Piece], Indices], least: int) -> Indices:
    """The keys with at least ``least`` answers in all pieces, and more than none, ascending.

    Prepared rows stand by question and profile. Where keys ascend over all pieces, those below the last one of a piece
    are complete, and the rare ones are forgotten at once: almost every profile has few answers to a question.
    """
    ends = [(key_M.min(), key_M.max()) for key_M in map(key_of, pieces) if len(key_M)]
    ascend = all(before[1] <= after[0] for before, after in itertools.pairwise(ends))
    keys, totals = np.zeros(0, np.int64), np.zeros(0)
    frequent = [keys]

    def close(count: int) -> None:
        frequent.append(keys[:count][(totals[:count] >= least) & (totals[:count] > 0)])

    for piece in pieces:
        more, answers = _sums(key_of(piece), piece.counts.sums())
        keys, totals = _sums(np.concatenate([keys, more]), np.concatenate([totals, answers]))
        if ascend:
            close(len(keys) - 1)
            keys, totals = keys[-1:], totals[-1:]
    close(len(keys))
    return np.concatenate(frequent)


def _sums(key_M: Indices, value_M: Array) -> tuple[Indices, Array]:
    """The different keys, ascending, and the sum of the values of each."""
    if not len(key_M):
        return key_M, value_M
    if (key_M[1:] <= key_M[:-1]).any():
        order = np.argsort(key_M, kind="stable")
        key_M, value_M = key_M[order], value_M[order]
    first = np.flatnonzero(np.concatenate([[True], key_M[1:] != key_M[:-1]]))
    return key_M[first], np.add.reduceat(value_M, first)


def _place(key_K: Indices, key_M: Indices) -> Indices:
    """Where each key stands among ascending ones, -1 where it does not."""
    if not len(key_K):
        return np.full(len(key_M), -1, np.int64)
    place = np.minimum(np.searchsorted(key_K, key_M), len(key_K) - 1)
    return np.where(key_K[place] == key_M, place, -1)


def _profiles(pieces: Iterable[Piece]) -> tuple[Indices, Indices]:
    """The different profiles, ascending, and the group of each."""
    group_N = np.zeros(0, np.int64)
    for piece in pieces:
        missing = int(piece.profile_M.max(initial=-1)) + 1 - len(group_N)
        group_N = np.concatenate([group_N, np.full(max(missing, 0), -1)])
        group_N[piece.profile_M] = piece.group_M
    profile_K = np.flatnonzero(group_N >= 0)
    return profile_K, group_N[profile_K]


def _unit(vectors_NP: NDArray[np.floating]) -> NDArray[np.floating]:
    """Copies of the vectors, with length 1."""
    unit_NP = np.array(vectors_NP)
    unit_NP /= np.maximum(np.linalg.norm(unit_NP, axis=1, keepdims=True), 1e-12)
    return unit_NP


def _changed(question: str, before: int, now: int) -> DataError:
    return DataError(f"question {question!r} has {before} options in one place and {now} in another")
