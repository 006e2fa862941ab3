"""Which learning rate to try next, and which one is the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

# Rate -> how bad it is on the people for choosing settings; None where the run failed.
Tried = Mapping[float, float | None]


def next_rate(grid: Sequence[float], tried: Tried, extend: int) -> float | None:
    """The next learning rate to try; None once there is nothing more to try.

    First the grid. Then, while the best of all is at an edge, one rate beyond it, as far out as the last two differ.

    Args:
        grid: at least two rates, or one and no ``extend``.
        tried: results so far.
        extend: most rates beyond the grid, both sides together.
    """
    for rate in grid:
        if rate not in tried:
            return rate
    rates, best = sorted(tried), best_rate(tried)
    if best is None or len(rates) < 2 or len(rates) - len(grid) >= extend:
        return None
    if best == rates[-1]:
        return _rounded(rates[-1] * rates[-1] / rates[-2])
    return _rounded(rates[0] * rates[0] / rates[1]) if best == rates[0] else None


def best_rate(tried: Tried) -> float | None:
    """The rate with the lowest result, the smaller of two equals; None where every run failed."""
    known = {rate: value for rate, value in tried.items() if value is not None and math.isfinite(value)}
    return min(sorted(known), key=lambda rate: known[rate], default=None)


def at_edge(tried: Tried) -> bool:
    """Whether the best rate is the smallest or the largest that was tried, and one of several."""
    return len(tried) > 1 and best_rate(tried) in (min(tried), max(tried))


def _rounded(rate: float) -> float:
    """Three digits, so that names of runs stay short."""
    return float(f"{rate:.3g}")
