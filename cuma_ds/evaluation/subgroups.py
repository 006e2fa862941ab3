"""Subgroups of people by their profile fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cuma_ds.profiles.linearize import is_missing

# A field of numbers with more values than this (an age in years) is cut into four groups of about equal size.
_MOST_NUMBERS = 12


def subgroups(profiles: Sequence[Mapping[str, Any]]) -> dict[str, list[str | None]]:
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


def _labels(values: Sequence[Any]) -> list[str | None]:
    known = [value for value in values if value is not None]
    numbers = [value for value in known if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(known) or len(set(numbers)) <= _MOST_NUMBERS:
        return [None if value is None else " ".join(str(value).split()) for value in values]
    edges = np.unique(np.quantile(numbers, [0.25, 0.5, 0.75]))
    place = [None if value is None else int(np.searchsorted(edges, value, side="right")) for value in values]
    spans = {}
    for group in {spot for spot in place if spot is not None}:
        inside = [value for value, spot in zip(values, place, strict=True) if spot == group]
        spans[group] = f"{min(inside):g} to {max(inside):g}"
    return [None if spot is None else spans[spot] for spot in place]
