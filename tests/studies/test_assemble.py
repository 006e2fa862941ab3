"""What a study's report says of time."""

from __future__ import annotations

import pytest

from cuma_ds.studies.assemble import seconds_until, when_reached
from cuma_ds.studies.report.markdown import when
from cuma_ds.studies.report.model import Curve, CurvePoint, Reached


def _curve(*values: float) -> Curve:
    points = [CurvePoint(step=step, tokens=1.0, seconds=10.0 * step, value=one) for step, one in enumerate(values, 1)]
    return Curve(steps=[], tokens=[], seconds=[], loss=[], valid=points)


def test_a_target_is_reached_between_checkpoints_before_the_first_or_by_some_seeds() -> None:
    falling, low, high = _curve(0.08, 0.04), _curve(0.03, 0.02), _curve(0.09, 0.08)
    assert seconds_until(falling, 0.06) == pytest.approx(15.0)
    assert seconds_until(low, 0.06) == 10.0  # the most that it took
    assert seconds_until(high, 0.06) is None
    assert when_reached([falling, high], 0.06) == Reached(seconds=15.0, seeds=1, of=2)
    assert when_reached([falling, low], 0.06) == Reached(seconds=12.5, seeds=2, of=2, at_most=True)
    assert when_reached([high], 0.06) == Reached(of=1)
    shown = [when(when_reached(curves, 0.06)) for curves in ([falling, high], [low], [high])]
    assert shown == ["15 s (1 of 2 seeds)", "≤ 10 s", "not reached"]
