"""Scores of one split of preferences with bootstrap intervals over people.

Every score is a mean over pairs, so all replicates are one matrix product.

Shapes: M pairs, G groups (all pairs first, then each subgroup that may be named), U people, B replicates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cuma_ds.config import EvaluationSection
from cuma_ds.evaluation.examples import ChoiceExamples
from cuma_ds.evaluation.preference import PairLogps
from cuma_ds.evaluation.report.model import (
    Interval,
    PreferenceScores,
    PreferenceSplit,
    PreferenceSubgroup,
    PreferenceSubgroups,
    number,
)
from cuma_ds.evaluation.resampling import interval, resample
from cuma_ds.evaluation.subgroups import coded
from cuma_ds.evaluation.sums import Block, Layout, ratio

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
# Contender (or the main contender less it) -> name of the score -> mean of each replicate and group [B, G].
Means = dict[str, dict[str, Array]]

# Most numbers of one chunk of replicates: 64 MB of float64.
_CHUNK = 8_000_000


class _Group(NamedTuple):
    """People of one label of a profile field, and their pairs [M]."""

    field: str
    label: str
    people: int
    member_M: NDArray[np.bool_]


def preference_split(
    pairs: ChoiceExamples,
    contenders: Mapping[str, PairLogps],
    fields: Mapping[str, Sequence[str | None]],
    settings: EvaluationSection,
    main: str,
) -> PreferenceSplit:
    """Scores of one split of preferences: overall and by subgroup.

    Args:
        pairs: who judged each of M pairs.
        contenders: log-probabilities of the same pairs; ``before`` is the bare backbone.
        fields: subgroup of every profile, by field.
        settings: smallest groups, number of bootstrap samples.
        main: the contender that the others are compared with.
    """
    assert pairs.people is not None  # a prepared split says who judged each pair
    person_M = np.unique([int(people[0]) for people in pairs.people], return_inverse=True)[1].astype(np.int64)
    groups, left_out = _groups(pairs.profiles.tolist(), person_M, fields, settings.min_answers)
    members = [np.ones(len(person_M), dtype=bool), *(group.member_M for group in groups)]
    values = {name: pair_scores(name, contenders) for name in contenders}
    rows, differences = _scores(values, main, members, person_M, settings.bootstrap)
    shown: dict[str, list[PreferenceSubgroup]] = {field: [] for field in fields}
    for place, group in enumerate(groups, start=1):
        scores = {name: of_group[place] for name, of_group in rows.items()}
        count = int(group.member_M.sum())
        shown[group.field].append(PreferenceSubgroup(label=group.label, people=group.people, pairs=count, rows=scores))
    chosen, rejected = (number(float(mean)) for mean in contenders[main].tokens_M2.mean(axis=0))
    return PreferenceSplit(
        pairs=len(person_M),
        people=int(person_M.max()) + 1,
        chosen_tokens=chosen,
        rejected_tokens=rejected,
        rows={name: of_group[0] for name, of_group in rows.items()},
        differences={name: of_group[0] for name, of_group in differences.items()},
        subgroups={field: PreferenceSubgroups(shown=shown[field], left_out=left_out[field]) for field in fields},
    )


def pair_scores(name: str, contenders: Mapping[str, PairLogps]) -> dict[str, Array]:
    """What each pair adds to the scores of one contender, [M] by the names of :class:`PreferenceScores`.

    The implicit reward of an answer is log p(answer) - log p_reference(answer), see DPO (arXiv 2305.18290, equation 5,
    here without its factor beta). The reference is the bare backbone.
    """
    own = contenders[name]
    scores = {
        "likelihood": won(own.logps_M2),
        "likelihood_per_token": won(own.logps_M2 / own.tokens_M2),
    }
    if len(contenders) > 1:
        reward_M2 = own.logps_M2 - contenders["before"].logps_M2
        scores |= {"accuracy": won(reward_M2), "margin": reward_M2[:, 0] - reward_M2[:, 1]}
    if name == "trained" and "start" in contenders:
        scores["accuracy_start"] = won(own.logps_M2 - contenders["start"].logps_M2)
    return scores


def won(scores_M2: Array) -> Array:
    """[M]: 1 where the first of two numbers is larger, 0 where the second is, 1/2 for a tie, nan for no number."""
    return (np.sign(scores_M2[:, 0] - scores_M2[:, 1]) + 1) / 2


def _groups(
    profiles: Sequence[int], person_M: Indices, fields: Mapping[str, Sequence[str | None]], least: int
) -> tuple[list[_Group], dict[str, int]]:
    """The subgroups of at least ``least`` people, and by field how many are smaller."""
    found, left_out = [], {}
    for field, labels in fields.items():
        names, code_M = coded([labels[profile] for profile in profiles])
        members = [code_M == place for place in range(len(names))]
        people = [len(np.unique(person_M[member_M])) for member_M in members]
        enough = [_Group(field, *group) for group in zip(names, people, members, strict=True) if group[1] >= least]
        left_out[field] = len(names) - len(enough)
        found += enough
    return found, left_out


def _scores(
    values: Mapping[str, Mapping[str, Array]],
    main: str,
    members: Sequence[NDArray[np.bool_]],
    person_M: Indices,
    replicates: int,
) -> tuple[dict[str, list[PreferenceScores]], dict[str, list[PreferenceScores]]]:
    """Scores of each contender, and of the main one less each other one over the same drawn people, of G groups."""

    def block(value_M: Array) -> Block:
        columns = [np.where(member_M, place, -1) for place, member_M in enumerate(members)]
        return Block(len(members), [(column_M, value_M) for column_M in columns])

    one_M, people = np.ones(len(person_M)), int(person_M.max()) + 1
    blocks = [{metric: block(value_M) for metric, value_M in own.items()} for own in values.values()]
    layout = Layout([{"pairs": block(one_M)}, *blocks], person_M, one_M, people)

    def means(weights_BU: Array) -> tuple[Means, Means]:
        total, *sums = layout.sums(weights_BU)
        rows = {
            name: {metric: ratio(sum_BG, total["pairs"]) for metric, sum_BG in own.items()}
            for name, own in zip(values, sums, strict=True)
        }
        less = {
            name: {metric: rows[main][metric] - mean_BG for metric, mean_BG in own.items() if metric in rows[main]}
            for name, own in rows.items()
            if name != main
        }
        return rows, less

    points = means(np.ones((1, people)))
    chunk = int(np.clip(_CHUNK // max(layout.width, people), 1, max(replicates, 1)))
    drawn = [means(weights_BU) for weights_BU in resample(np.ones(people, dtype=np.int64), replicates, 0, chunk)]
    rows, differences = (
        {
            name: [_of_group(own, [part[kind][name] for part in drawn], place) for place in range(len(members))]
            for name, own in point.items()
        }
        for kind, point in enumerate(points)
    )
    return rows, differences


def _of_group(mean: Mapping[str, Array], drawn: Sequence[Mapping[str, Array]], group: int) -> PreferenceScores:
    """Scores of one group, from means [1, G] by the name of the score, and chunks of their replicates [B, G]."""
    values = {metric: float(mean_1G[0, group]) for metric, mean_1G in mean.items()}
    spreads: dict[str, Interval] = {}
    for metric, value in values.items() if drawn else ():
        ends = interval(np.concatenate([part[metric][:, group] for part in drawn]), value)
        if ends is not None:
            spreads[metric] = (number(ends[0]), number(ends[1]))
    known = {metric: number(value) for metric, value in values.items()}
    return PreferenceScores.model_validate({**known, "interval": spreads})
