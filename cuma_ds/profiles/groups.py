"""Which experts may learn from whom: a table from profile groups to experts, as a mask over profiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cuma_ds.errors import ConfigError, nearest
from cuma_ds.profiles.linearize import one_spelling, value_of

EVERYONE_ELSE = "*"


def group_mask(
    profiles: Sequence[Mapping[str, object]], groups: Mapping[str, Mapping[str, Sequence[int]]], num_experts: int
) -> Tensor:
    """The gradient mask of ``adapters.gradient_groups``: 1 where a profile's group may teach an expert, 0 elsewhere.

    Args:
        profiles: the fields of N profiles.
        groups: ``{field: {value: experts}}`` with one field; ``*`` stands for every other value, and for profiles
            without the field. Without ``*`` those teach all experts.
        num_experts: E.

    Returns:
        [N, E] float32.

    Raises:
        ConfigError: no profile has the field, or no profile is in a group.
    """
    ((field, experts_by_given),) = groups.items()
    experts_by_value = {one_spelling(value): experts for value, experts in experts_by_given.items()}
    values = [value_of(fields, field) for fields in profiles]
    if not any(values):
        known = list(dict.fromkeys(name for fields in profiles if not isinstance(fields, str) for name in fields))
        raise ConfigError(
            f"adapters.gradient_groups: no profile has the field {field!r}{nearest(field, known)}; "
            f"they have {', '.join(known) or 'none'}"
        )
    for value in experts_by_value:
        if value != EVERYONE_ELSE and value not in values:
            raise ConfigError(
                f"adapters.gradient_groups.{field}: nobody's {field} is {value!r}{nearest(value, filter(None, values))}"
            )
    rest = experts_by_value.get(EVERYONE_ELSE, range(num_experts))
    mask_NE = torch.zeros(len(profiles), num_experts)
    for row, value in enumerate(values):
        mask_NE[row, list(experts_by_value.get(value, rest))] = 1.0
    return mask_NE
