"""What the codes of WorldValuesBench mean: the three JSON files that come with the benchmark."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cuma_ds.config import DataSection
from cuma_ds.data.raw import check_questions
from cuma_ds.data.rendering import LETTERS
from cuma_ds.data.rows import Question, Scale
from cuma_ds.errors import DataError
from cuma_ds.files import first_line
from cuma_ds.identity import file_sha256
from cuma_ds.profiles.linearize import is_missing, one_spelling
from cuma_ds.strict_json import read_json

# The profile the method's authors use: column of the survey, name of the field.
FIELDS = {
    "B_COUNTRY": "country",
    "X003R": "age",
    "Q260": "gender",
    "Q275": "education",
    "Q273": "marital status",
    "Q289": "religion",
    "Q290": "ethnicity",
    "Q279": "employment",
}
_JSON = ("codebook.json", "question_metadata.json", "answer_adjustment.json")


@dataclass(frozen=True)
class Codebook:
    """What codes mean.

    Attributes:
        questions: Q questions with their options in the order of the scale.
        raw: per question, code in the survey's file to option, -1 where the benchmark drops the answer.
        scaled: per question, code in the benchmark's files to option.
        values: per profile column, what a profile may say.
        by_code, by_text: per profile column, the survey's code and the benchmark's text to the place in ``values``; -1
            for no answer.
        inputs: the files' hashes.
    """

    questions: list[Question]
    raw: list[dict[int, int]]
    scaled: list[dict[int, int]]
    values: dict[str, list[str]]
    by_code: dict[str, dict[str, int]]
    by_text: dict[str, dict[str, int]]
    inputs: dict[str, str]


def read_codebook(root: Path, config: DataSection) -> Codebook:
    """The three JSON files that come with the benchmark.

    Raises:
        DataError: one is missing or not what it should be, or ``config.questions`` names an unknown question.
    """
    loaded, inputs = [], {}
    for name in _JSON:
        file = _find_below(root, name)
        try:
            loaded.append(read_json(file.read_text(encoding="utf-8-sig")))
        except ValueError as error:
            raise DataError(f"{file} is not JSON in UTF-8: {first_line(error)}") from None
        inputs[name] = file_sha256(file)
    choices, metadata, adjustments = loaded
    try:
        known = [name for name, entry in metadata.items() if entry["use_case"] == "value"]
        questions, raw, scaled = [], [], []
        for name in check_questions(config, known):
            question, raw_codes, scaled_codes = _scale(
                name, choices[name]["choices"], metadata[name], adjustments.get(name, {})
            )
            label = " ".join(str(choices[name].get("question") or "").split()) or None
            questions.append(replace(question, label=label))
            raw.append(raw_codes)
            scaled.append(scaled_codes)
        values: dict[str, list[str]] = {}
        by_code: dict[str, dict[str, int]] = {}
        by_text: dict[str, dict[str, int]] = {}
        for column in FIELDS:
            texts = choices[column]["choices"]
            spoken = {code: _field_text(column, code, text) for code, text in texts.items()}
            values[column] = list(dict.fromkeys(text for text in spoken.values() if text))
            place = {text: index for index, text in enumerate(values[column])}
            by_code[column] = {code: place.get(text or "", -1) for code, text in spoken.items()}
            by_text[column] = {clean(texts[code]): place.get(text or "", -1) for code, text in spoken.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{root}: codebook.json and question_metadata.json are not those of the benchmark: {error} is missing"
        ) from None
    if not questions:
        raise DataError(f"{root}: question_metadata.json names no value question")
    return Codebook(questions, raw, scaled, values, by_code, by_text, inputs)


def _scale(
    name: str, choices: Mapping[str, str], entry: Mapping[str, Any], adjustment: Mapping[str, str]
) -> tuple[Question, dict[int, int], dict[int, int]]:
    """A question with one option per point of its scale, and the meaning of raw and of adjusted codes."""
    low, high = int(entry["answer_scale_min"]), int(entry["answer_scale_max"])
    texts: dict[int, str] = {}
    raw: dict[int, int] = {}
    for key, text in choices.items():
        code = int(key)
        if code < 0:
            continue
        target = adjustment.get(key, key)
        if target == "":
            raw[code] = -1
            continue
        point = int(target)
        if not low <= point <= high:
            raise DataError(f"codebook.json: code {code} of {name} means {point}, outside its scale {low} to {high}")
        raw[code] = point - low
        # Where two codes share a point, the one that was not moved names it.
        if point == code or point not in texts:
            texts[point] = text
    missing = [point for point in range(low, high + 1) if point not in texts]
    if missing or not 2 <= high - low + 1 <= len(LETTERS):
        raise DataError(
            f"codebook.json: {name} has no option for {missing or 'a scale of'} {low} to {high}; "
            f"2 to {len(LETTERS)} options"
        )
    options = tuple(" ".join(texts[point].split()) for point in range(low, high + 1))
    if len(set(options)) < len(options):
        options = tuple(f"{point}: {text}" for point, text in zip(range(low, high + 1), options, strict=True))
    scale: Scale = "ordinal" if entry.get("answer_data_type", "ordinal") == "ordinal" else "nominal"
    question = Question(name, " ".join(entry["question"].split()), options, scale)
    return question, raw, {point: point - low for point in range(low, high + 1)}


def _find_below(root: Path, name: str) -> Path:
    folder = root.parent if root.is_file() else root
    if not folder.is_dir():
        raise DataError(
            f"there is no data at {root}; expected a folder with the benchmark's files, or with the WVS-7 CSV"
        )
    places = [
        folder,
        folder / "dataset_construction",
        folder / "WorldValuesBench",
        folder.parent / "dataset_construction",
    ]
    found = next((place / name for place in places if (place / name).is_file()), None)
    if found is None:
        raise DataError(
            f"{name} is missing in {folder}; it is in dataset_construction/ of the benchmark's public repository"
        )
    return found


def _field_text(column: str, code: str, text: str) -> str | None:
    """A profile value as a person would say it; None for codes that mean no answer."""
    if whole(code).startswith("-") or is_missing(text):
        return None
    # "AR: White" names the country again; "(ISCED 3)" and the like mean nothing to a sentence encoder.
    text = re.sub(r"^[A-Z]{2,3}: ", "", text) if column == "Q290" else text
    text = re.sub(r"\s*\([^()]*\)", "", text).replace(" / ", " or ")
    return " ".join(text.split()) or None


def clean(text: str | None) -> str:
    return " ".join(one_spelling(text or "").split())


def whole(code: str) -> str:
    """``"3.0"`` as ``"3"``; other texts as they are."""
    text = clean(code)
    return text[:-2] if text.endswith(".0") else text
