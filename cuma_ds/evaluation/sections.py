"""The numbers of one split as plain JSON, for conversations and for choice questions.

Groups with fewer answers (subgroups: fewer people) than ``min_answers`` are counted and named nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuma_ds.config import EvaluationSection
from cuma_ds.evaluation.chat import ChatLosses
from cuma_ds.evaluation.examples import ChoiceExamples
from cuma_ds.evaluation.metrics import Cells, distance, distance_name, gather_cells, predicted_distributions
from cuma_ds.evaluation.resampling import interval, resample
from cuma_ds.evaluation.scores import Score, Scorer

Array = NDArray[np.float64]


def choice_split(
    examples: ChoiceExamples,
    rows: Mapping[str, Sequence[Array]],
    fields: Mapping[str, Sequence[str | None]],
    settings: EvaluationSection,
    main: str = "trained",
    letter_mass: Mapping[str, Array] | None = None,
) -> dict[str, Any]:
    """Numbers of one split of choice questions: overall with intervals, per question, per subgroup and per (question, group).

    Keys that begin with ``emd`` hold the distance that ``distance`` names: EMD, or TV (total variation) for nominal questions.

    Args:
        examples: the split.
        rows: option probabilities of every example, by row name (keys of :data:`cuma_ds.evaluation.report.ROWS`).
        fields: subgroup of every profile, by field.
        settings: smallest groups, number of bootstrap samples.
        main: the row that the others are compared with.
        letter_mass: row name -> probability of the option letters together, of every example [M]; rows without a model have none.
    """
    scorer = Scorer(examples, fields, settings.min_answers, settings.min_subgroup)
    scores = scorer.scores(rows, settings.bootstrap, against=main)
    cells = scorer.cells
    predicted = {name: predicted_distributions(cells, row, examples.counts) for name, row in rows.items()}
    return {
        "people": scorer.answers.people if scorer.answers.known else None,
        "weighted": examples.weights is not None,
        **_size(scorer),
        "letter_mass": {name: _letter_mass(cells, examples, mass_M) for name, mass_M in (letter_mass or {}).items()},
        "rows": {name: _row(row) for name, row in scores.rows.items()},
        "differences": {name: _row(row) for name, row in scores.differences.items()},
        "left_out": {"cells": cells.left_out, "answers": _count(cells.left_out_answers)},
        "reliability": {
            name: {
                "accuracy": _listed(right),
                "confidence": _listed(sure),
                "answers": [_count(count) for count in answers],
            }
            for name, (right, sure, answers) in scores.reliability.items()
        },
        "subgroups": {
            field: _subgroups(field, labels, scorer, scores.subgroups, rows) for field, labels in fields.items()
        },
        "questions": {
            question: _question(question, chosen, examples, rows, settings, main)
            for question, chosen in _places(examples.questions).items()
        },
        "cells": [
            {
                "question_id": question,
                "group": group,
                "answers": _count(cells.answers[index]),
                "observed": _listed(cells.observed[index]),
                "predicted": {name: _listed(row[index]) for name, row in predicted.items()},
                "emd": {
                    name: number(float(distance(row[index], cells.observed[index], question in examples.nominal)))
                    for name, row in predicted.items()
                },
            }
            for index, (question, group) in enumerate(cells.keys)
        ],
    }


def chat_split(
    rows: Mapping[str, ChatLosses], people: Sequence[int] | None = None, replicates: int = 0
) -> dict[str, Any]:
    """Numbers of one split of conversations: loss and perplexity by row name.

    Args:
        rows: losses of the same conversations.
        people: who talked, one number per conversation; None where it is not known (then each is somebody else).
        replicates: bootstrap samples of people.
    """
    some = next(iter(rows.values()))
    person_M = np.arange(len(some.tokens)) if people is None else np.unique(people, return_inverse=True)[1]
    size = int(person_M.max()) + 1 if len(person_M) else 0
    weights_BU = (
        np.concatenate(list(resample(np.ones(size, dtype=np.int64), replicates, 0, replicates)))
        if replicates and size
        else None
    )
    table: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        table[name] = {"loss": number(row.loss), "perplexity": number(_exp(row.loss)), "interval": {}}
        if weights_BU is not None:
            nll_U, tokens_U = np.bincount(person_M, row.nll, size), np.bincount(person_M, row.tokens, size)
            spread = interval((weights_BU @ nll_U) / np.maximum(weights_BU @ tokens_U, 1), row.loss)
            if spread is not None:
                table[name]["interval"] = {
                    "loss": [number(end) for end in spread],
                    "perplexity": [number(_exp(end)) for end in spread],
                }
    return {
        "conversations": len(some.tokens),
        "people": None if people is None else size,
        "tokens": int(some.tokens.sum()),
        "rows": table,
    }


def _count(answers: float) -> int | float:
    """A number of answers; a sum of survey weights keeps two decimals."""
    return int(answers) if float(answers).is_integer() else round(float(answers), 2)


def number(value: float | None) -> float | None:
    """A number that JSON can hold, to six decimals."""
    return None if value is None or not math.isfinite(value) else round(value, 6)


def _question(
    question: str,
    chosen: Sequence[int],
    examples: ChoiceExamples,
    rows: Mapping[str, Sequence[Array]],
    settings: EvaluationSection,
    main: str,
) -> dict[str, Any]:
    scorer = Scorer(examples.only(chosen), {}, settings.min_answers, settings.min_subgroup)
    scores = scorer.scores({name: [row[index] for index in chosen] for name, row in rows.items()}, against=main)
    text, options = examples.texts[question]
    return {
        "question": text,
        "options": options,
        **_size(scorer),
        "rows": {name: _row(row) for name, row in scores.rows.items()},
    }


def _subgroups(
    field: str,
    labels: Sequence[str | None],
    scorer: Scorer,
    scores: Mapping[str, Mapping[str, Mapping[str, Score]]],
    rows: Mapping[str, Sequence[Array]],
) -> dict[str, Any]:
    """Accuracy of the subgroups of one field that are large enough to be named, and distance over their questions that are."""
    examples = scorer.examples
    places = _places([labels[profile] for profile in examples.profiles])
    shown = []
    for label, by_row in scores.get(field, {}).items():
        chosen = places[label]
        part = examples.only(chosen)
        cells = gather_cells(part.questions, [label] * len(chosen), part.counts, scorer.min_answers)
        nominal = [question in examples.nominal for question, _ in cells.keys]
        table = {}
        for name, accuracy in by_row.items():
            predicted = predicted_distributions(cells, [rows[name][index] for index in chosen], part.counts)
            distances = [float(distance(*pair)) for pair in zip(predicted, cells.observed, nominal, strict=True)]
            mean = number(float(np.average(distances, weights=cells.answers))) if distances else None
            table[name] = {"emd": mean, **_row({"accuracy": accuracy})}
        answers = _count(sum(counts.sum() for counts in part.counts))
        shown.append({"label": label, "people": scorer.sizes[field][label], "answers": answers, "rows": table})
    return {"shown": shown, "left_out": len(scorer.sizes[field]) - len(shown)}


def _places(names: Sequence[Any]) -> dict[Any, list[int]]:
    """Where each name stands."""
    found: dict[Any, list[int]] = {}
    for index, name in enumerate(names):
        found.setdefault(name, []).append(index)
    return found


def _letter_mass(cells: Cells, examples: ChoiceExamples, mass_M: Array) -> dict[str, Any]:
    """Mean over answers of the probability that the model gives to the option letters, and the cell where it is lowest."""
    answers_M = np.array([counts.sum() for counts in examples.counts])
    means = [float(np.average(mass_M[members], weights=answers_M[members])) for members in cells.members]
    lowest = None
    if means:
        (question, group), mean = min(zip(cells.keys, means, strict=True), key=lambda cell: cell[1])
        lowest = {"question_id": question, "group": group, "mean": number(mean)}
    return {"mean": number(float(np.average(mass_M, weights=answers_M))), "lowest": lowest}


def _effective(weight_A: Array) -> float:
    """(sum w)^2 / sum w^2: how many answers of one weight would be as precise."""
    return round(float(weight_A.sum() ** 2 / np.square(weight_A).sum()), 2)


def _size(scorer: Scorer) -> dict[str, Any]:
    return {
        "distance": distance_name(question in scorer.examples.nominal for question in scorer.examples.questions),
        "groups": len({group for _, group in scorer.cells.keys}),
        "answers": _count(scorer.answers.weight_A.sum()),
        **({} if scorer.examples.weights is None else {"effective_answers": _effective(scorer.answers.weight_A)}),
        "compared": {"cells": len(scorer.cells.keys), "answers": _count(scorer.cells.answers.sum())},
    }


def _row(scores: Mapping[str, Score]) -> dict[str, Any]:
    values: dict[str, Any] = {metric: number(score.value) for metric, score in scores.items()}
    if "emd" in values:
        values.setdefault("recovered", None)
    spreads = {
        metric: [number(end) for end in score.interval]
        for metric, score in scores.items()
        if score.interval is not None
    }
    return {**values, "interval": spreads}


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _listed(values: Array) -> list[float | None]:
    return [number(float(value)) for value in values]
