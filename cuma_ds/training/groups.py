"""The groups of people that have metrics, or an advantage history, of their own: ``training.group_field``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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

    def means(self, name: str, value_P: Tensor, profile_P: Tensor, weight_P: Tensor | None = None) -> dict[str, Tensor]:
        """Of each named group the sum of its values and the sum of their weights, [2], by ``<name>/<group>``.

        Args:
            name: of the metric.
            value_P: [P] without gradients, multiplied by its weight.
            profile_P: [P] row of the run's table of profiles behind each value, on the same device.
            weight_P: [P]; None for 1 each.
        """
        group_P = torch.from_numpy(self.of_profile_N).to(value_P.device)[profile_P]
        own_GP = (group_P == torch.arange(len(self.names), device=value_P.device)[:, None]).to(value_P.dtype)
        weight_P = torch.ones_like(value_P) if weight_P is None else weight_P.to(value_P.dtype)
        found_G2 = own_GP @ torch.stack([value_P, weight_P], dim=1)
        return {f"{name}/{group}": found_2 for group, found_2 in zip(self.names, found_G2, strict=True)}
