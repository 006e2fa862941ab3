"""Ranks that do different amounts of work, and fail at different times."""

from __future__ import annotations

import json
from pathlib import Path

from ranks import run

HERE = Path(__file__).parents[1]


def test_a_rank_that_works_for_longer_than_the_others_would_wait_is_waited_for_and_its_error_is_everybodys() -> None:
    for rank, (code, out) in enumerate(run(2, [str(HERE / "helpers" / "slow_work.py")])):
        assert code == 0, out
        said = json.loads(out.strip().splitlines()[-1])
        assert said == [f"rank {rank}", "DataError", "rank 1: nothing here", f"rank {rank}"]
