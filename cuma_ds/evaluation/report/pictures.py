"""Which pictures a report gets, from its numbers; drawn by :mod:`cuma_ds.evaluation.report.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cuma_ds.evaluation.examples import ChoiceExamples
from cuma_ds.evaluation.metrics import mean_by_group
from cuma_ds.evaluation.report.model import (
    CONTENDERS,
    SPLITS,
    Cell,
    ChoiceSplit,
    CulturalMap,
    FieldInformation,
    MapPoint,
    PreferenceSplit,
    Routing,
    RoutingInformation,
    number,
)
from cuma_ds.evaluation.report.plots import (
    plot_distributions,
    plot_expert_use,
    plot_group_emd,
    plot_reliability,
    plot_subgroups,
    short,
)
from cuma_ds.evaluation.report.preference_plots import Share, plot_group_shares, plot_shares
from cuma_ds.evaluation.report.routing_plots import PALETTE, plot_information, plot_load, plot_map
from cuma_ds.evaluation.routing import comparable_means, cultural_map, expert_load, field_information
from cuma_ds.evaluation.subgroups import large_enough
from cuma_ds.inference.forward import RoutingTally

Array = NDArray[np.floating]

# Pictures stay readable: the groups with most answers, the questions with most answers.
_MOST_GROUPS, _MOST_QUESTIONS, _MOST_DIFFERENT = 100, 3, 8
# Fields that tell most, panels of the map beside the first, subgroups of one field in a picture.
_MOST_FIELDS, _MOST_PANELS, _MOST_SUBGROUPS = 7, 3, 12
# Subgroups of one field in the picture of preferences.
_MOST_ROWS = 40


def choice_pictures(folder: Path, split: ChoiceSplit, main: str = "trained") -> dict[str, str]:
    """Draw predicted against observed answers, the distance of each group, and calibration, of a split.

    Args:
        folder: where pictures go.
        split: its scores.
        main: the contender that is the model itself.

    Returns:
        File name -> caption.
    """
    pictures = {}
    compared = {question: part.compared.answers for question, part in split.questions.items() if part.compared.answers}
    largest = sorted(compared, key=lambda question: -compared[question])[:_MOST_QUESTIONS]
    for place, question in enumerate(largest, start=1):
        cells = [cell for cell in split.cells if cell.question_id == question]
        cells = sorted(cells, key=lambda cell: -(cell.emd["collapse"] or 0.0))[:_MOST_DIFFERENT]
        name = f"distributions-{place}.png"
        asked = split.questions[question]
        plot_distributions(folder / name, asked.question, asked.options, cells, main)
        pictures[name] = (
            f"Predicted and observed answers of the {len(cells)} groups that differ most from the global distribution."
        )
    if split.cells:
        groups, answers = _largest_groups(split.cells)
        rows = {row: _distance_by_group(split.cells, row) for row in ("before", main, "collapse")}
        drawn = {row: np.array([values[group] for group in groups]) for row, values in rows.items()}
        plot_group_emd(
            folder / "emd-by-group.png", groups, drawn["before"], drawn[main], drawn["collapse"], split.distance
        )
        when = "before and after training, " if main == "trained" else ""
        pictures["emd-by-group.png"] = f"{split.distance} of each group, {when}worst first." + _shown(groups, answers)
    shown = {
        name: title
        for name, title in (("before", "backbone before training"), ("trained", "trained"))
        if name in split.reliability
    }
    reliability = {
        title: (split.reliability[name], split.rows[name].calibration_error or 0.0) for name, title in shown.items()
    }
    plot_reliability(folder / "reliability.png", reliability)
    pictures["reliability.png"] = (
        "Calibration: how often the predicted option is the person's answer, by the probability it was given."
    )
    return pictures


def preference_pictures(folder: Path, splits: Mapping[str, PreferenceSplit], main: str) -> dict[str, str]:
    """Draw how often each contender prefers what people prefer, by split, and by subgroup of the first split.

    Args:
        folder: where pictures go.
        splits: their scores.
        main: the contender that is the model itself. Where that is ``before``, there is no implicit reward to draw.
    """
    score, what = ("accuracy", "implicit-reward accuracy")
    if main == "before":
        score, what = ("likelihood_per_token", "pairs whose chosen answer is more probable per token")
    drawn = {SPLITS[name]: _shares(split, main) for name, split in splits.items()}
    plot_shares(folder / "preferences.png", drawn, f"share of pairs: {what}")
    pictures = {
        "preferences.png": "How often the model prefers the answer that the person preferred, with 95% intervals over "
        "people."
    }
    fields = {field: part.shown for field, part in next(iter(splits.values())).subgroups.items() if part.shown}
    fields = dict(list(fields.items())[:_MOST_FIELDS])
    drawn_rows = {field: sorted(rows, key=lambda row: -row.people)[:_MOST_ROWS] for field, rows in fields.items()}
    if not fields:
        return pictures
    ordered = {field: [row for row in rows if row in drawn_rows[field]] for field, rows in fields.items()}
    plot_group_shares(folder / "preferences-by-group.png", ordered, main, score, what)
    capped = any(len(rows) > _MOST_ROWS for rows in fields.values())
    most = f" The {_MOST_ROWS} subgroups of a field with most people are shown." if capped else ""
    pictures["preferences-by-group.png"] = f"The same for subgroups of people: {what}.{most}"
    return pictures


def _shares(split: PreferenceSplit, main: str) -> list[Share]:
    if main == "before":
        columns = {"likelihood": "more probable", "likelihood_per_token": "more probable per token"}
        scores = split.rows[main]
        return [Share(main, label, getattr(scores, name), scores.interval.get(name)) for name, label in columns.items()]
    return [
        Share(name, CONTENDERS[name], scores.accuracy, scores.interval.get("accuracy"))
        for name, scores in split.rows.items()
        if name != "before"
    ]


def expert_picture(
    folder: Path,
    names: Sequence[str],
    questions: Sequence[str],
    groups: Sequence[str],
    weights: Sequence[float],
    gates_MRE: NDArray[np.float32],
) -> dict[str, str]:
    """Draw which experts serve which group, from M examples of groups that may be named.

    Args:
        names: R router names.
        questions, groups, weights: of each example.
        gates_MRE: mean gate weight of each example [M, R, E].
    """
    size: dict[str, float] = {}
    for group, weight in zip(groups, weights, strict=True):
        size[group] = size.get(group, 0.0) + weight
    if len(size) < 2:
        return {}
    means = comparable_means(questions, groups, weights, gates_MRE)
    chosen = sorted(means, key=lambda group: -size[str(group)])[:_MOST_GROUPS]
    plot_expert_use(
        folder / "experts-by-group.png",
        [str(group) for group in chosen],
        np.stack([means[group] for group in chosen]),
        names,
    )
    caption = (
        "Experts used by each group in the routers that tell groups apart best; "
        "groups with similar routing stand together."
    )
    return {"experts-by-group.png": caption + _shown(chosen, means)}


def routing_pictures(
    folder: Path,
    tally: RoutingTally,
    examples: ChoiceExamples,
    gates_MRE: NDArray[np.float32],
    fields: Mapping[str, Sequence[str | None]],
    least: int,
) -> tuple[Routing, dict[str, str]]:
    """Expert load, information about profile fields, and the map of profiles: numbers and pictures.

    Args:
        folder: where pictures go.
        tally: where the tokens of all prompts went.
        examples: M examples of groups that may be named.
        gates_MRE: their routing.
        fields: label of every profile, by field.
        least: people of a label that the map may name.

    Returns:
        The section of the report, and file name -> caption.
    """
    load = expert_load(tally)
    plot_load(folder / "expert-load.png", load)
    pictures = {"expert-load.png": "Share of the tokens that each router sends to each expert, and how even that is."}
    section = Routing(tokens=int(tally.tokens), routers=load)
    means = comparable_means(examples.questions, examples.profiles.tolist(), examples.counts.sums().tolist(), gates_MRE)
    profiles = sorted(means)
    if len(profiles) < 3:
        return section, pictures
    gates_NRE = np.stack([means[profile] for profile in profiles])
    labels = {field: [values[profile] for profile in profiles] for field, values in fields.items()}
    labels = {field: values for field, values in labels.items() if len(set(values) - {None}) > 1}
    whole = field_information(gates_NRE, [str(profile) for profile in profiles])
    by_field = {field: field_information(gates_NRE, values) for field, values in labels.items()}
    section.information = RoutingInformation(
        profile=_nats(whole.value_R),
        fields={
            field: FieldInformation(
                value=_nats(found.value_R),
                shuffled=None if found.null_R is None else _nats(found.null_R),
                shuffled_95=None if found.high_R is None else _nats(found.high_R),
                corrected=_nats(found.corrected_R),
            )
            for field, found in by_field.items()
        },
    )
    names = [router.router for router in load]
    telling = sorted(by_field, key=lambda field: -float(by_field[field].corrected_R.sum()))[:_MOST_FIELDS]
    plot_information(folder / "information.png", names, whole, {field: by_field[field] for field in telling})
    pictures["information.png"] = (
        "Mutual information between the chosen expert and profile fields along the routers, "
        "less that of shuffled labels."
        + (
            " A field that tells every profile apart has no shuffled labels to compare with."
            if any(f.null_R is None for f in by_field.values())
            else ""
        )
    )
    named = {
        field: [values[profile] for profile in profiles]
        for field, values in large_enough({field: fields[field] for field in labels}, examples, least).items()
    }
    named = {field: values for field, values in named.items() if len(set(values) - {None}) > 1}
    section.map, more = _map_picture(folder, examples, profiles, gates_NRE, named)
    return section, pictures | more


def _map_picture(
    folder: Path,
    examples: ChoiceExamples,
    profiles: Sequence[int],
    gates_NRE: Array,
    labels: Mapping[str, Sequence[str | None]],
) -> tuple[CulturalMap, dict[str, str]]:
    drawn = cultural_map(gates_NRE)
    place = {profile: index for index, profile in enumerate(profiles)}
    answers_N, group_N = np.zeros(len(profiles)), [""] * len(profiles)
    for profile, group, counts in zip(examples.profiles, examples.groups, examples.counts, strict=True):
        if profile in place:
            answers_N[place[profile]] += counts.sum()
            group_N[place[profile]] = group
    alone = len(set(group_N)) == len(group_N)
    # Where a group has several profiles, its name stands at the one with most answers.
    largest = {
        group: max((k for k, g in enumerate(group_N) if g == group), key=lambda k: answers_N[k])
        for group in set(group_N)
    }
    names = [
        group if largest[group] == index and not group.startswith("profile ") else ""
        for index, group in enumerate(group_N)
    ]
    few = {field: values for field, values in labels.items() if len(set(values) - {None}) <= len(PALETTE)}
    values = _mean_answer(examples, place) if alone else None
    plot_map(folder / "cultural-map.png", drawn.xy_N2, answers_N, names, values, dict(list(few.items())[:_MOST_PANELS]))
    points = [
        MapPoint(group=group, x=round(float(x), 6), y=round(float(y), 6))
        for group, (x, y) in zip(group_N, drawn.xy_N2, strict=True)
    ]
    caption = (
        f"The latent cultural topology: {len(profiles):,} profiles placed by their routing ({drawn.method}; rank "
        f"correlation of distances {drawn.fidelity:.2f}). Neighbours are answered by the same experts; "
        "the axes have no meaning of their own."
    )
    found = CulturalMap(method=drawn.method, fidelity=number(drawn.fidelity), points=points)
    return found, {"cultural-map.png": caption}


def _mean_answer(examples: ChoiceExamples, place: Mapping[int, int]) -> tuple[str, Array] | None:
    """Mean observed answer of each profile (0 = first option, 1 = last) to the question that most answered.

    None where some did not answer it, or where no question has ordered options.
    """
    total: dict[str, float] = {}
    for question, counts in zip(examples.questions, examples.counts, strict=True):
        if question not in examples.nominal:
            total[question] = total.get(question, 0.0) + float(counts.sum())
    if not total:
        return None
    asked = max(total, key=lambda question: total[question])
    sums: dict[int, NDArray[np.float64]] = {}
    for question, profile, counts in zip(examples.questions, examples.profiles, examples.counts, strict=True):
        if question == asked and profile in place:
            sums[place[profile]] = sums.get(place[profile], np.zeros(len(counts))) + counts.astype(np.float64)
    options = examples.texts[asked][1]
    if len(sums) < len(place) or len(options) < 2:
        return None
    scale = np.arange(len(options)) / (len(options) - 1)
    values = np.array([float(sums[index] @ scale / sums[index].sum()) for index in range(len(place))])
    return f"mean answer, from “{short(options[0], 30)}” to “{short(options[-1], 30)}”", values


def subgroup_picture(folder: Path, split: ChoiceSplit, main: str) -> dict[str, str]:
    """Draw the accuracy of the subgroups of fields with few labels."""
    drawn = {field: part.shown for field, part in split.subgroups.items() if 2 <= len(part.shown) <= _MOST_SUBGROUPS}
    if not drawn:
        return {}
    counted = "people" if split.people is not None else "answers"
    plot_subgroups(folder / "subgroups.png", dict(list(drawn.items())[:_MOST_FIELDS]), main, counted)
    return {"subgroups.png": f"Accuracy of each subgroup of people, with 95% intervals over {counted}."}


def _nats(values: Array) -> list[float]:
    return [round(float(value), 6) for value in values]


def _distance_by_group(cells: Sequence[Cell], contender: str) -> Mapping[str, Array]:
    values = np.array([cell.emd[contender] for cell in cells], dtype=float)
    return mean_by_group(values, [cell.group for cell in cells], np.array([cell.answers for cell in cells]))


def _largest_groups(cells: Sequence[Cell]) -> tuple[list[str], dict[str, float]]:
    answers: dict[str, float] = {}
    for cell in cells:
        answers[cell.group] = answers.get(cell.group, 0) + cell.answers
    return sorted(answers, key=lambda group: -answers[group])[:_MOST_GROUPS], answers


def _shown(some: Sized, every: Sized) -> str:
    return "" if len(some) == len(every) else f" The {len(some)} of {len(every)} groups with most answers are shown."
