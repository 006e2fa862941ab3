"""Published distributions: the options that lie on a question's scale, in its order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cuma_ds.data.sources.records import shares_of
from cuma_ds.errors import DataError


class OnScale(NamedTuple):
    """Options in the order of their scale, and their shares among the answers that lie on it."""

    options: list[str]
    shares: list[float]


def on_scale(options: Sequence[str], shares: object, places: Sequence[float | None]) -> OnScale | None:
    """Leave out options that are no answer, and order the others.

    Args:
        options: as published.
        shares: of each option, adding up to 1 but for rounding.
        places: where each option stands on the scale; None for one that does not. Equal places keep their order.

    Returns:
        None where the shares do not fit, or fewer than two options or no answers are left.
    """
    kept = sorted((place, number) for number, place in enumerate(places) if place is not None)
    try:
        known = shares_of(shares, tuple(options), "")
    except DataError:
        return None
    total = sum(known[number] for _, number in kept)
    if len(kept) < 2 or not total or len({options[number] for _, number in kept}) < len(kept):
        return None
    return OnScale([options[number] for _, number in kept], [known[number] / total for _, number in kept])
