"""The columns of a split of choice questions, as evaluation reads them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cuma_ds.data.rows import Split
from cuma_ds.evaluation.columns import Indices, Labels, Ragged


@dataclass(frozen=True)
class ChoiceExamples:
    """M examples: who was asked what, and how many gave each answer.

    Attributes:
        questions: question id of each example.
        groups: the country, or ``profile <row>`` where the split names no group.
        profiles: row of each example's profile, int64 [M].
        counts: answers of each example, or sums of their survey weights, [n] each, n its number of options.
        texts: question id -> (question, options).
        people: who gave the answers of each example, those of its first option first; None where the data does not say.
        nominal: ids of the questions whose options have no order.
        answers: with survey weights, people who gave each answer of each example, integers [n].
        weights: with survey weights, that of each of ``people``.
        distributions: the answers are published shares; ``people`` then tells distributions apart.
    """

    questions: Labels
    groups: Labels
    profiles: Indices
    counts: Ragged
    texts: dict[str, tuple[str, list[str]]]
    people: Ragged | None = None
    nominal: frozenset[str] = frozenset()
    answers: Ragged | None = None
    weights: Ragged | None = None
    distributions: bool = False

    @classmethod
    def of(cls, split: Split | Mapping[str, Sequence]) -> ChoiceExamples:
        """Read a choice split, or a mapping of its columns to lists."""
        return cls._of_split(split) if isinstance(split, Split) else cls._of_columns(split)

    @classmethod
    def _of_split(cls, split: Split) -> ChoiceExamples:
        asked = split.questions.table.select(["question_id", "question", "options", "scale"]).to_pylist()
        profiles, table = split.numbers("profile").astype(np.int64), split.rows.table
        groups = group_names(split.groups)
        return cls(
            questions=Labels([row["question_id"] for row in asked], split.numbers("question")),
            groups=Labels(groups.names, groups.code_M[profiles]),
            profiles=profiles,
            counts=Ragged.of_lists(table["counts"]),
            texts={row["question_id"]: (row["question"], list(row["options"])) for row in asked},
            people=Ragged.of_lists(table["people"]),
            nominal=frozenset(row["question_id"] for row in asked if row["scale"] == "nominal"),
            answers=Ragged.of_lists(table["answers"]) if split.weighted else None,
            weights=Ragged.of_lists(table["weights"]) if split.weighted else None,
            distributions=split.distributions,
        )

    @classmethod
    def _of_columns(cls, split: Mapping[str, Sequence]) -> ChoiceExamples:
        questions, profiles = list(split["question_id"]), np.array(split["profile"], dtype=np.int64)
        texts: dict[str, tuple[str, list[str]]] = {}
        for question, text, options in zip(questions, split["question"], split["options"], strict=True):
            texts.setdefault(question, (text, list(options)))
        scales = split.get("scale", ["ordinal"] * len(questions))
        return cls(
            questions=Labels.of(questions),
            groups=Labels.of(
                [group or f"profile {profile}" for group, profile in zip(split["group"], profiles, strict=True)]
            ),
            profiles=profiles,
            counts=Ragged.of(split["counts"]),
            texts=texts,
            people=Ragged.of(split["people"], np.int64) if "people" in split else None,
            nominal=frozenset(
                question for question, scale in zip(questions, scales, strict=True) if scale == "nominal"
            ),
            answers=Ragged.of(split["answers"], np.int64) if "weights" in split else None,
            weights=Ragged.of(split["weights"]) if "weights" in split else None,
        )

    def only(self, chosen: Sequence[int] | Indices) -> ChoiceExamples:
        """The chosen examples, in their order."""
        return ChoiceExamples(
            questions=self.questions.take(chosen),
            groups=self.groups.take(chosen),
            profiles=self.profiles[np.asarray(chosen, dtype=np.int64)],
            counts=self.counts.take(chosen),
            texts=self.texts,
            people=None if self.people is None else self.people.take(chosen),
            nominal=self.nominal,
            answers=None if self.answers is None else self.answers.take(chosen),
            weights=None if self.weights is None else self.weights.take(chosen),
            distributions=self.distributions,
        )

    def __len__(self) -> int:
        return len(self.profiles)


def group_names(groups: Sequence[str]) -> Labels:
    """The group of every profile: its country, or ``profile <row>`` where it has none."""
    return Labels.of([group or f"profile {profile}" for profile, group in enumerate(groups)])


def swap_profiles(
    units: Sequence[str], groups: Sequence[str], profiles: Sequence[int] | Indices, seed: int = 0
) -> list[int]:
    """Another profile for every example: one of its unit (its question), of another group where there is one.

    In a unit of a single group, profiles are swapped as those of all examples together are.

    Args:
        units, groups, profiles: of each of M examples.

    Returns:
        M profile rows; as they are where there is only one profile.
    """
    everybody: dict[int, str] = {}
    members: dict[str, dict[int, str]] = {}
    profiles = [int(profile) for profile in profiles]
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
