"""WorldValuesBench: 239 questions of the World Values Survey, from the benchmark's TSV files or from the raw WVS-7 CSV.

Shapes: N people, Q questions, n options of a question, F profile fields.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from cuma_ds.config import DataSection
from cuma_ds.data.prepared import (
    PreparedData,
    ProfileList,
    Rows,
    check_questions,
    count_sizes,
    finish,
    histogram_batches,
    question_file,
    sha256,
    split_rows,
    with_mean_one,
)  # fmt: skip
from cuma_ds.data.rendering import LETTERS
from cuma_ds.data.rows import ArrowFile, Question, Scale, choice_schema
from cuma_ds.data.sources.files import csv_batches, csv_columns, require_columns
from cuma_ds.data.sources.records import Progress
from cuma_ds.data.splits import SPLITS, TEST, TRAIN, VALID, draws
from cuma_ds.errors import DataError
from cuma_ds.files import first_line
from cuma_ds.profiles.linearize import is_missing, one_spelling
from cuma_ds.strict_json import read_json

ID, WEIGHT = "D_INTERVIEW", "W_WEIGHT"
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
_GIVEN = {"train": TRAIN, "valid": VALID, "test": TEST}
# This interview number stands for several people in the survey's own file; the benchmark leaves it out too.
_USED_TWICE = 858069901
_JSON = ("codebook.json", "question_metadata.json", "answer_adjustment.json")


@dataclass(frozen=True)
class Codebook:
    """What codes mean.

    Attributes:
        questions: Q questions with their options in the order of the scale.
        raw: per question, code in the survey's file to option, -1 where the benchmark drops the answer.
        scaled: per question, code in the benchmark's files to option.
        values: per profile column, what a profile may say.
        by_code, by_text: per profile column, the survey's code and the benchmark's text to the place in ``values``; -1 for no answer.
        inputs: the files' hashes.
    """

    questions: list[Question]
    raw: list[dict[int, int]]
    scaled: list[dict[int, int]]
    values: dict[str, list[str]]
    by_code: dict[str, dict[str, int]]
    by_text: dict[str, dict[str, int]]
    inputs: dict[str, str]


def prepare_worldvaluesbench(
    path: str | Path,
    config: DataSection,
    template: str,
    spool: Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PreparedData:
    """Read people's answers, column by column: memory grows with people times one byte per question, the rest goes to disk.

    The benchmark's own split of people is kept where train, valid and test files are there; else people are drawn.

    Args:
        path: folder with codebook.json, question_metadata.json and answer_adjustment.json (anywhere below), and either
            {train,valid,test}/{split}_{demographic,value}_qa.tsv, full/full_*_qa.tsv, or one WVS-7 CSV.
        config: split settings.
        template, spool, progress: as in :func:`cuma_ds.data.sources.records.prepare_records`.
        workers: not used; columns are read by Arrow's own threads.

    Raises:
        DataError: a missing file or column, a code the codebook does not know, a person who comes twice, no answers;
            weights where there are none.
    """
    root = Path(path)
    codebook = read_codebook(root, config)
    tell = _Steps(progress)
    files = _find_answers(root)
    if isinstance(files, Path):
        people = read_survey(files, codebook, tell, config.weights)
        inputs = {files.name: sha256(files)}
    elif config.weights:
        raise DataError(
            f"{root}: data.weights is true, but the benchmark's files hold no weights; only the WVS-7 CSV has them "
            f"({WEIGHT}); prepare from that, or leave it out"
        )
    else:
        people = read_benchmark(files, codebook, tell)
        inputs = {file.name: sha256(file) for pair in files.values() for file in pair}
    skipped = {}
    unanswered_N = (people.option_NQ < 0).all(axis=1)
    profiles, profile_N = _profiles(people.value_NF, codebook, template)
    for reason, left_out in (
        ("people without any answer", unanswered_N),
        ("people of whom nothing is known", profile_N < 0),
    ):
        if left_out.any():
            skipped[reason] = int(left_out.sum())
    kept_N = ~unanswered_N & (profile_N >= 0)
    if not kept_N.any():
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise DataError(f"{root}: nothing is left of {len(kept_N)} people: {reasons or 'there are none'}")
    table = question_file(codebook.questions, None if spool is None else spool / "questions.arrow")
    rows = Rows(
        "choice", np.arange(kept_N.sum(), dtype=np.int32), draws(config.split_seed, "person", map(str, people.ids[kept_N].tolist())),
        profile_N[kept_N], profiles, {**codebook.inputs, **inputs}, table, skipped=skipped,
        given_N=None if people.given_N is None else people.given_N[kept_N],
        weight_N=None if people.weight_N is None else people.weight_N[kept_N],
    )  # fmt: skip
    return _write(rows, people.option_NQ[kept_N], config, spool, tell)


@dataclass
class People:
    """Who answered what.

    ids: [N] int64.  option_NQ: [N, Q] int8 option chosen, -1 for none.  value_NF: [N, F] int16 places in ``Codebook.values``, -1 for
    no answer.  given_N: [N] split the benchmark gives, if it does.  weight_N: [N] survey weights, where they are asked for.
    """

    ids: np.ndarray
    option_NQ: np.ndarray
    value_NF: np.ndarray
    given_N: np.ndarray | None = None
    weight_N: np.ndarray | None = None


class _Steps:
    """Progress over several passes: each is told (done, in all) and takes its share of one bar."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress

    def __call__(self, share: float) -> None:
        if self._progress is not None:
            self._progress(round(1000 * min(share, 1.0)), 1000)


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
        inputs[name] = sha256(file)
    choices, metadata, adjustments = loaded
    try:
        known = [name for name, entry in metadata.items() if entry["use_case"] == "value"]
        questions, raw, scaled = [], [], []
        for name in check_questions(config, known):
            question, raw_codes, scaled_codes = _scale(
                name, choices[name]["choices"], metadata[name], adjustments.get(name, {})
            )
            questions.append(question)
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
            by_text[column] = {_clean(texts[code]): place.get(text or "", -1) for code, text in spoken.items()}
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
            f"codebook.json: {name} has no option for {missing or 'a scale of'} {low} to {high}; 2 to {len(LETTERS)} options"
        )
    options = tuple(" ".join(texts[point].split()) for point in range(low, high + 1))
    if len(set(options)) < len(options):
        options = tuple(f"{point}: {text}" for point, text in zip(range(low, high + 1), options, strict=True))
    scale: Scale = "ordinal" if entry.get("answer_data_type", "ordinal") == "ordinal" else "nominal"
    question = Question(name, " ".join(entry["question"].split()), options, scale)
    return question, raw, {point: point - low for point in range(low, high + 1)}


