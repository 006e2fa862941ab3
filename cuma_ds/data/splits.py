"""Who is held out: whole countries and profiles first, then people; one person never stands on two sides of training.
Whole questions may be held out besides, with everybody's answers to them.

A hash of the seed and a name decides, whatever else is in the data. So all kinds, stages and files of one source agree
on who is held out.

Shapes: N answers, P people, U units (countries, or profiles where there are no countries), G profiles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

SPLITS = ("train", "valid", "test", "heldout", "heldout_profiles", "heldout_questions")
# Answers to judge a model by that a source names itself. Their people stand in one of the splits above, too.
PROBE = "probe"
TRAIN, VALID, TEST, HELDOUT, HELDOUT_PROFILES, HELDOUT_QUESTIONS = range(len(SPLITS))


class Share(NamedTuple):
    """Which people, units or profiles the answers belong to, and what part of them is held out.

    Attributes:
        of_N: [N] int, person, unit or profile of each answer; -1 where there is none (never held out).
        draw: [P], [U] or [G] of :func:`draws`. What lies below the fraction is held out.
        fraction: in [0, 1).
    """

    of_N: np.ndarray
    draw: np.ndarray
    fraction: float


def draws(seed: int, what: str, names: Iterable[str]) -> np.ndarray:
    """A number in [0, 1) for each name: the first 53 bits of SHA-256 of ``seed``, ``what`` and the name, divided by 2
    ** 53.

    Args:
        seed: the split seed.
        what: the kind of thing that is named, so that people and countries of one name are independent.
    """
    head = f"{seed}\0{what}\0"
    first = [hashlib.sha256((head + name).encode()).digest()[:8] for name in names]
    return (np.frombuffer(b"".join(first), ">u8") >> np.uint64(11)) / 2.0**53


def assign_splits(
    people: Share,
    units: Share,
    profiles: Share,
    given_N: np.ndarray | None = None,
    valid_fraction: float = 0.0,
) -> np.ndarray:
    """Give each answer its split.

    Units whose number lies below their fraction are held out with all their answers, then profiles, then people for
    testing. The people with the next larger numbers are for validation. The other answers of people who ever answered
    in a held-out unit or as a held-out profile are for testing too. Two exceptions keep tiny data usable. Where no
    person would be left for training, the one with the largest number is (the same for units and profiles). Where no
    person would be tested, the one of at least two people with the smallest number is.

    Args:
        people: the share for testing.
        units: countries, or profiles where there are no countries.
        profiles: of the other units.
        given_N: [N] int, TRAIN, VALID or TEST of each answer's person where the source says so; then no people are
            drawn.
        valid_fraction: share of people for validation; who is tested does not depend on it.

    Returns:
        [N] int8: index into ``SPLITS``, never that of held-out questions.
    """
    person_N = people.of_N
    held_N = np.isin(units.of_N, chosen(units, units.of_N[units.of_N >= 0]))
    held_profile_N = ~held_N & np.isin(profiles.of_N, chosen(profiles, profiles.of_N[~held_N]))
    seen_there = np.unique(person_N[held_N | held_profile_N])
    if given_N is None:
        others = np.setdiff1d(person_N, seen_there)
        testers = chosen(people, others)
        if not len(testers) and len(others) > 1:
            testers = others[[np.argmin(people.draw[others])]]
        draw_N = people.draw[person_N]
        validates_N = (draw_N >= people.fraction) & (draw_N < people.fraction + valid_fraction)
        split_N = np.where(np.isin(person_N, testers), TEST, np.where(validates_N, VALID, TRAIN))
    else:
        split_N = given_N
    split_N = np.where(np.isin(person_N, seen_there), TEST, split_N)
    return np.where(held_N, HELDOUT, np.where(held_profile_N, HELDOUT_PROFILES, split_N)).astype(np.int8)


def chosen(share: Share, present_N: np.ndarray) -> np.ndarray:
    """Those of ``present_N`` whose number lies below the fraction; the one with the largest number is never among
    them.
    """
    present = np.unique(present_N)
    draw = share.draw[present]
    below = draw < share.fraction
    if below.all() and len(present):
        below[np.argmax(draw)] = False
    return present[below]
