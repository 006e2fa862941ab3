"""The map of a survey's file: which columns say who people are, and which are questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cuma_ds.data.rendering import LETTERS
from cuma_ds.data.rows import Scale
from cuma_ds.data.sources.survey_file import Code, SurveyFile, code_of
from cuma_ds.errors import DataError, nearest
from cuma_ds.profiles.linearize import one_spelling
from cuma_ds.recipe import Key, read_yaml


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Who(_Part):
    """A profile field.

    Attributes:
        column: of the file.
        labels: the text of each code; without, those of the file.
        bands: lower ends of the groups that numbers are put into, e.g. 18, 30, 45, 60.
        missing: codes that say nothing, besides those of the whole map.
    """

    column: str
    labels: dict[str, str] = {}
    bands: tuple[float, ...] = ()
    missing: tuple[str, ...] = ()


class Asked(_Part):
    """A question.

    Attributes:
        column: of the file; without, the question's own name.
        wording: as asked.
        options: the text of each code, in the order in which they are shown; codes of one text are one option.
        scale: whether that order means something.
        missing: codes that are no answer, besides those of the whole map.
    """

    column: str = ""
    wording: str = Field(min_length=1)
    options: dict[str, str]
    scale: Scale = "ordinal"
    missing: tuple[str, ...] = ()


class Wave(_Part):
    """The column that tells the rounds of a survey apart.

    Attributes:
        column: of the file.
        keep: codes of the rounds that are read; without, all.
    """

    column: str
    keep: tuple[str, ...] = ()


class SurveyMap(_Part):
    """What a survey's columns mean.

    Attributes:
        file: name of the file it was written for.
        person: column of the respondents' ids; without, each row is a person of its own.
        weight: column of the survey weights, read with ``data.weights``.
        wave: the survey's rounds.
        missing: codes that are no answer, in every column.
        who: profile fields by name.
        questions: by id.
    """

    file: str | None = None
    person: str | None = None
    weight: str | None = None
    wave: Wave | None = None
    missing: tuple[str, ...] = ()
    who: dict[str, Who] = Field(min_length=1)
    questions: dict[str, Asked] = Field(min_length=1)

    def columns(self) -> Iterator[tuple[Key, str]]:
        """Each place of the map that names a column, and the column."""
        for name in ("person", "weight"):
            if getattr(self, name) is not None:
                yield (name,), getattr(self, name)
        if self.wave is not None:
            yield ("wave", "column"), self.wave.column
        for name, who in self.who.items():
            yield ("who", name, "column"), who.column
        for name, asked in self.questions.items():
            yield ("questions", name, "column"), asked.column or name

    def missing_in(self, part: Who | Asked) -> set[Code]:
        """The codes that are no answer in one column."""
        return {code for code in map(code_of, (*self.missing, *part.missing)) if code is not None}


def labelled(texts: Mapping[str, str]) -> dict[Code, str]:
    """The texts of a map by the codes that its keys stand for."""
    known = ((code_of(key), one_spelling(text)) for key, text in texts.items())
    return {code: text for code, text in known if code is not None}


class Places:
    """Where the keys of a map stand, for messages.

    Args:
        path: of the map.
        lines: of each key, from 1.
    """

    def __init__(self, path: Path, lines: Mapping[Key, int]) -> None:
        self.path = path
        self._lines = lines

    def __call__(self, key: Key) -> str:
        """``file:line`` of a key, or of what holds it."""
        while key and key not in self._lines:
            key = key[:-1]
        return f"{self.path}:{self._lines[key]}" if key else str(self.path)


def read_map(path: str | Path, file: SurveyFile) -> tuple[SurveyMap, Places]:
    """Read a map and check it against the file that it is for.

    Raises:
        DataError: no readable map, an unknown key, a column that the file does not have, or one that is mapped twice,
            bands or options that make no sense. One line with the line of the map.
    """
    place = Path(path)
    try:
        values, lines = read_yaml(place.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise DataError(
            f"{place}{line}: broken YAML: {getattr(error, 'problem', None) or 'cannot be parsed'}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a UTF-8 text file"
        raise DataError(
            f"cannot read the map {place}: {reason}; launchers/prepare_data.py survey --suggest writes a first one"
        ) from None
    places = Places(place, lines)
    if not isinstance(values, dict):
        raise DataError(f"{place}: a map is a mapping of {', '.join(SurveyMap.model_fields)}")
    try:
        survey = SurveyMap.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        raise DataError(_problem(error, places)) from None
    _check_columns(survey, places, file)
    for name, who in survey.who.items():
        if list(who.bands) != sorted(set(who.bands)) or (who.bands and who.labels):
            raise DataError(
                f"{places(('who', name, 'bands'))}: bands of {name!r} are {[*map(_plain, who.bands)]}; allowed: rising "
                "numbers, and no labels beside them"
            )
    for name, asked in survey.questions.items():
        _check_options(name, asked, survey, places)
    return survey, places


def _problem(error: ValidationError, places: Places) -> str:
    problem = error.errors()[0]
    key = tuple(str(part) for part in problem["loc"])
    parts: dict[str, type[BaseModel]] = {"who": Who, "questions": Asked, "wave": Wave}
    known = list((parts.get(key[0], SurveyMap) if len(key) > 1 else SurveyMap).model_fields)
    if problem["type"] == "extra_forbidden":
        return f"{places(key)}: unknown key {'.'.join(key)!r}{nearest(key[-1], known)}; allowed: {', '.join(known)}"
    return f"{places(key)}: {'.'.join(key)}: {problem['msg']}"


def _check_columns(survey: SurveyMap, places: Places, file: SurveyFile) -> None:
    mapped: dict[str, Key] = {}
    for key, column in survey.columns():
        if column not in file.columns:
            other = "" if survey.file in (None, file.path.name) else f"; the map was written for {survey.file}"
            raise DataError(
                f"{places(key)}: {file.path} has no column {column!r}{nearest(column, file.columns)}{other}"
            )
        if column in mapped:
            raise DataError(
                f"{places(key)}: column {column!r} is mapped twice, as {'.'.join(mapped[column])} and as "
                f"{'.'.join(key)}; map it once"
            )
        mapped[column] = key


def _check_options(name: str, asked: Asked, survey: SurveyMap, places: Places) -> None:
    where = places(("questions", name, "options"))
    texts = [one_spelling(text) for text in asked.options.values()]
    if not 2 <= len(set(texts)) <= len(LETTERS) or not all(texts):
        raise DataError(
            f"{where}: question {name!r} has {len(set(texts))} options; allowed: 2 to {len(LETTERS)} different texts"
        )
    codes = [code_of(code) for code in asked.options]
    both = [code for code in codes if code in survey.missing_in(asked)]
    if both or len(set(codes)) < len(codes):
        twice = next(code for code in codes if code in both or codes.count(code) > 1)
        raise DataError(f"{where}: code {twice} of question {name!r} stands twice, in options or in missing; keep one")


def _plain(number: float) -> int | float:
    return int(number) if number.is_integer() else number
