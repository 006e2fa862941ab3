"""The scores of one split for a report, of conversations and of choice questions.

Groups with fewer answers (subgroups: fewer people) than ``min_answers`` are counted and named nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypedDict, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cuma_ds.config import EvaluationSection
from cuma_ds.distances import distance, distance_name
from cuma_ds.evaluation.chat import ChatLosses
from cuma_ds.evaluation.columns import Ragged
from cuma_ds.evaluation.examples import ChoiceExamples
from cuma_ds.evaluation.metrics import Cells, gather_cells, predicted_distributions
from cuma_ds.evaluation.noise import cell_floor, question_floor
from cuma_ds.evaluation.report.model import (
    Cell,
    ChatScores,
    ChatSplit,
    ChoiceScores,
    ChoiceSplit,
    Compared,
    Count,
    LetterMass,
    LowestMass,
    Number,
    QuestionScores,
    Reliability,
    Subgroup,
    Subgroups,
    WorstGroup,
    number,
)
from cuma_ds.evaluation.resampling import interval, resample
from cuma_ds.evaluation.scores import Score, Scorer

Array = NDArray[np.float64]
Name = TypeVar("Name", str, str | None)
# Option probabilities of every example, by contender.
Predictions = Mapping[str, Sequence[ArrayLike]]


# Scores that one question does not have.
_OVER_QUESTIONS = ("questions_", "argmax_")


class _Size(TypedDict, total=False):
    distance: str
    groups: int
    answers: Count
    effective_answers: float
    compared: Compared


def choice_split(
    examples: ChoiceExamples,
    contenders: Predictions,
    fields: Mapping[str, Sequence[str | None]],
    settings: EvaluationSection,
    main: str = "trained",
    letter_mass: Mapping[str, Array] | None = None,
) -> ChoiceSplit:
    """Scores of one split of choice questions: overall with intervals, by question, by subgroup and by cell.

    Args:
        examples: the split, M examples.
        contenders: option probabilities of every example, by contender.
        fields: subgroup of every profile, by field.
        settings: smallest groups, number of bootstrap samples.
        main: the contender that the others are compared with.
        letter_mass: by contender that is a model, probability of the option letters together, of every example [M].
    """
    scorer = Scorer(examples, fields, settings.min_answers, settings.min_subgroup)
    scores = scorer.scores(contenders, settings.bootstrap, against=main)
    return ChoiceSplit(
        people=scorer.answers.people if scorer.answers.known and not examples.distributions else None,
        distributions=scorer.answers.people if examples.distributions else None,
        weighted=examples.weights is not None and not examples.distributions,
        **_size(scorer),
        letter_mass={
            name: _letter_mass(scorer.cells, examples, mass_M) for name, mass_M in (letter_mass or {}).items()
        },
        rows={name: _scores(row) for name, row in scores.rows.items()},
        differences={name: _scores(row) for name, row in scores.differences.items()},
        floor=_floor(scorer),
        worst_groups={
            name: WorstGroup(group=worst.group, answers=_count(worst.answers), emd=number(worst.distance))
            for name, worst in scores.worst.items()
        },
        left_out=Compared(cells=scorer.cells.left_out, answers=_count(scorer.cells.left_out_answers)),
        reliability={
            name: Reliability(
                accuracy=_listed(right), confidence=_listed(sure), answers=[_count(count) for count in answers]
            )
            for name, (right, sure, answers) in scores.reliability.items()
        },
        subgroups={
            field: _subgroups(field, labels, scorer, scores.subgroups, contenders) for field, labels in fields.items()
        },
        questions={
            question: _question(question, examples.only(chosen), _only(contenders, chosen), settings, main)
            for question, chosen in _places(examples.questions).items()
        },
        cells=_cells(scorer, contenders),
    )


def chat_split(
    contenders: Mapping[str, ChatLosses], people: Sequence[int] | None = None, replicates: int = 0
) -> ChatSplit:
    """Scores of one split of conversations: loss and perplexity.

    Args:
        contenders: losses of the same conversations.
        people: who talked, one number per conversation; None where it is not known (then each is somebody else).
        replicates: bootstrap samples of people.
    """
    some = next(iter(contenders.values()))
    person_M = np.arange(len(some.tokens)) if people is None else np.unique(people, return_inverse=True)[1]
    size = int(person_M.max()) + 1 if len(person_M) else 0
    weights_BU = (
        np.concatenate(list(resample(np.ones(size, dtype=np.int64), replicates, 0, replicates)))
        if replicates and size
        else None
    )
    rows: dict[str, ChatScores] = {}
    for name, losses in contenders.items():
        spreads: dict[str, tuple[Number, Number]] = {}
        if weights_BU is not None:
            nll_U, tokens_U = np.bincount(person_M, losses.nll, size), np.bincount(person_M, losses.tokens, size)
            spread = interval((weights_BU @ nll_U) / np.maximum(weights_BU @ tokens_U, 1), losses.loss)
            if spread is not None:
                low, high = spread
                spreads["loss"] = (number(low), number(high))
                spreads["perplexity"] = (number(_exp(low)), number(_exp(high)))
        rows[name] = ChatScores(loss=number(losses.loss), perplexity=number(_exp(losses.loss)), interval=spreads)
    return ChatSplit(
        conversations=len(some.tokens),
        people=None if people is None else size,
        tokens=int(some.tokens.sum()),
        rows=rows,
    )


def _floor(scorer: Scorer) -> dict[str, ChoiceScores]:
    """What the observed distributions would score against other people of the same population, and as many."""
    weight_A = scorer.answers.weight_A
    # Answers of unequal weights tell as much as fewer answers of one weight; those of a distribution are its people.
    alike = not len(weight_A) or scorer.examples.distributions
    precision = 1.0 if alike else float(weight_A.sum() / np.square(weight_A).sum())
    truths = [
        truth._replace(answers_D=truth.answers_D * precision)
        for truth in (scorer.cell_truth(), scorer.question_truth())
    ]
    cells, questions = cell_floor(truths[0]), question_floor(truths[1])
    return {
        "truth": ChoiceScores.model_validate(_numbers(cells.truth | questions.truth)),
        "sampler": ChoiceScores.model_validate(_numbers(cells.sampler | questions.sampler)),
    }


def _numbers(values: Mapping[str, float]) -> dict[str, Number]:
    return {name: number(value) for name, value in values.items()}


def _count(answers: float) -> Count:
    """A number of answers; a sum of survey weights keeps two decimals."""
    return int(answers) if float(answers).is_integer() else round(float(answers), 2)


def _only(contenders: Predictions, chosen: Sequence[int]) -> dict[str, Ragged]:
    return {name: Ragged.of(predicted).take(chosen) for name, predicted in contenders.items()}


def _cells(scorer: Scorer, contenders: Predictions) -> list[Cell]:
    cells, examples = scorer.cells, scorer.examples
    predicted = {name: predicted_distributions(cells, row, examples.counts) for name, row in contenders.items()}
    found = []
    for index, (question, group) in enumerate(cells.keys):
        observed, nominal = cells.observed[index], question in examples.nominal
        own = {name: distributions[index] for name, distributions in predicted.items()}
        found.append(
            Cell(
                question_id=question,
                group=group,
                answers=_count(cells.answers[index]),
                observed=_listed(observed),
                predicted={name: _listed(shares) for name, shares in own.items()},
                emd={name: number(float(distance(shares, observed, nominal))) for name, shares in own.items()},
            )
        )
    return found


def _question(
    question: str, examples: ChoiceExamples, contenders: Predictions, settings: EvaluationSection, main: str
) -> QuestionScores:
    scorer = Scorer(examples, {}, settings.min_answers, settings.min_subgroup)
    scores = scorer.scores(contenders, against=main)
    text, options = examples.texts[question]
    rows = {
        name: _scores({key: score for key, score in row.items() if not key.startswith(_OVER_QUESTIONS)})
        for name, row in scores.rows.items()
    }
    return QuestionScores(question=text, options=options, **_size(scorer), rows=rows)


def _subgroups(
    field: str,
    labels: Sequence[str | None],
    scorer: Scorer,
    scores: Mapping[str, Mapping[str, Mapping[str, Score]]],
    contenders: Predictions,
) -> Subgroups:
    """Accuracy and distance of the subgroups of one field that are large enough to be named."""
    examples = scorer.examples
    places = _places([labels[profile] for profile in examples.profiles.tolist()])
    shown = []
    for label, accuracies in scores.get(field, {}).items():
        chosen = places[label]
        part, predictions = examples.only(chosen), _only(contenders, chosen)
        cells = gather_cells(part.questions, [label] * len(chosen), part.counts, scorer.min_answers)
        nominal = [question in examples.nominal for question, _ in cells.keys]
        rows = {}
        for name, accuracy in accuracies.items():
            predicted = predicted_distributions(cells, predictions[name], part.counts)
            distances = [float(distance(*pair)) for pair in zip(predicted, cells.observed, nominal, strict=True)]
            mean = number(float(np.average(distances, weights=cells.answers))) if distances else None
            spread = {} if accuracy.interval is None else {"accuracy": _rounded(accuracy.interval)}
            rows[name] = ChoiceScores(emd=mean, accuracy=number(accuracy.value), interval=spread)
        answers = _count(part.counts.sums().sum())
        shown.append(Subgroup(label=label, people=scorer.sizes[field][label], answers=answers, rows=rows))
    return Subgroups(shown=shown, left_out=len(scorer.sizes[field]) - len(shown))


def _places(names: Sequence[Name]) -> dict[Name, list[int]]:
    """Where each name stands."""
    found: dict[Name, list[int]] = {}
    for index, name in enumerate(names):
        found.setdefault(name, []).append(index)
    return found


def _letter_mass(cells: Cells, examples: ChoiceExamples, mass_M: Array) -> LetterMass:
    """Probability of the option letters together: mean over answers, and the cell where it is lowest."""
    answers_M = examples.counts.sums()
    means = [float(np.average(mass_M[members], weights=answers_M[members])) for members in cells.members]
    lowest = None
    if means:
        (question, group), mean = min(zip(cells.keys, means, strict=True), key=lambda cell: cell[1])
        lowest = LowestMass(question_id=question, group=group, mean=number(mean))
    return LetterMass(mean=number(float(np.average(mass_M, weights=answers_M))), lowest=lowest)


def _size(scorer: Scorer) -> _Size:
    examples, cells, weight_A = scorer.examples, scorer.cells, scorer.answers.weight_A
    size: _Size = {
        "distance": distance_name(question in examples.nominal for question in examples.questions.names),
        "groups": len({group for _, group in cells.keys}),
        "answers": _count(weight_A.sum()),
        "compared": Compared(cells=len(cells.keys), answers=_count(cells.answers.sum())),
    }
    if examples.weights is not None and not examples.distributions:
        # (sum w)^2 / sum w^2: how many answers of one weight would be as precise.
        size["effective_answers"] = round(float(weight_A.sum() ** 2 / np.square(weight_A).sum()), 2)
    return size


def _scores(scores: Mapping[str, Score]) -> ChoiceScores:
    """Scores of a contender, by the names of the fields of :class:`ChoiceScores`."""
    values = {name: number(score.value) for name, score in scores.items()}
    spreads = {name: _rounded(score.interval) for name, score in scores.items() if score.interval is not None}
    return ChoiceScores.model_validate({"recovered": None, **values, "interval": spreads})


def _rounded(interval: tuple[float, float]) -> tuple[Number, Number]:
    return number(interval[0]), number(interval[1])


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _listed(values: Array) -> list[Number]:
    return [number(float(value)) for value in values]
