"""WorldValuesBench: 239 questions of the World Values Survey, from the benchmark's TSV files or from the raw WVS-7 CSV.

Shapes: N people, Q questions, n options of a question, F profile fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from cuma_ds.data.raw import ProfileList, ReadOptions, Rows, question_file
from cuma_ds.data.sources.delimited import csv_batches, csv_columns, require_columns
from cuma_ds.data.sources.worldvaluesbench_codebook import FIELDS, Codebook, clean, read_codebook, whole
from cuma_ds.data.sources.worldvaluesbench_probe import read_probe
from cuma_ds.data.splits import TEST, TRAIN, VALID, draws
from cuma_ds.errors import DataError
from cuma_ds.identity import file_sha256
from cuma_ds.profiles.linearize import is_missing

ID, WEIGHT = "D_INTERVIEW", "W_WEIGHT"
_GIVEN = {"train": TRAIN, "valid": VALID, "test": TEST}
# This interview number stands for several people in the survey's own file; the benchmark leaves it out too.
_USED_TWICE = 858069901
# Told what part of a file, or of all files, has been read.
Tell = Callable[[float], None]


def read(path: str, options: ReadOptions) -> Rows:
    """Read people's answers, column by column: memory grows with people times one byte per question, the rest goes to
    disk.

    The benchmark's own split of people is kept where train, valid and test files are there; else people are drawn.

    Args:
        path: folder with codebook.json, question_metadata.json and answer_adjustment.json (anywhere below), and either
            {train,valid,test}/{split}_{demographic,value}_qa.tsv, full/full_*_qa.tsv, or one WVS-7 CSV.
        options: how to read. ``workers`` is not used; columns are read by Arrow's own threads.

    Raises:
        DataError: a missing file or column, a code the codebook does not know, a person who comes twice, no answers;
            weights where there are none; a probe that does not fit.
    """
    root, config, spool = Path(path), options.config, options.spool
    codebook = read_codebook(root, config)

    def tell(part: float) -> None:
        if options.progress is not None:
            options.progress(round(1000 * min(part, 1.0)), 1000)

    files = _find_answers(root)
    if isinstance(files, Path):
        people = read_survey(files, codebook, tell, config.weights)
        inputs = {files.name: file_sha256(files)}
    elif config.weights:
        raise DataError(
            f"{root}: data.weights is true, but the benchmark's files hold no weights; only the WVS-7 CSV has them "
            f"({WEIGHT}); prepare from that, or leave it out"
        )
    else:
        people = read_benchmark(files, codebook, tell)
        inputs = {file.name: file_sha256(file) for pair in files.values() for file in pair}
    probe_NQ: np.ndarray | None = None
    skipped: dict[str, int] = {}
    if config.probe is not None:
        asked = [question.question_id for question in codebook.questions]
        probe_NQ, skipped = read_probe(Path(config.probe), asked, config.questions, people.ids, people.option_NQ)
        inputs[f"probe {Path(config.probe).name}"] = file_sha256(Path(config.probe))
    unanswered_N = (people.option_NQ < 0).all(axis=1)
    profiles, profile_N = _profiles(people.value_NF, codebook, options.template)
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
    names = map(str, people.ids[kept_N].tolist())
    return Rows(
        "choice", np.arange(kept_N.sum(), dtype=np.int32), draws(config.split_seed, "person", names),
        profile_N[kept_N], profiles, {**codebook.inputs, **inputs}, table,
        option_NQ=people.option_NQ[kept_N], skipped=skipped,
        given_N=None if people.given_N is None else people.given_N[kept_N],
        weight_N=None if people.weight_N is None else people.weight_N[kept_N],
        probe_NQ=None if probe_NQ is None else probe_NQ[kept_N],
    )  # fmt: skip


@dataclass
class People:
    """Who answered what.

    ids: [N] int64.  option_NQ: [N, Q] int8 option chosen, -1 for none.  value_NF: [N, F] int16 places in
        ``Codebook.values``, -1 for
    no answer.  given_N: [N] split the benchmark gives, if it does.  weight_N: [N] survey weights, where they are asked
    for.
    """

    ids: np.ndarray
    option_NQ: np.ndarray
    value_NF: np.ndarray
    given_N: np.ndarray | None = None
    weight_N: np.ndarray | None = None


def read_benchmark(files: Mapping[str, tuple[Path, Path]], codebook: Codebook, tell: Tell) -> People:
    """People of the benchmark's files, ``{split: (demographic file, value file)}``; split ``full`` gives no split.

    Raises:
        DataError: missing columns, unknown codes, a person who comes twice or has answers but no row in the other file.
    """
    parts = []
    for number, (name, (demographic, value)) in enumerate(files.items()):
        described, value_NF = _read_fields(demographic, codebook.by_text)

        def told(part: float, before: int = number) -> None:
            tell((before + part) / len(files))

        ids, option_NQ = _read_options(value, codebook, codebook.scaled, told)
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


def read_survey(file: Path, codebook: Codebook, tell: Tell, weights: bool = False) -> People:
    """People of the raw WVS-7 CSV, with their weights if wanted.

    Raises:
        DataError: as :func:`read_benchmark`; a weight that is not positive.
    """
    weight_N = _read_weights(file) if weights else None
    _, value_NF = _read_fields(file, {column: codebook.by_text[column] | codebook.by_code[column] for column in FIELDS})
    ids, option_NQ = _read_options(file, codebook, codebook.raw, tell)
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
    for key in (clean(cell), whole(cell)):
        if key in meaning:
            return meaning[key]
    if is_missing(cell) or re.fullmatch(r"-\d+", whole(cell)):
        return -1
    raise DataError(
        f"{file}: {column} is {cell!r}, which codebook.json does not know; add it there, or leave the cell empty"
    )


def _read_options(
    file: Path, codebook: Codebook, codes: list[dict[int, int]], tell: Tell
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
        tell(consumed / max(size, 1))
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
            f"{root} holds neither the benchmark's train/train_value_qa.tsv and so on, nor full/full_value_qa.tsv, "
            "nor one WVS-7 CSV "
            f"({len(surveys)} CSV files)"
        )
    return surveys[0]


def _check_unique(ids: pd.Index, where: Path) -> None:
    if not ids.is_unique:
        raise DataError(f"{where}: {ID} {ids[ids.duplicated()][0]} comes more than once; each person has one row")
