"""A survey as its institute keeps it: an SPSS, Stata, CSV or parquet file, and a map of its columns.

Shapes: N respondents, Q questions, F profile fields.
"""

from __future__ import annotations

import bisect
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cuma_ds.data.raw import ProfileList, ReadOptions, Rows, check_questions, question_file
from cuma_ds.data.rows import Question
from cuma_ds.data.sources.no_answer import means_no_answer
from cuma_ds.data.sources.survey_file import Cells, Code, Column, SurveyFile, code_of
from cuma_ds.data.sources.survey_map import Asked, Places, SurveyMap, Who, labelled, read_map
from cuma_ds.data.splits import draws
from cuma_ds.errors import ConfigError, DataError
from cuma_ds.identity import file_sha256
from cuma_ds.profiles.linearize import one_spelling

# Rows of a table in a message start below its header.
_FIRST_ROW = 1


def read(path: str, options: ReadOptions) -> Rows:
    """Read people's answers, some columns at a time: memory grows with people times one byte per question.

    Args:
        path: the survey's file.
        options: how to read; ``config.map`` names the map. ``workers`` is not used.

    Raises:
        DataError: one line with file and column, or with the map's line, for the first thing that is wrong.
        ConfigError: there is no map.
    """
    config = options.config
    if config.map is None:
        raise ConfigError(
            "data.map is missing; source survey needs a map of the file's columns, which "
            "launchers/prepare_data.py survey --suggest writes a first time"
        )
    file = SurveyFile.open(path)
    survey, places = read_map(config.map, file)
    if config.weights and survey.weight is None:
        raise DataError(f"{places(())}: data.weights is true, but the map names no column 'weight'")
    if survey.weight is not None and not config.weights:
        warnings.warn(f"{survey.weight} has weights that count nothing, because data.weights is false", stacklevel=2)
    asked = check_questions(config, list(survey.questions))
    people = _read_people(file, survey, places, asked, options)
    return _rows(people, file, survey, places, options)


class _People(NamedTuple):
    """Everybody in the file.

    Attributes:
        cells: of person, weight and wave, by column.
        value_NF: [N, F] int32, place of each person's text in ``texts``, -1 for no answer.
        texts: by profile field.
        option_NQ: [N, Q] int8, option chosen, -1 for none.
    """

    cells: Mapping[str, Cells]
    value_NF: np.ndarray
    texts: list[list[str | int | float]]
    option_NQ: np.ndarray


def _read_people(
    file: SurveyFile, survey: SurveyMap, places: Places, asked: Sequence[str], options: ReadOptions
) -> _People:
    columns = {column: key for key, column in survey.columns() if key[0] != "questions" or key[1] in asked}
    who = {name: number for number, name in enumerate(survey.who)}
    cells: dict[str, Cells] = {}
    values, texts = [np.zeros(0, np.int32)] * len(who), [list[str | int | float]() for _ in who]
    chosen = [np.zeros(0, np.int8)] * len(asked)
    for done, (column, found) in enumerate(file.cells(list(columns)), start=1):
        key = columns[column]
        if key[0] == "who":
            number, part = who[key[1]], survey.who[key[1]]
            texts[number], values[number] = _fields(found, part, survey, file.columns[column], places(key[:2]))
        elif key[0] == "questions":
            part_ = survey.questions[key[1]]
            chosen[asked.index(key[1])] = _options(found, part_, survey, (file, column, places((*key[:2], "options"))))
        else:
            cells[column] = found
        if options.progress is not None:
            options.progress(done, len(columns))
    return _People(cells, np.stack(values, axis=1), texts, np.stack(chosen, axis=1))