def read_benchmark(files: Mapping[str, tuple[Path, Path]], codebook: Codebook, tell: _Steps) -> People:
    """People of the benchmark's files, ``{split: (demographic file, value file)}``; split ``full`` gives no split.

    Raises:
        DataError: missing columns, unknown codes, a person who comes twice or has answers but no row in the other file.
    """
    parts = []
    for number, (name, (demographic, value)) in enumerate(files.items()):
        described, value_NF = _read_fields(demographic, codebook.by_text)
        ids, option_NQ = _read_options(
            value, codebook, codebook.scaled, tell, number / len(files) / 2, 1 / len(files) / 2
        )
        order = pd.Index(described)
        _check_unique(order, demographic)
        _check_unique(pd.Index(ids), value)
        place = order.get_indexer(pd.Index(ids))
        if (place < 0).any():
            raise DataError(
                f"{value}: {ID} {ids[place < 0][0]} is not in {demographic.name}; both files describe the same people"
            )
        given_N = np.full(len(ids), _GIVEN[name], np.int8) if name in _GIVEN else None
        parts.append(People(ids, option_NQ, value_NF[place], given_N))
    ids = np.concatenate([part.ids for part in parts])
    _check_unique(pd.Index(ids), next(iter(files.values()))[1].parent.parent)
    value_NF = np.concatenate([part.value_NF for part in parts])
    given = [part.given_N for part in parts if part.given_N is not None]
    return People(
        ids, np.concatenate([part.option_NQ for part in parts]), value_NF, np.concatenate(given) if given else None
    )


def read_survey(file: Path, codebook: Codebook, tell: _Steps, weights: bool = False) -> People:
    """People of the raw WVS-7 CSV, with their weights if wanted.

    Raises:
        DataError: as :func:`read_benchmark`; a weight that is not positive.
    """
    weight_N = _read_weights(file) if weights else None
    _, value_NF = _read_fields(file, {column: codebook.by_text[column] | codebook.by_code[column] for column in FIELDS})
    ids, option_NQ = _read_options(file, codebook, codebook.raw, tell, 0.0, 0.5)
    kept = ids != _USED_TWICE
    _check_unique(pd.Index(ids[kept]), file)
    return People(ids[kept], option_NQ[kept], value_NF[kept], weight_N=None if weight_N is None else weight_N[kept])


def _read_weights(file: Path) -> np.ndarray:
    require_columns(file, csv_columns(file), [WEIGHT])
    batches = csv_batches(file, [WEIGHT], {WEIGHT: pa.float64()})
    weight_N = np.concatenate([np.zeros(0), *(batch.column(0).to_numpy(zero_copy_only=False) for batch, _ in batches)])
    wrong = np.flatnonzero(~((weight_N > 0) & np.isfinite(weight_N)))
    if len(wrong):
        value = "empty" if np.isnan(weight_N[wrong[0]]) else f"{weight_N[wrong[0]]:g}"
        place = f"{file}: row {int(wrong[0]) + 2}"
        raise DataError(f"{place}: {WEIGHT} is {value}; allowed: a positive number, for every person")
    return weight_N


