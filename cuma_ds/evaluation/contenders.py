"""What a report compares: the model asked in several ways, and references without a model.

The references are a perfect dense model (``collapse``), a perfectly informed one (``oracle``) and a look-up of the
nearest training profile (``nearest``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cuma_ds.errors import DataError
from cuma_ds.evaluation.examples import ChoiceExamples, swap_profiles
from cuma_ds.evaluation.metrics import normalise
from cuma_ds.evaluation.subject import Subject

Array = NDArray[np.float64]


class Asking(NamedTuple):
    """One way of asking a model.

    Attributes:
        label: its name in progress.
        embeddings_NP: raw embeddings of the profiles; None to ask without.
        model_as: context in which the model is asked.
        profiles: rows of ``embeddings_NP`` instead of the examples' own.
        record: also collect the routing.
    """

    label: str
    embeddings_NP: Tensor | None
    model_as: Callable[[], AbstractContextManager[object]]
    profiles: Sequence[int] | None = None
    record: bool = False


def ways_of_asking(subject: Subject, examples: ChoiceExamples) -> dict[str, Asking]:
    """How each contender that is a model is asked: backbone, start policy, trained, and with profiles swapped."""
    if subject.untrained is None:
        return {"before": Asking("as it is", None, nullcontext)}
    ways = {"before": Asking("before training", None, subject.untrained)}
    if subject.started is not None:
        ways["start"] = Asking("start policy", subject.embeddings_NP, subject.started)
    ways["trained"] = Asking("trained", subject.embeddings_NP, nullcontext, record=True)
    if subject.embeddings_NP is not None:
        swapped = swap_profiles(examples.questions, examples.groups, examples.profiles)
        if swapped != examples.profiles:
            ways["swapped"] = Asking("profiles swapped", subject.embeddings_NP, nullcontext, profiles=swapped)
    return ways


def references(
    train: ChoiceExamples, test: ChoiceExamples, embeddings_NP: Tensor | None, min_answers: int
) -> dict[str, Sequence[Array]]:
    """Distributions [n] of every test example by each reference that the data allows."""
    found: dict[str, Sequence[Array]] = {"collapse": collapse_reference(train, test)}
    if has_training_answers(train, test, min_answers):
        found["oracle"] = oracle_reference(train, test, min_answers)
    if embeddings_NP is not None and set(train.profiles).isdisjoint(test.profiles):
        found["nearest"] = nearest_reference(train, test, embeddings_NP.numpy(), min_answers)
    return found


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
