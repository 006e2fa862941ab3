"""Learning-rate schedules as pure functions of the step, so that resuming needs no state."""

from __future__ import annotations

import math

from cuma_ds.config import RunConfig, TrainingSection
from cuma_ds.errors import ConfigError


def learning_rate(step: int, training: TrainingSection) -> float:
    """Rate of optimizer step ``step`` (from 0): linear warm-up to the peak, then constant, linear to 0 or half a
    cosine to 0 at the end of the run, or of ``schedule_steps``.

    Args:
        training: its ``steps`` are those of the run, see :func:`with_steps`.
    """
    peak, warmup = training.learning_rate, training.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, (training.schedule_steps or training.steps) - warmup)
    match training.schedule:
        case "constant":
            return peak
        case "linear":
            return peak * (1 - progress)
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))


def with_steps(config: RunConfig, examples: int) -> RunConfig:
    """The recipe with ``training.steps`` worked out from ``training.epochs``; as it is where there are none.

    The last step of the last epoch may go on into the next one. A step of GRPO learns from ``global_batch_size``
    prompts, and ``grpo.iterations`` steps from the same ones.

    Args:
        config: the recipe.
        examples: of the training split.

    Raises:
        ConfigError: the warm-up or the schedule does not fit.
    """
    training = config.training
    if training.epochs is None:
        return config
    # A hair less, so that 0.1 + 0.2 epochs of 10 examples are 3 of them.
    batches = max(1, math.ceil(training.epochs * examples / training.global_batch_size - 1e-9))
    steps = batches * (config.grpo.iterations if config.grpo is not None else 1)
    try:
        training.check_length(steps)
    except ValueError as error:
        raise ConfigError(f"training.epochs {training.epochs:g} of {examples} examples: {error}") from None
    return config.model_copy(update={"training": training.model_copy(update={"steps": steps})})