def _read_fields(file: Path, meaning: Mapping[str, Mapping[str, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids [N] and profile values [N, F] of a file, -1 for no answer.

    Args:
        meaning: per profile column, cell to place in ``Codebook.values``.
    """
    require_columns(file, csv_columns(file), [ID, *FIELDS])
    batches = [batch for batch, _ in csv_batches(file, [ID, *FIELDS], {ID: pa.int64()})]
    if not any(map(len, batches)):
        raise DataError(f"{file} holds no people")
    table = pa.Table.from_batches(batches)
    if table[ID].null_count:
        raise DataError(f"{file}: {ID} is empty in {table[ID].null_count} rows; each person has a number")
    value_NF = np.empty((table.num_rows, len(FIELDS)), np.int16)
    for number, column in enumerate(FIELDS):
        cells = table[column].combine_chunks().dictionary_encode()
        places = [_field_place(cell, meaning[column], column, file) for cell in cells.dictionary.to_pylist()]
        # A null cell has index -1, which is the last place.
        value_NF[:, number] = np.array([*places, -1], np.int16)[
            cells.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        ]
    return table[ID].to_numpy(), value_NF


def _field_place(cell: str, meaning: Mapping[str, int], column: str, file: Path) -> int:
    for key in (_clean(cell), _whole(cell)):
        if key in meaning:
            return meaning[key]
    if is_missing(cell) or re.fullmatch(r"-\d+", _whole(cell)):
        return -1
    raise DataError(
        f"{file}: {column} is {cell!r}, which codebook.json does not know; add it there, or leave the cell empty"
    )


def _read_options(
    file: Path, codebook: Codebook, codes: list[dict[int, int]], tell: _Steps, start: float, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """Ids [N] int64 and options [N, Q] int8 of a file of codes; negative codes and empty cells are -1."""
    names = [question.question_id for question in codebook.questions]
    require_columns(file, csv_columns(file), [ID, *names])
    types: dict[str, pa.DataType] = {ID: pa.int64(), **dict.fromkeys(names, pa.float32())}
    tables = [_lookup(meaning) for meaning in codes]
    ids, options, row, size = [np.zeros(0, np.int64)], [np.zeros((0, len(names)), np.int8)], 2, file.stat().st_size
    for batch, consumed in csv_batches(file, [ID, *names], types):
        if batch.column(0).null_count:
            raise DataError(f"{file}: {ID} is empty in a row; each person has a number")
        block = np.empty((len(batch), len(names)), np.int8)
        for index, table in enumerate(tables):
            block[:, index] = _options(batch.column(index + 1), table, file, names[index], codes[index], row)
        ids.append(batch.column(0).to_numpy())
        options.append(block)
        row += len(batch)
        tell(start + share * consumed / max(size, 1))
    if row == 2:
        raise DataError(f"{file} holds no people")
    return np.concatenate(ids), np.concatenate(options)


def _lookup(meaning: Mapping[int, int]) -> np.ndarray:
    """Code to option; -2 marks codes that do not exist. The last entry is for codes beyond."""
    table = np.full(max(meaning) + 2, -2, np.int8)
    for code, option in meaning.items():
        table[code] = option
    return table


def _options(
    column: pa.Array, table: np.ndarray, file: Path, name: str, meaning: Mapping[int, int], first_row: int
) -> np.ndarray:
    values = column.to_numpy(zero_copy_only=False)
    values = np.where(np.isnan(values), -1, values)
    codes = np.clip(values, -1, len(table) - 1).astype(np.int64)
    options = np.where(values < 0, np.int8(-1), table[codes])
    wrong = np.flatnonzero((options == -2) | ((values >= 0) & (codes != values)))
    if len(wrong):
        code = f"{values[wrong[0]]:g}"
        raise DataError(
            f"{file}: row {first_row + int(wrong[0])}: {name} is {code}; codes the codebook knows: "
            f"{', '.join(map(str, sorted(meaning)))}, and negative ones or nothing for no answer"
        )
    return options


def _profiles(value_NF: np.ndarray, codebook: Codebook, template: str) -> tuple[ProfileList, np.ndarray]:
    """Distinct profiles and each person's row in them, [N] int32; -1 for somebody of whom nothing is known."""
    profiles = ProfileList(template)
    distinct_GF, group_N = np.unique(value_NF, axis=0, return_inverse=True)
    row_G = np.full(len(distinct_GF), -1, np.int32)
    for group, places in enumerate(distinct_GF.tolist()):
        known = zip(FIELDS.items(), places, strict=True)
        profile = {name: codebook.values[column][place] for (column, name), place in known if place >= 0}
        if profile:
            row_G[group] = profiles.add(profile)
    return profiles, row_G[group_N.reshape(-1)]


def _write(rows: Rows, option_NQ: np.ndarray, config: DataSection, spool: Path | None, tell: _Steps) -> PreparedData:
    """Split people and merge their answers, question by question.

    Args:
        rows: one per person, with their weight where weights are asked for.
        option_NQ: [N, Q] what they chose, -1 for nothing.
    """
    split_N = split_rows(rows, config)
    used = [
        number
        for number in range(len(SPLITS))
        if SPLITS[number] in ("train", "test", "heldout") or (split_N == number).any()
    ]
    options_Q = np.array([len(options) for options in rows.questions.table["options"]])
    weight_N = None if rows.weight_N is None else with_mean_one(rows.weight_N, (option_NQ >= 0).sum(axis=1))
    files, sizes, done = {}, {}, 0
    for number in used:
        chosen_N = split_N == number
        option_PQ, profile_P, person_P = option_NQ[chosen_N], rows.profile_N[chosen_N], rows.person_N[chosen_N]
        weight_P = None if weight_N is None else weight_N[chosen_N]

        def batches(
            option_PQ: np.ndarray = option_PQ, profile_P: np.ndarray = profile_P, person_P: np.ndarray = person_P,
            weight_P: np.ndarray | None = weight_P,
        ) -> Iterator[pa.RecordBatch]:  # fmt: skip
            nonlocal done
            for question in range(len(options_Q)):
                chosen = option_PQ[:, question] >= 0
                asked = np.full(int(chosen.sum()), question)
                yield from histogram_batches(
                    person_P[chosen], profile_P[chosen], asked, option_PQ[chosen, question], options_Q,
                    None if weight_P is None else weight_P[chosen],
                )  # fmt: skip
                done += 1
                tell(0.5 + 0.5 * done / (len(used) * len(options_Q)))

        name = SPLITS[number]
        file = None if spool is None else spool / f"{name}.arrow"
        files[name] = ArrowFile.collect(choice_schema(weight_N is not None), batches(), file)
        sizes[name] = {**count_sizes(person_P, profile_P), "answers": int((option_PQ >= 0).sum())}
    return finish(rows, files, sizes, config)


def _find_answers(root: Path) -> Path | dict[str, tuple[Path, Path]]:
    """The raw CSV, or the benchmark's pairs of files."""
    if root.is_file():
        return root
    for folder in (root, root / "WorldValuesBench"):
        pairs = {
            name: (folder / name / f"{name}_demographic_qa.tsv", folder / name / f"{name}_value_qa.tsv")
            for name in (*_GIVEN, "full")
        }
        there = {name: all(file.is_file() for file in pair) for name, pair in pairs.items()}
        if any(there[name] for name in _GIVEN):
            missing = [str(file) for name in _GIVEN for file in pairs[name] if not file.is_file()]
            if missing:
                raise DataError(f"{missing[0]} is missing; the benchmark's train, valid and test files belong together")
            return {name: pairs[name] for name in _GIVEN}
        if there["full"]:
            return {"full": pairs["full"]}
    surveys = sorted(file for pattern in ("*.csv", "*.csv.gz") for file in root.glob(pattern))
    if len(surveys) != 1:
        raise DataError(
            f"{root} holds neither the benchmark's train/train_value_qa.tsv and so on, nor full/full_value_qa.tsv, nor one WVS-7 CSV "
            f"({len(surveys)} CSV files)"
        )
    return surveys[0]


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


def _check_unique(ids: pd.Index, where: Path) -> None:
    if not ids.is_unique:
        raise DataError(f"{where}: {ID} {ids[ids.duplicated()][0]} comes more than once; each person has one row")


def _field_text(column: str, code: str, text: str) -> str | None:
    """A profile value as a person would say it; None for codes that mean no answer."""
    if _whole(code).startswith("-") or is_missing(text):
        return None
    # "AR: White" names the country again; "(ISCED 3)" and the like mean nothing to a sentence encoder.
    text = re.sub(r"^[A-Z]{2,3}: ", "", text) if column == "Q290" else text
    text = re.sub(r"\s*\([^()]*\)", "", text).replace(" / ", " or ")
    return " ".join(text.split()) or None


def _clean(text: str | None) -> str:
    return " ".join(one_spelling(text or "").split())


def _whole(code: Any) -> str:
    """``"3.0"`` as ``"3"``; other texts as they are."""
    text = _clean(code)
    return text[:-2] if text.endswith(".0") else text
