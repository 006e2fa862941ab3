"""Learning-rate schedules as pure functions of the step, so that resuming needs no state."""

from __future__ import annotations

import math

from cuma_ds.config import TrainingSection


def learning_rate(step: int, training: TrainingSection) -> float:
    """Rate of optimizer step ``step`` (from 0): linear warm-up to the peak, then constant, linear to 0 or half a
    cosine to 0.
    """
    peak, warmup = training.learning_rate, training.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, training.steps - warmup)
    match training.schedule:
        case "constant":
            return peak
        case "linear":
            return peak * (1 - progress)
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))
