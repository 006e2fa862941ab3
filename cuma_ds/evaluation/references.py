"""Contenders without a model: a perfect dense model, a perfectly informed one, and a look-up of the nearest profile."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from cuma_ds.errors import DataError
from cuma_ds.evaluation.examples import ChoiceExamples
from cuma_ds.evaluation.metrics import normalise

Array = NDArray[np.float64]


def collapse_reference(train: ChoiceExamples, test: ChoiceExamples) -> list[Array]:
    """Mean collapse: everyone gets the answer distribution of all training answers to the question.

    Returns:
        One distribution [n] per test example; uniform for a question without training answers.

    Raises:
        DataError: a question has another number of options in train than in test.
    """
    totals = _histograms(train.questions, train)
    return [
        normalise(_fitting(totals.get(question), counts, question))
        for question, counts in zip(test.questions, test.counts, strict=True)
    ]


def oracle_reference(train: ChoiceExamples, test: ChoiceExamples, min_answers: int) -> list[Array]:
    """Each example gets the training answers of its own people to its question.

    Its own people are those of the same profile where they gave at least ``min_answers`` training answers to the
    question, else those of the same group, else everybody. A profile that one or two people share says nothing about
    how the next of them answers.

    Returns:
        One distribution [n] per test example.

    Raises:
        DataError: a question has another number of options in train than in test.
    """
    return _own_answers(train, test, test.profiles, test.groups, min_answers)


def nearest_reference(
    train: ChoiceExamples, test: ChoiceExamples, embeddings_NP: NDArray[np.floating], min_answers: int
) -> list[Array]:
    """Each example gets the :func:`oracle_reference` of the training profile with the nearest embedding (cosine).

    This is what a look-up by similarity achieves for profiles that were never trained on.

    Args:
        embeddings_NP: raw embeddings of all profiles.
    """
    known = np.unique(train.profiles)
    unit_NP = embeddings_NP / np.maximum(np.linalg.norm(embeddings_NP, axis=1, keepdims=True), 1e-12)
    nearest = {profile: int(known[(unit_NP[known] @ unit_NP[profile]).argmax()]) for profile in set(test.profiles)}
    group_of = dict(zip(train.profiles, train.groups, strict=True))
    profiles = [nearest[profile] for profile in test.profiles]
    return _own_answers(train, test, profiles, [group_of[profile] for profile in profiles], min_answers)


def has_training_answers(train: ChoiceExamples, test: ChoiceExamples, min_answers: int) -> bool:
    """Whether any (question, group) of ``test`` has ``min_answers`` answers in ``train``; else there is no oracle."""
    known = _histograms(zip(train.questions, train.groups, strict=True), train)
    enough = {key for key, counts in known.items() if counts.sum() >= min_answers}
    return not enough.isdisjoint(zip(test.questions, test.groups, strict=True))


def _own_answers(
    train: ChoiceExamples, test: ChoiceExamples, profiles: Sequence[int], groups: Sequence[str], min_answers: int
) -> list[Array]:
    of_profile = _histograms(zip(train.questions, train.profiles, strict=True), train)
    of_group = _histograms(zip(train.questions, train.groups, strict=True), train)
    result = []
    for question, profile, group, everybody in zip(
        test.questions, profiles, groups, collapse_reference(train, test), strict=True
    ):
        own = (of_profile.get((question, profile)), of_group.get((question, group)))
        enough = (normalise(counts) for counts in own if counts is not None and counts.sum() >= min_answers)
        result.append(next(enough, everybody))
    return result


def _histograms(keys: Iterable[Hashable], train: ChoiceExamples) -> dict[Hashable, Array]:
    totals: dict[Hashable, Array] = {}
    for key, counts, question in zip(keys, train.counts, train.questions, strict=True):
        totals[key] = counts if key not in totals else totals[key] + _fitting(counts, totals[key], question)
    return totals


def _fitting(counts: Array | None, like: Array, question: str) -> Array:
    if counts is None:
        return np.zeros_like(like)
    if len(counts) != len(like):
        raise DataError(f"question {question!r} has {len(counts)} options in one place and {len(like)} in another")
    return counts
