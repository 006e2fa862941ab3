"""Who is held out: whole countries and profiles first, then people; one person never stands on two sides of training.

A hash of the seed and a name decides, whatever else is in the data. So all kinds, stages and files of one source agree on who is
held out.

Shapes: N answers, P people, U units (countries, or profiles where there are no countries), G profiles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

SPLITS = ("train", "valid", "test", "heldout", "heldout_profiles")
TRAIN, VALID, TEST, HELDOUT, HELDOUT_PROFILES = range(len(SPLITS))


class Share(NamedTuple):
    """What part of the people, units or profiles is held out.

    Attributes:
        draw: [P], [U] or [G] of :func:`draws`. What lies below the fraction is held out.
        fraction: in [0, 1).
    """

    draw: np.ndarray
    fraction: float


def draws(seed: int, what: str, names: Iterable[str]) -> np.ndarray:
    """A number in [0, 1) for each name: the first 53 bits of SHA-256 of ``seed``, ``what`` and the name, divided by 2 ** 53.

    Args:
        seed: the split seed.
        what: the kind of thing that is named, so that people and countries of one name are independent.
    """
    head = f"{seed}\0{what}\0"
    first = [hashlib.sha256((head + name).encode()).digest()[:8] for name in names]
    return (np.frombuffer(b"".join(first), ">u8") >> np.uint64(11)) / 2.0**53


def assign_splits(
    person_N: np.ndarray, people: Share, unit_N: np.ndarray, units: Share, profile_N: np.ndarray, profiles: Share | None = None,
    given_N: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Give each answer its split.

    Units whose number lies below their fraction are held out with all their answers, then profiles, then people (for testing).
    The other answers of people who ever answered in a held-out unit or as a held-out profile are for testing too. Two exceptions
    keep tiny data usable. Where nobody would be left for training, the one with the largest number is (the same for units and
    profiles). Where nobody would be tested, the one of at least two people with the smallest number is.

    Args:
        person_N: [N] int, who answered.
        people: numbers of the P people, and the share for testing.
        unit_N: [N] int, country or profile; -1 where there is none (never held out).
        units: numbers of the U units, and the share held out.
        profile_N: [N] int.
        profiles: numbers of the G profiles, and the share held out; None holds out none.
        given_N: [N] int, TRAIN, VALID or TEST of each person where the source says so; then no people are drawn.

    Returns:
        [N] int8: index into ``SPLITS``.
    """
    held_N = np.isin(unit_N, _chosen(units, unit_N[unit_N >= 0]))
    held_profile_N = np.zeros(len(person_N), bool)
    if profiles is not None:
        held_profile_N = ~held_N & np.isin(profile_N, _chosen(profiles, profile_N[~held_N]))
    seen_there = np.unique(person_N[held_N | held_profile_N])
    if given_N is None:
        others = np.setdiff1d(person_N, seen_there)
        testers = _chosen(people, others)
        if not len(testers) and len(others) > 1:
            testers = others[[np.argmin(people.draw[others])]]
        split_N = np.where(np.isin(person_N, testers), TEST, TRAIN)
    else:
        split_N = given_N
    split_N = np.where(np.isin(person_N, seen_there), TEST, split_N)
    return np.where(held_N, HELDOUT, np.where(held_profile_N, HELDOUT_PROFILES, split_N)).astype(np.int8)


def _chosen(share: Share, present_N: np.ndarray) -> np.ndarray:
    """Those of ``present_N`` whose number lies below the fraction; the one with the largest number is never among them."""
    present = np.unique(present_N)
    draw = share.draw[present]
    chosen = draw < share.fraction
    if chosen.all() and len(present):
        chosen[np.argmax(draw)] = False
    return present[chosen]
