"""The model of a report, asked in several ways. What can be said without a model is in :mod:`.references`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from torch import Tensor

from cuma_ds.evaluation.examples import ChoiceExamples, swap_profiles
from cuma_ds.evaluation.subject import Subject


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
        if swapped != examples.profiles.tolist():
            ways["swapped"] = Asking("profiles swapped", subject.embeddings_NP, nullcontext, profiles=swapped)
    return ways
