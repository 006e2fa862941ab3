"""A reward as a plain callable: found by its name ``module:function``, called, and what it returns checked.

Shapes: M completions of this rank.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cuma_ds.data.rendering import Message
from cuma_ds.errors import ConfigError, CumaError, nearest
from cuma_ds.files import first_line

Array = NDArray[np.float64]


class RewardError(CumaError):
    """A reward that raised, or returned something else than one number or None per completion."""


class Reward(Protocol):
    """What can be a reward."""

    def __call__(
        self, prompts: list[Any], completions: list[str], profiles: list[Any], **columns: list[Any]
    ) -> Sequence[float | None]:
        """One entry per completion; None leaves a completion out of its group.

        Args:
            prompts: messages that each completion follows. The completions of one prompt stand together.
            completions: texts.
            profiles: who asked, each ``{"sentence": str, "fields": dict}``.
            columns: what the row of each completion has, see :data:`.rewards.COLUMNS`.
        """


class RewardInput(NamedTuple):
    """The arguments of a reward, of M completions."""

    prompts: list[list[Message]]
    completions: list[str]
    profiles: list[Any]
    columns: dict[str, list[Any]]


def imported_reward(spec: str, columns: Sequence[str]) -> Reward:
    """The callable ``module:function``; modules of the current folder are found, too.

    Raises:
        ConfigError: it is not there, or cannot be called as a reward is.
    """
    module, _, name = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        missing = "" if error.name is not None and f"{module}.".startswith(f"{error.name}.") else f" (for {module})"
        raise ConfigError(
            f"grpo.rewards: reward {spec!r}: there is no module {error.name}{missing} in the current folder "
            "or the environment"
        ) from None
    except Exception as error:
        raise ConfigError(
            f"grpo.rewards: reward {spec!r}: importing {module} failed: {type(error).__name__}: {first_line(error)}"
        ) from None
    if found is None:
        known = [other for other, value in vars(sys.modules[module]).items() if callable(value)]
        raise ConfigError(f"grpo.rewards: reward {spec!r}: module {module} has no {name!r}{nearest(name, known)}")
    if not callable(found) or inspect.iscoroutinefunction(found):
        kind = "a coroutine" if callable(found) else f"{type(found).__name__}, not callable"
        raise ConfigError(f"grpo.rewards: reward {spec!r} is {kind}; a plain function is expected")
    _check_signature(spec, found, columns)
    return found


def _check_signature(spec: str, reward: Callable[..., object], columns: Sequence[str]) -> None:
    try:
        signature = inspect.signature(reward)
    except ValueError:  # a builtin function need not have one
        return
    try:
        signature.bind([], [], [], **dict.fromkeys(columns, ()))
    except TypeError as error:
        raise ConfigError(
            f"grpo.rewards: reward {spec!r} has signature {signature}, expected (prompts, completions, profiles, "
            f"**columns) with columns {', '.join(columns)}: {first_line(error)}"
        ) from None


def called(spec: str, reward: Reward, batch: RewardInput) -> Array:
    """[M] what a reward gives; nan for None.

    Raises:
        RewardError: what it raised or returned instead.
    """
    # Lists of its own, so that it cannot change what others are told.
    columns: Mapping[str, list[Any]] = {name: list(column) for name, column in batch.columns.items()}
    try:
        given = reward(list(batch.prompts), list(batch.completions), list(batch.profiles), **columns)
    except CumaError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)[1:]
        place = f" ({Path(frames[0].filename).name}:{frames[0].lineno})" if frames else ""
        raise RewardError(f"reward {spec} raised {type(error).__name__}: {first_line(error)}{place}") from None
    if isinstance(given, str | bytes | Mapping) or not hasattr(given, "__len__"):
        raise RewardError(
            f"reward {spec} returned {type(given).__name__}; a list with a number or None for each completion is "
            "expected"
        )
    entries, expected = list(given), len(batch.completions)
    if len(entries) != expected:
        raise RewardError(f"reward {spec} returned {len(entries)} entries for {expected} completions")
    return np.array([_number(spec, entry, place, expected) for place, entry in enumerate(entries)])


def _number(spec: str, entry: object, place: int, count: int) -> float:
    if entry is None:
        return math.nan
    try:
        number = math.nan if isinstance(entry, str | bytes) else float(entry)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise RewardError(
            f"reward {spec} returned {str(entry)[:40]!r} for completion {place} of {count} (counted from 0); "
            "a finite number is expected, or None to leave the completion out"
        )
    return number
