"""Who is held out: whole countries and profiles first, then people; one person never stands on two sides of training."""

from __future__ import annotations

import numpy as np

SPLITS = ("train", "valid", "test", "heldout", "heldout_profiles")
TRAIN, VALID, TEST, HELDOUT, HELDOUT_PROFILES = range(len(SPLITS))


def assign_splits(
    person_N: np.ndarray,
    unit_N: np.ndarray,
    test_fraction: float,
    heldout_fraction: float,
    seed: int,
    profile_N: np.ndarray | None = None,
    heldout_profile_fraction: float = 0.0,
    given_N: np.ndarray | None = None,
) -> np.ndarray:
    """Give each answer its split.

    ``round(heldout_fraction * units)`` units are held out with all their answers, then ``round(heldout_profile_fraction *
    profiles)`` of the profiles that remain. Of the people who never answered in a held-out unit or as a held-out profile,
    ``round(test_fraction * people)`` are for testing; the other answers of people who did are for testing too.

    Args:
        person_N: [N] int, who answered.
        unit_N: [N] int, country or profile; -1 where there is none (never held out).
        test_fraction: share of people, in (0, 1).
        heldout_fraction: share of units, in [0, 1).
        seed: of all draws.
        profile_N: [N] int; needed with ``heldout_profile_fraction``.
        heldout_profile_fraction: share of profiles, in [0, 1).
        given_N: [N] int, TRAIN, VALID or TEST of each person where the source says so; then no people are drawn.

    Returns:
        [N] int8: index into ``SPLITS``.
    """
    rng = np.random.default_rng(seed)
    held_N = np.isin(unit_N, _draw(rng, np.unique(unit_N[unit_N >= 0]), heldout_fraction))
    held_profile_N = np.zeros(len(person_N), bool)
    if profile_N is not None and heldout_profile_fraction:
        profiles = np.unique(profile_N[~held_N])
        held_profile_N = ~held_N & np.isin(profile_N, _draw(np.random.default_rng([seed, 1]), profiles, heldout_profile_fraction))
    seen_there = np.unique(person_N[held_N | held_profile_N])
    if given_N is None:
        people = np.setdiff1d(person_N, seen_there)
        n_test = min(max(1, round(test_fraction * len(people))), len(people) - 1)
        testers = rng.permutation(people)[: max(0, n_test)]
        split_N = np.where(np.isin(person_N, testers), TEST, TRAIN)
    else:
        split_N = given_N
    split_N = np.where(np.isin(person_N, seen_there), TEST, split_N)
    return np.where(held_N, HELDOUT, np.where(held_profile_N, HELDOUT_PROFILES, split_N)).astype(np.int8)


def _draw(rng: np.random.Generator, units: np.ndarray, fraction: float) -> np.ndarray:
    """``round(fraction * units)`` of the units; at least one is left."""
    return rng.permutation(units)[: max(0, min(round(fraction * len(units)), len(units) - 1))]
