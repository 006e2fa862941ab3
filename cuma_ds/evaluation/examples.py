"""The columns of a split of choice questions, as evaluation reads them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cuma_ds.data.rows import Split


@dataclass(frozen=True)
class ChoiceExamples:
    """M examples: who was asked what, and how many gave each answer.

    Attributes:
        questions: question id of each example.
        groups: the country, or ``profile <row>`` where the split names no group.
        profiles: row of each example's profile.
        counts: answers of each example, or sums of their survey weights, float64 [n], n its number of options.
        texts: question id -> (question, options).
        people: who gave the answers of each example, those of its first option first; None where the data does not say.
        nominal: ids of the questions whose options have no order.
        answers: with survey weights, people who gave each answer of each example, int64 [n].
        weights: with survey weights, that of each of ``people``.
        distributions: the answers are published shares; ``people`` then tells distributions apart.
    """

    questions: list[str]
    groups: list[str]
    profiles: list[int]
    counts: list[NDArray[np.float64]]
    texts: dict[str, tuple[str, list[str]]]
    people: list[NDArray[np.int64]] | None = None
    nominal: frozenset[str] = frozenset()
    answers: list[NDArray[np.int64]] | None = None
    weights: list[NDArray[np.float64]] | None = None
    distributions: bool = False

    @classmethod
    def of(cls, split: Split | Mapping[str, Sequence]) -> ChoiceExamples:
        """Read a choice split, or a mapping of its columns."""
        profiles = [int(profile) for profile in split["profile"]]
        questions = list(split["question_id"])
        texts: dict[str, tuple[str, list[str]]] = {}
        for question, text, options in zip(questions, split["question"], split["options"], strict=True):
            texts.setdefault(question, (text, list(options)))
        names = split.column_names if isinstance(split, Split) else list(split)
        weighted = "weights" in names
        scales = split["scale"] if "scale" in names else ["ordinal"] * len(questions)
        return cls(
            questions=questions,
            groups=[group or f"profile {profile}" for group, profile in zip(split["group"], profiles, strict=True)],
            profiles=profiles,
            counts=[np.asarray(counts, dtype=np.float64) for counts in split["counts"]],
            texts=texts,
            people=[np.asarray(people, dtype=np.int64) for people in split["people"]] if "people" in names else None,
            nominal=frozenset(
                question for question, scale in zip(questions, scales, strict=True) if scale == "nominal"
            ),
            answers=[np.asarray(answers, dtype=np.int64) for answers in split["answers"]] if weighted else None,
            weights=[np.asarray(weights, dtype=np.float64) for weights in split["weights"]] if weighted else None,
            distributions=isinstance(split, Split) and split.distributions,
        )

    def only(self, chosen: Sequence[int]) -> ChoiceExamples:
        """The chosen examples, in their order."""
        return ChoiceExamples(
            questions=[self.questions[index] for index in chosen],
            groups=[self.groups[index] for index in chosen],
            profiles=[self.profiles[index] for index in chosen],
            counts=[self.counts[index] for index in chosen],
            texts=self.texts,
            people=None if self.people is None else [self.people[index] for index in chosen],
            nominal=self.nominal,
            answers=None if self.answers is None else [self.answers[index] for index in chosen],
            weights=None if self.weights is None else [self.weights[index] for index in chosen],
            distributions=self.distributions,
        )

    def __len__(self) -> int:
        return len(self.questions)


def swap_profiles(units: Sequence[str], groups: Sequence[str], profiles: Sequence[int], seed: int = 0) -> list[int]:
    """Another profile for every example: one of its unit (its question), of another group where there is one.

    In a unit of a single group, profiles are swapped as those of all examples together are.

    Args:
        units, groups, profiles: of each of M examples.

    Returns:
        M profile rows; as they are where there is only one profile.
    """
    everybody: dict[int, str] = {}
    members: dict[str, dict[int, str]] = {}
    for unit, group, profile in zip(units, groups, profiles, strict=True):
        everybody.setdefault(profile, group)
        members.setdefault(unit, {}).setdefault(profile, group)
    overall = _derangement(everybody, seed)
    partner = {
        unit: _derangement(group_of, seed) if len(set(group_of.values())) > 1 else overall
        for unit, group_of in members.items()
    }
    return [partner[unit][profile] for unit, profile in zip(units, profiles, strict=True)]


def _derangement(group_of: Mapping[int, str], seed: int) -> dict[int, int]:
    """The profile that each of several profiles is swapped with.

    The profiles stand group by group, groups in a seeded order, and are shifted by the size of the largest group. That
    leaves no profile in its group unless one group holds more than half of them.

    Args:
        group_of: profile -> its group.
    """
    sizes: dict[str, int] = {}
    for group in group_of.values():
        sizes[group] = sizes.get(group, 0) + 1
    names = sorted(sizes)
    random.Random(seed).shuffle(names)
    place = {name: position for position, name in enumerate(names)}
    line = sorted(group_of, key=lambda profile: (place[group_of[profile]], profile))
    shift = max(sizes.values()) % len(line) or min(1, len(line) - 1)
    return {profile: line[(position + shift) % len(line)] for position, profile in enumerate(line)}
