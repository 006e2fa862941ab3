"""Who is held out: whole countries (or profiles) first, then people; one person never stands on two sides of training."""

from __future__ import annotations

import numpy as np

SPLITS = ("train", "test", "heldout")


def assign_splits(person_N: np.ndarray, unit_N: np.ndarray, test_fraction: float, heldout_fraction: float, seed: int) -> np.ndarray:
    """Give each answer its split.

    ``round(heldout_fraction * units)`` units are held out with all their answers. Of the people who never answered in a
    held-out unit, ``round(test_fraction * people)`` are for testing; the other answers of people who did are for testing too.

    Args:
        person_N: [N] int, who answered.
        unit_N: [N] int, country or profile; -1 where there is none (never held out).
        test_fraction: share of people, in (0, 1).
        heldout_fraction: share of units, in [0, 1).
        seed: of both draws.

    Returns:
        [N] int8: index into ``SPLITS``.
    """
    rng = np.random.default_rng(seed)
    units = np.unique(unit_N[unit_N >= 0])
    held_units = rng.permutation(units)[: max(0, min(round(heldout_fraction * len(units)), len(units) - 1))]
    held_N = np.isin(unit_N, held_units)
    seen_there = np.unique(person_N[held_N])
    people = np.setdiff1d(person_N, seen_there)
    n_test = min(max(1, round(test_fraction * len(people))), len(people) - 1)
    testers = rng.permutation(people)[: max(0, n_test)]
    test_N = np.isin(person_N, np.concatenate([testers, seen_there]))
    return np.where(held_N, 2, np.where(test_N, 1, 0)).astype(np.int8)
