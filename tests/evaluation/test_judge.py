"""What a report says of a judge's verdicts."""

from __future__ import annotations

import numpy as np
import pytest

from cuma_ds.evaluation.judge import verdicts
from cuma_ds.judge import Comparison


def test_summary_counts_and_draws_people() -> None:
    results = ["win"] * 30 + ["loss"] * 10 + ["tie"] * 20 + ["failed"] * 5 + ["unreadable"] * 3
    alone = verdicts(
        Comparison(results, list(range(68)), 4, (50, 100), {"status 500": 7}, 0, ("temperature",)), "m", 2000
    )
    assert {name: getattr(alone, name) for name in ("pairs", "win", "loss", "tie", "failed", "unreadable")} == {
        "pairs": 68, "win": 30, "loss": 10, "tie": 20, "failed": 5, "unreadable": 3,
    }  # fmt: skip
    assert alone.win_rate == pytest.approx(40 / 60, abs=1e-6)
    assert (alone.first_preferred, alone.failures, alone.refused) == (0.5, {"status 500": 7}, ["temperature"])
    scores = np.array([1.0] * 30 + [0.0] * 10 + [0.5] * 20)
    spread = 1.96 * scores.std() / np.sqrt(60)
    assert alone.interval == pytest.approx([40 / 60 - spread, 40 / 60 + spread], abs=0.02)
    few = verdicts(Comparison(results, [number // 6 for number in range(68)], 0, (0, 0), {}, 0), "m", 2000)
    assert few.interval[1] - few.interval[0] > 1.5 * (alone.interval[1] - alone.interval[0])
