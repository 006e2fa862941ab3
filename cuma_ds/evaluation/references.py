"""What a perfect dense model and a perfectly informed one would answer: the two ends every run is measured between."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

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
        normalise(_fitting(totals.get(question), counts, question)) for question, counts in zip(test.questions, test.counts, strict=True)
    ]


def oracle_reference(train: ChoiceExamples, test: ChoiceExamples) -> list[Array]:
    """Each profile gets the distribution of the training answers of the same profile to the same question.

    Returns:
        One distribution [n] per test example; the question's global one where the profile has no training answers.

    Raises:
        DataError: a question has another number of options in train than in test.
    """
    own = _histograms(zip(train.questions, train.profiles, strict=True), train)
    result = []
    for question, profile, fallback in zip(test.questions, test.profiles, collapse_reference(train, test), strict=True):
        counts = own.get((question, profile))
        result.append(fallback if counts is None or counts.sum() == 0 else normalise(counts))
    return result


def nearest_reference(train: ChoiceExamples, test: ChoiceExamples, embeddings_NP: NDArray[np.floating]) -> list[Array]:
    """Each profile gets the training answers of the training profile whose sentence embedding is nearest (cosine).

    What a look-up by similarity achieves for profiles that were never trained on; the question's global distribution where the
    nearest profile did not answer it.

    Args:
        embeddings_NP: raw embeddings of all profiles.
    """
    own = _histograms(zip(train.questions, train.profiles, strict=True), train)
    known = np.unique(train.profiles)
    unit_NP = embeddings_NP / np.maximum(np.linalg.norm(embeddings_NP, axis=1, keepdims=True), 1e-12)
    nearest = {profile: int(known[(unit_NP[known] @ unit_NP[profile]).argmax()]) for profile in set(test.profiles)}
    result = []
    for question, profile, fallback in zip(test.questions, test.profiles, collapse_reference(train, test), strict=True):
        counts = own.get((question, nearest[profile]))
        result.append(fallback if counts is None or counts.sum() == 0 else normalise(counts))
    return result


def has_training_answers(train: ChoiceExamples, test: ChoiceExamples) -> bool:
    """Whether any (question, profile) of ``test`` was answered in ``train``, so that there is an oracle at all."""
    return not set(zip(train.questions, train.profiles, strict=True)).isdisjoint(zip(test.questions, test.profiles, strict=True))


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
