"""Subgroups of people by their profile fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from cuma_ds.data.raw import Profile
from cuma_ds.evaluation.examples import ChoiceExamples
from cuma_ds.profiles.linearize import is_missing

# A field of numbers with more values than this (an age in years) is cut into four groups of about equal size.
_MOST_NUMBERS = 12


def subgroups(profiles: Sequence[Profile]) -> dict[str, list[str | None]]:
    """The subgroup of every profile, for each field that has at least two.

    Args:
        profiles: as in prepared data, each with its ``fields``.

    Returns:
        Field name -> one label per profile; None where the field has no answer.
    """
    names = list(dict.fromkeys(name for profile in profiles for name in profile["fields"]))
    found = {}
    for name in names:
        values = [profile["fields"].get(name) for profile in profiles]
        labels = _labels([None if is_missing(value) else value for value in values])
        if len(set(labels) - {None}) > 1:
            found[name] = labels
    return found


def large_enough(
    fields: Mapping[str, Sequence[str | None]], examples: ChoiceExamples, least: int
) -> dict[str, list[str | None]]:
    """The subgroups that may be named: None for labels with fewer than ``least`` people among the examples.

    Where the data does not say who answered, answers are counted instead.
    """
    found = {}
    for field, labels in fields.items():
        names, code_M = coded([labels[profile] for profile in examples.profiles.tolist()])
        if examples.people is None:
            size = np.bincount(code_M + 1, examples.counts.sums(), len(names) + 1)
        else:
            code_A = np.repeat(code_M, examples.people.lengths_M)
            pairs = np.unique(np.stack([code_A, examples.people.values_F]), axis=1)
            size = np.bincount(pairs[0] + 1, minlength=len(names) + 1)
        named = {name for name, count in zip(names, size[1:], strict=True) if count >= least}
        found[field] = [label if label in named else None for label in labels]
    return found


def coded(labels: Sequence[str | None]) -> tuple[list[str], NDArray[np.int64]]:
    """The different labels of M examples, and which of them each example has [M]; -1 for None.

    Labels that begin with a number stand in its order, after them the others by name.
    """
    names = sorted({label for label in labels if label is not None}, key=_natural)
    place = {name: index for index, name in enumerate(names)}
    return names, np.array([-1 if label is None else place[label] for label in labels], dtype=np.int64)


def _natural(label: str) -> tuple[float, str]:
    head = label.split()[0].rstrip("+,.-") if label.split() else ""
    return (float(head), label) if head.isdigit() else (float("inf"), label)


def _labels(values: Sequence[object]) -> list[str | None]:
    """A label for each value; None stays None. Numbers with many values get the span of the quarter they lie in."""
    numbers = {
        place: value
        for place, value in enumerate(values)
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    known = sum(value is not None for value in values)
    if len(numbers) < known or len(set(numbers.values())) <= _MOST_NUMBERS:
        return [None if value is None else " ".join(str(value).split()) for value in values]
    edges = np.unique(np.quantile(list(numbers.values()), [0.25, 0.5, 0.75]))
    inside: dict[int, list[float]] = {}
    for value in numbers.values():
        inside.setdefault(int(np.searchsorted(edges, value, side="right")), []).append(value)
    span = {value: f"{min(quarter):g} to {max(quarter):g}" for quarter in inside.values() for value in quarter}
    return [span[numbers[place]] if place in numbers else None for place in range(len(values))]
