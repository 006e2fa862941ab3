"""A first map of a survey's file, from the file's own labels, and a summary for whoever checks it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import yaml

from cuma_ds.data.raw import Progress
from cuma_ds.data.rendering import LETTERS
from cuma_ds.data.sources.no_answer import means_no_answer
from cuma_ds.data.sources.survey_file import Cells, Code, Column, SurveyFile

# Beginnings of names and short labels that tell what a column is, in the languages of the usual surveys.
_KNOWN = {
    "person": r"id|case ?id|resp(ondent)?( ?id| ?no)?|person( ?id)?|idno|serial|d_interview|interview( no| id)|uuid",
    "weight": r"w|\w*weights?|\w*wgh?t\w*|\w*wt|wt\w*|pond\w*|gewicht\w*|poids|peso|вес|权重|加重|ウェイト|وزن",
    "wave": r"wave|round|s002\w*|a_wave|welle|vague|ola|волна|波次",
    "country": (
        r"country|cntry|nation|b_country\w*|s003\w*|land|staat|pays|país|pais|ülke|страна|国家|国|دولة|الدولة|البلد|देश|국가"
    ),
    "age": r"age|x003\w*|q262|alter|âge|edad|idade|età|yaş|возраст|年龄|年齢|العمر|عمر|आयु|उम्र|나이",
    "gender": (
        r"sex|gender|x001|q260|geschlecht|sexe|sexo|género|genero|sesso|cinsiyet|пол|性别|性別|الجنس|جنس|लिंग|성별"
    ),
    "education": (
        r"edu\w*|highest educ\w*|degree|q275\w*|x025\w*|bildung\w*|schulab\w*|diplôme|educación|educação|eğitim|"
        r"образование|教育|学历|学歴|التعليم|शिक्षा|교육"
    ),
    "religion": (
        r"relig(ion|ious denom)\w*|denomination|q289\w*|f025\w*|konfession|religión|religião|din\b|"
        r"религия|宗教|الدين|धर्म|종교"
    ),
    "marital status": (
        r"marital\w*|q273|x007\w*|familienstand|état civil|estado civil|семейное положение|婚姻|الحالة الاجتماعية"
    ),
    "employment": r"employ\w*|q279|x028\w*|erwerb\w*|emploi|empleo|занятость|就业|職業|العمل",
    "ethnicity": r"ethnic\w*|race|q290|ethnie|etnia|этнич\w*|民族",
    "region": r"region|n_region\w*|x048\w*|bundesland|région|región|регион|地区|المنطقة",
}
_AGE_BANDS = (18, 30, 45, 60)
# A label longer than this is a question, even if it begins with "Country".
_LONGEST_LABEL = 60
# Numbers with more distinct values than this are put into bands.
_MOST_NUMBERS = 12
_LONGEST_OPTION = 120


@dataclass
class Part:
    """A column of the suggested map.

    Attributes:
        name: of the profile field, or of the question.
        column: of the file.
        text: the question as asked, or the field's label.
        values: distinct answers, or options.
        scale: of a question.
        missing: share of all people without an answer, in [0, 1].
        unlabelled: codes without a label, and how many people have each.
        entry: what stands in the map.
    """

    name: str
    column: str
    text: str
    values: int
    scale: str
    missing: float
    unlabelled: Mapping[Code, int]
    entry: dict[str, object]

    def lines(self) -> list[str]:
        """The entry as it stands in the map, with a comment for each code without a label."""
        comments = [
            f"  # {self.column}: code {code} of {people:,} people has no label. What is it, or is it missing?"
            for code, people in self.unlabelled.items()
        ]
        return [*comments, *(f"  {line}" for line in _dumped({self.name: self.entry}).splitlines())]


@dataclass
class Suggestion:
    """A first map.

    Attributes:
        file: that it is for.
        people: rows of the file.
        person, weight, wave: columns, where some look like it.
        who, questions: the columns that are mapped.
        left_out: columns that are not, by the reason.
        missing: codes that are no answer in every column.
    """

    file: SurveyFile
    people: int = 0
    person: str | None = None
    weight: str | None = None
    wave: str | None = None
    who: list[Part] = field(default_factory=list)
    questions: list[Part] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    missing: list[Code] = field(default_factory=list)

    def yaml(self) -> str:
        """The map as text, with a comment for whatever is to be decided."""
        head = [
            f"# A first map of {self.file.path.name}: {self.people:,} people. Look through it before you use it.",
            "# Move what says who people are to `who`, delete what is not to be asked, put options in their order, and",
            "# say `scale: nominal` where that order means nothing. docs/surveys.md explains every key.",
        ]
        wave = None if self.wave is None else {"column": self.wave}
        lead = {"file": self.file.path.name, "person": self.person, "weight": self.weight, "wave": wave}
        blocks = [*head, _dumped({**lead, "missing": self.missing}), "who:"]
        if not self.who:
            blocks.append("  # No column looks like it: name the columns that say who people are.")
        blocks += [line for part in self.who for line in part.lines()]
        blocks += ["questions:", *(line for part in self.questions for line in part.lines())]
        return "\n".join(blocks) + "\n"


class _Codes(NamedTuple):
    """The codes of a column by what they stand for."""

    options: dict[Code, str]
    missing: list[Code]
    unlabelled: dict[Code, int]


def suggest(file: SurveyFile, progress: Progress | None = None) -> Suggestion:
    """Look at every column of a file once.

    Args:
        file: the survey.
        progress: told (columns done, in all).
    """
    found = Suggestion(file)
    for done, (name, cells) in enumerate(file.cells(list(file.columns)), start=1):
        found.people = len(cells.place_N)
        _place(found, file.columns[name], cells)
        if progress is not None:
            progress(done, len(file.columns))
    _share_missing(found)
    return found


def _place(found: Suggestion, column: Column, cells: Cells) -> None:
    """Put a column where it belongs."""
    empty = float(np.mean(cells.place_N < 0)) if len(cells.place_N) else 1.0
    numbers = not any(isinstance(code, str) for code in cells.codes)
    role = _role(column, cells, empty)
    taken = {part.name for part in found.who}
    if not cells.codes:
        found.left_out.setdefault("empty", []).append(column.name)
    elif role in ("person", "weight", "wave") and getattr(found, role) is None:
        setattr(found, role, column.name)
    elif role in _KNOWN and role not in ("person", "weight", "wave") and role not in taken:
        found.who.append(_who(role, column, cells))
    elif column.labels or not numbers:
        _ask(found, column, cells)
    else:
        found.left_out.setdefault("numbers without labels", []).append(column.name)


def _role(column: Column, cells: Cells, empty: float) -> str | None:
    """What a column looks like by its name or its label, if its codes agree."""
    label = column.label if len(column.label) <= _LONGEST_LABEL and "?" not in column.label else ""
    for role, words in _KNOWN.items():
        known = re.compile(rf"(?:{words})(?![^\W\d_]).*")
        if not (re.fullmatch(words, column.name.casefold()) or known.fullmatch(label.casefold())):
            continue
        numbers = [code for code in cells.codes if not isinstance(code, str)]
        fits = {
            "person": not empty and len(cells.codes) == len(cells.place_N),
            "weight": bool(numbers) and len(numbers) == len(cells.codes) and not column.labels and min(numbers) >= 0,
            "wave": len(cells.codes) <= len(LETTERS),
        }
        if fits.get(role, len(cells.codes) > 1):
            return role
    return None


def _who(role: str, column: Column, cells: Cells) -> Part:
    """A profile field; numbers of many values are put into bands."""
    counts = dict(zip(cells.codes, cells.counts().tolist(), strict=True))
    nothing = {code for code in counts if means_no_answer(column.labels.get(code, str(code)))}
    bare = {code: people for code, people in counts.items() if code not in column.labels and code not in nothing}
    numbers = [code for code in bare if not isinstance(code, str)]
    entry: dict[str, object] = {"column": column.name}
    if len(numbers) > _MOST_NUMBERS:
        entry["bands"] = list(_AGE_BANDS) if role == "age" else _quarters(numbers, bare)
    unlabelled = bare if column.labels and "bands" not in entry else {}
    values = counts.keys() - nothing - unlabelled.keys()
    missing = 1 - sum(counts[code] for code in values) / len(cells.place_N)
    return Part(role, column.name, column.label, len(values), "", missing, unlabelled, entry)


def _quarters(numbers: list[int | float], people: Mapping[Code, int]) -> list[int]:
    """Lower ends of three groups of about equal size above a first one."""
    values = np.repeat(numbers, [people[number] for number in numbers])
    return sorted({int(edge) for edge in np.quantile(values, [0.25, 0.5, 0.75])})


def _ask(found: Suggestion, column: Column, cells: Cells) -> None:
    """A question, if the column has options."""
    codes = _codes(column, cells)
    options, scale = codes.options, "nominal" if column.measure == "nominal" else "ordinal"
    unlabelled = codes.unlabelled
    if not column.labels:  # texts that are their own labels, in no known order
        options, unlabelled, scale = {code: str(code) for code in codes.unlabelled}, {}, "nominal"
    distinct = len(set(options.values()))
    if distinct < 2 or distinct > len(LETTERS) or any(len(text) > _LONGEST_OPTION for text in options.values()):
        reason = "fewer than two options" if distinct < 2 else f"more than {len(LETTERS)} options, or long texts"
        found.left_out.setdefault(reason, []).append(column.name)
        return
    entry: dict[str, object] = {"wording": column.label or column.name, "scale": scale, "options": options}
    if codes.missing:
        entry["missing"] = codes.missing
    counts = dict(zip(cells.codes, cells.counts().tolist(), strict=True))
    answered = sum(people for code, people in counts.items() if code in options)
    missing = 1 - answered / found.people
    found.questions.append(Part(column.name, column.name, column.label, distinct, scale, missing, unlabelled, entry))


def _codes(column: Column, cells: Cells) -> _Codes:
    """Options, codes for no answer, and codes without a label.

    Whole numbers between two labelled ones are points of a scale and have their number as label.
    """
    counts = dict(zip(cells.codes, cells.counts().tolist(), strict=True))
    nothing = {code for code, text in column.labels.items() if means_no_answer(text)}
    nothing |= {code for code in column.labels if not isinstance(code, str) and code < 0}
    nothing |= {code for code in counts if isinstance(code, str) and means_no_answer(code)}
    options = {code: text for code, text in column.labels.items() if code not in nothing}
    ends = [code for code in options if isinstance(code, int)]
    if len(ends) >= 2 and max(ends) - min(ends) < len(LETTERS):
        inside = range(min(ends), max(ends) + 1)
        if any(code in counts and code not in options for code in inside):
            options = {code: options.get(code, str(code)) for code in inside if code not in nothing} | options
            options = dict(sorted(options.items(), key=lambda item: (isinstance(item[0], str), item[0])))
    unlabelled = {code: people for code, people in counts.items() if code not in options and code not in nothing}
    return _Codes(options, [code for code in [*column.labels, *counts] if code in nothing], unlabelled)


def _share_missing(found: Suggestion) -> None:
    """Negative codes that are no answer in several questions, and an answer in none, are named once for all."""
    times: Counter[Code] = Counter()
    for part in found.questions:
        part.entry["missing"] = list(dict.fromkeys(_listed(part)))
        times.update(code for code in _listed(part) if not isinstance(code, str) and code < 0)
    found.missing = sorted(
        (code for code, count in times.items() if count > 1), key=lambda code: (str(type(code)), code)
    )
    for part in found.questions:
        part.entry["missing"] = [code for code in _listed(part) if code not in found.missing]
        if not part.entry["missing"]:
            del part.entry["missing"]


def _listed(part: Part) -> list[Code]:
    missing = part.entry.get("missing", [])
    return missing if isinstance(missing, list) else []


def _dumped(values: Mapping[str, object]) -> str:
    return yaml.safe_dump(
        dict(values), sort_keys=False, allow_unicode=True, default_flow_style=None, width=110
    ).rstrip()
