"""The groups of people that have metrics, or an advantage history, of their own: ``training.group_field``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cuma_ds.config import RunConfig
from cuma_ds.data.prepared import PreparedData
from cuma_ds.errors import ConfigError, nearest
from cuma_ds.profiles.linearize import value_of


@dataclass(frozen=True)
class Groups:
    """Profiles by their value in one field.

    Attributes:
        names: values with at least ``evaluation.min_answers`` training answers behind them, in the order of the
            alphabet. Smaller groups are not named.
        of_profile_N: [N] int64, place of each profile's group in ``names``; ``len(names)`` for all other profiles.
    """

    names: tuple[str, ...]
    of_profile_N: NDArray[np.int64]

    @classmethod
    def of(cls, config: RunConfig, data: PreparedData) -> Groups | None:
        """The groups of a run; None without ``training.group_field``.

        Raises:
            ConfigError: no profile has the field.
        """
        field = config.training.group_field
        if field is None:
            return None
        values = [value_of(profile["fields"], field) for profile in data.profiles]
        if not any(values):
            known = list(dict.fromkeys(name for profile in data.profiles for name in profile["fields"]))
            raise ConfigError(
                f"training.group_field: no profile has the field {field!r}{nearest(field, known)}; "
                f"they have {', '.join(known) or 'none'}"
            )
        answers: Counter[str] = Counter()
        train = data.splits["train"]
        for profile, count in zip(train.numbers("profile").tolist(), train.answers().tolist(), strict=True):
            answers[values[profile]] += count
        names = sorted(name for name, count in answers.items() if name and count >= config.evaluation.min_answers)
        place = {name: number for number, name in enumerate(names)}
        return cls(tuple(names), np.array([place.get(value, len(names)) for value in values], dtype=np.int64))
