"""What a judge said of pairs of answers, for a report: counts, and the win rate with its interval over people."""

from __future__ import annotations

from collections import Counter

import numpy as np

from cuma_ds.evaluation.report.model import Verdicts, number
from cuma_ds.evaluation.resampling import interval, resample
from cuma_ds.judge import SCORE, Comparison


def verdicts(found: Comparison, model: str, replicates: int, seed: int = 0) -> Verdicts:
    """Counts and the win rate with its interval over people.

    Args:
        found: the result of every pair.
        model: the judge's name.
        replicates: bootstrap samples of people.
        seed: of the bootstrap.
    """
    counts = Counter(found.results)
    decided = [index for index, result in enumerate(found.results) if result in SCORE]
    spread = None
    if decided and replicates:
        scores = np.array([SCORE[found.results[index]] for index in decided])
        person = np.unique([found.people[index] for index in decided], return_inverse=True)[1]
        total_U, pairs_U = np.bincount(person, scores), np.bincount(person).astype(np.float64)
        weights = np.concatenate(list(resample(np.ones(len(pairs_U), dtype=np.int64), replicates, seed, replicates)))
        spread = interval((weights @ total_U) / (weights @ pairs_U), float(scores.mean()))
    return Verdicts(
        model=model,
        pairs=len(found.results),
        win=counts["win"],
        loss=counts["loss"],
        tie=counts["tie"],
        failed=counts["failed"],
        unreadable=counts["unreadable"],
        disagreed=found.disagreed,
        win_rate=number(found.win_rate),
        interval=None if spread is None else (number(spread[0]), number(spread[1])),
        first_preferred=number(found.first[0] / found.first[1]) if found.first[1] else None,
        failures=found.failures,
        refused=list(found.refused),
    )
