"""What the loss reads of each training pair beside its text: label, weight, and how much further apart it must be.

Shapes: M rows of split train.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from cuma_ds.config import RunConfig
from cuma_ds.data.prepared import PreparedData
from cuma_ds.errors import DataError
from cuma_ds.profiles.linearize import value_of

# A pair of answers to a prompt, whichever of the two was chosen, and the group of the person who was asked.
_Asked = tuple[str, str, frozenset[str]]


def pair_values(data: PreparedData, config: RunConfig) -> dict[str, Tensor]:
    """``label``, ``weight`` and ``shift`` of the training pairs, [M] float32 each.

    label: probability that the chosen answer is the preferred one: 1, or with ``dpo.soft_labels`` the share of the
    pair's group that chose it. weight: 1, or the scaled margin with ``dpo.margin: weight``. shift: 0, or the scaled
    margin with ``dpo.margin: shift``, in units of the reward.

    Raises:
        DataError: ``dpo.margin`` is used, and pairs have no margin; or one of 0, which as a weight teaches nothing.
    """
    assert config.dpo is not None
    rows = len(data.splits["train"])
    values = {"label": torch.ones(rows), "weight": torch.ones(rows), "shift": torch.zeros(rows)}
    if config.dpo.soft_labels:
        values["label"] = soft_labels(data, config.training.group_field)
    if config.dpo.margin != "ignore":
        values[config.dpo.margin] = config.dpo.margin_scale * _margins(data, config.dpo.margin)
    return values


def soft_labels(data: PreparedData, group_field: str | None) -> Tensor:
    """The share of a group that chose, of two answers to a prompt, the one that each training row has as chosen.

    Rows of one group with the same prompt and the same two answers, in either order, share their label.

    Args:
        data: of kind preference.
        group_field: profile field that makes groups; None for the country. People without it are a group of their own.

    Returns:
        [M] float32, above 0 and at most 1.
    """
    asked = list(_asked(data, group_field))
    people, chose = Counter(pair for pair, _ in asked), Counter(asked)
    return torch.tensor([chose[one] / people[one[0]] for one in asked])


def _asked(data: PreparedData, group_field: str | None) -> Iterator[tuple[_Asked, str]]:
    """Of each training row what was asked, and the answer that was chosen."""
    groups = None if group_field is None else [value_of(profile["fields"], group_field) for profile in data.profiles]
    for row in data.splits["train"]:
        group = row["group"] if groups is None else groups[row["profile"]]
        yield (group, json.dumps(row["prompt"]), frozenset((row["chosen"], row["rejected"]))), row["chosen"]


def _margins(data: PreparedData, use: str) -> Tensor:
    """[M] float32 by how much the chosen answers were scored above the rejected ones."""
    margin_M = torch.tensor(data.splits["train"].rows.table["margin"].to_numpy())
    missing, none = int(margin_M.isnan().sum()), int((margin_M <= 0).sum())
    if missing:
        raise DataError(
            f"dpo.margin is {use}, but {missing} of {len(margin_M)} training pairs have no margin; "
            "set dpo.margin: ignore, or give every pair one"
        )
    if use == "weight" and none:
        raise DataError(
            f"dpo.margin is weight, but {none} of {len(margin_M)} training pairs have a margin of 0 or less and would "
            "teach nothing; leave them out with data.min_margin"
        )
    return margin_M