def _rows(people: _People, file: SurveyFile, survey: SurveyMap, places: Places, options: ReadOptions) -> Rows:
    """Those who answered and of whom something is known, with the ids of the survey."""
    kept_N = np.ones(len(people.option_NQ), bool)
    skipped: dict[str, int] = {}

    def leave_out(reason: str, left_N: np.ndarray) -> None:
        count = int((left_N & kept_N).sum())
        if count:
            skipped[reason] = count
            kept_N[left_N] = False

    if survey.wave is not None and survey.wave.keep:
        leave_out("people of other waves", ~_in_waves(people.cells[survey.wave.column], survey, file, places))
    weight_N = None
    if options.config.weights and survey.weight is not None:
        weight_N = _weights(people.cells[survey.weight], survey.weight, file, kept_N)
        leave_out("people whose weight is 0", weight_N == 0)
    leave_out("people without any answer", np.all(people.option_NQ < 0, axis=1))
    leave_out("people of whom nothing is known", np.all(people.value_NF < 0, axis=1))
    if not kept_N.any():
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise DataError(f"{file.path}: nothing is left of {len(kept_N)} people: {reasons or 'there are none'}")
    profiles, profile_N = _profiles(people.value_NF[kept_N], people.texts, list(survey.who), options.template)
    person_N, draw_P = _persons(people, survey, file, kept_N, options.config.split_seed)
    questions = [_question(name, survey.questions[name]) for name in check_questions(options.config, survey.questions)]
    inputs = {file.path.name: file_sha256(file.path), places.path.name: file_sha256(places.path)}
    return Rows(
        "choice", person_N, draw_P, profile_N, profiles, inputs,
        question_file(questions, None if options.spool is None else options.spool / "questions.arrow"),
        option_NQ=people.option_NQ[kept_N], skipped=skipped, weight_N=None if weight_N is None else weight_N[kept_N],
    )  # fmt: skip


def _question(name: str, asked: Asked) -> Question:
    texts = dict.fromkeys(labelled(asked.options).values())
    return Question(name, one_spelling(asked.wording), tuple(texts), asked.scale)


def _options(cells: Cells, asked: Asked, survey: SurveyMap, where: tuple[SurveyFile, str, str]) -> np.ndarray:
    """[N] int8, the option that each person chose, -1 for no answer.

    Raises:
        DataError: a code that the map does not know.
    """
    option_of = labelled(asked.options)
    texts = list(dict.fromkeys(option_of.values()))
    meaning = dict.fromkeys(survey.missing_in(asked), -1) | {
        code: texts.index(text) for code, text in option_of.items()
    }
    return _looked_up(cells, meaning, where).astype(np.int8)


def _looked_up(cells: Cells, meaning: Mapping[Code, int], where: tuple[SurveyFile, str, str]) -> np.ndarray:
    file, column, line = where
    for code, count in zip(cells.codes, cells.counts().tolist(), strict=True):
        if code not in meaning:
            raise DataError(
                f"{file.path}: column {column}: code {code} of {count:,} people has no label ({line}); add it there, "
                "or to missing"
            )
    return np.array([*(meaning[code] for code in cells.codes), -1], np.int32)[cells.place_N]


def _fields(
    cells: Cells, who: Who, survey: SurveyMap, column: Column, where: str
) -> tuple[list[str | int | float], np.ndarray]:
    """The texts of a profile field, and the place of each person's among them: [N] int32, -1 for no answer.

    Raises:
        DataError: a code without a label in a column that has labels, or a text where numbers are put into bands.
    """
    labels = labelled(who.labels) or dict(column.labels)
    missing = survey.missing_in(who) | {code for code, text in labels.items() if means_no_answer(text)}
    read = _band(who.bands) if who.bands else _text(labels)
    texts: dict[str | int | float, int] = {}
    meaning = []
    for code, count in zip(cells.codes, cells.counts().tolist(), strict=True):
        text = None if code in missing or means_no_answer(str(code)) else read(code)
        if text is None and code not in missing and not means_no_answer(str(code)):
            problem = "is no number" if who.bands else "has no label"
            raise DataError(
                f"{where}: column {column.name}: code {code} of {count:,} people {problem}; add it to labels, or to "
                "missing"
            )
        meaning.append(-1 if text is None else texts.setdefault(text, len(texts)))
    return list(texts), np.array([*meaning, -1], np.int32)[cells.place_N]


def _text(labels: Mapping[Code, str]) -> Callable[[Code], str | int | float | None]:
    """Codes as their labels say; as they are where there are no labels."""
    return labels.get if labels else lambda code: code


def _band(bands: Sequence[float]) -> Callable[[Code], str | None]:
    """Numbers as the group they belong to, e.g. ``30 to 44``."""
    names = [f"under {bands[0]:g}", *(f"{low:g} to {high - 1:g}" for low, high in itertools.pairwise(bands))]
    names.append(f"{bands[-1]:g} or over")
    return lambda code: None if isinstance(code, str) else names[bisect.bisect_right(bands, code)]


def _in_waves(cells: Cells, survey: SurveyMap, file: SurveyFile, places: Places) -> np.ndarray:
    """[N] bool, whether a person belongs to a wave that is kept."""
    assert survey.wave is not None
    kept = [code_of(code) for code in survey.wave.keep]
    for code in kept:
        if code not in cells.codes:
            raise DataError(
                f"{places(('wave', 'keep'))}: column {survey.wave.column} of {file.path} has no code {code}; it has "
                f"{', '.join(map(str, cells.codes[:20]))}"
            )
    return np.array([*(code in kept for code in cells.codes), False])[cells.place_N]


def _weights(cells: Cells, column: str, file: SurveyFile, kept_N: np.ndarray) -> np.ndarray:
    """[N] float64, positive or 0; 1 for people who are left out anyway."""
    known = [code if not isinstance(code, str) else np.nan for code in cells.codes]
    weight_N = np.array([*known, np.nan], np.float64)[cells.place_N]
    weight_N[~kept_N] = 1.0
    wrong = np.flatnonzero(~((weight_N >= 0) & np.isfinite(weight_N)))
    if len(wrong):
        code = cells.codes[cells.place_N[wrong[0]]] if cells.place_N[wrong[0]] >= 0 else "empty"
        raise DataError(
            f"{file.path}: row {wrong[0] + _FIRST_ROW}: weight {column} is {code}; allowed: a positive number, or 0 to "
            "leave that person out"
        )
    return weight_N


def _persons(
    people: _People, survey: SurveyMap, file: SurveyFile, kept_N: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Number of each kept person, and what decides on whom is tested (see :func:`cuma_ds.data.splits.draws`).

    Raises:
        DataError: a person without an id, or who comes twice where there are no waves.
    """
    rows = np.flatnonzero(kept_N)
    if survey.person is None:
        return np.arange(len(rows), dtype=np.int32), draws(seed, "row", (f"{file.path.name}:{row + 1}" for row in rows))
    cells = people.cells[survey.person]
    place_N = cells.place_N[rows]
    if (place_N < 0).any():
        row = rows[np.flatnonzero(place_N < 0)[0]] + _FIRST_ROW
        raise DataError(f"{file.path}: row {row}: {survey.person} is empty; each person has an id, or map no person")
    present, person_N, count = np.unique(place_N, return_inverse=True, return_counts=True)
    if survey.wave is None and count.max() > 1:
        first, second = rows[person_N == count.argmax()][:2] + _FIRST_ROW
        raise DataError(
            f"{file.path}: rows {first} and {second} have one {survey.person}; each person has one row, or map the "
            "wave of each"
        )
    return person_N.astype(np.int32), draws(seed, "person", (str(cells.codes[place]) for place in present))


def _profiles(
    value_NF: np.ndarray, texts: Sequence[Sequence[str | int | float]], names: Sequence[str], template: str
) -> tuple[ProfileList, np.ndarray]:
    """Distinct profiles, and each person's row in them [N] int32."""
    profiles = ProfileList(template)
    distinct_GF, group_N = np.unique(value_NF, axis=0, return_inverse=True)
    row_G = [
        profiles.add({name: text[place] for name, text, place in zip(names, texts, group, strict=True) if place >= 0})
        for group in distinct_GF.tolist()
    ]
    return profiles, np.array(row_G, np.int32)[group_N.reshape(-1)]
