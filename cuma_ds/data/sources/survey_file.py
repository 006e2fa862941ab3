"""A survey's own file: SPSS, Stata, CSV or parquet. Its columns with their labels, and the codes in them.

Shapes: N rows of the file, one for each respondent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from cuma_ds.data.sources.delimited import csv_batches, csv_columns
from cuma_ds.errors import DataError, nearest
from cuma_ds.files import first_line
from cuma_ds.profiles.linearize import one_spelling

SUFFIXES = (".sav", ".zsav", ".dta", ".csv", ".csv.gz", ".tsv", ".parquet")
# A number, or text that is none. Whole numbers are int, so that 1, 1.0 and "1" are one code.
Code = int | float | str
# Columns that are decoded at a time: memory grows with these, not with the file.
_AT_ONCE = 24
_NUMBER = re.compile(r"[+-]?\d{1,15}(?:\.\d+)?")


class Column(NamedTuple):
    """What the file says about a column.

    Attributes:
        name: of the column.
        label: its text (the question as asked), or "".
        labels: the text of each labelled code, in their order.
        measure: ``ordinal``, ``nominal``, ``scale`` (numbers) or "" where the file does not say.
    """

    name: str
    label: str = ""
    labels: Mapping[Code, str] = {}
    measure: str = ""


class Cells(NamedTuple):
    """One column's codes.

    Attributes:
        codes: the distinct codes; numbers ascending, then texts.
        place_N: [N] int32, place of each row's code in ``codes``; -1 where the cell is empty or the file itself calls
            its code missing.
    """

    codes: list[Code]
    place_N: np.ndarray

    def counts(self) -> np.ndarray:
        """[codes] int64: rows that have each code."""
        return np.bincount(self.place_N[self.place_N >= 0], minlength=len(self.codes))


@dataclass(frozen=True)
class SurveyFile:
    """A file that was found, its columns read and its cells not yet.

    Attributes:
        path: where it is.
        columns: by name, in the file's order.
        decode: columns' names to their cells as pandas or Arrow has them.
    """

    path: Path
    columns: Mapping[str, Column]
    decode: Callable[[Sequence[str]], Mapping[str, pd.Series]] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path) -> SurveyFile:
        """Read what the file says about its columns.

        Raises:
            DataError: there is no such file, its kind is none of ``SUFFIXES``, or it cannot be read.
        """
        file = Path(path)
        name = file.name.lower()
        if not file.is_file() or not name.endswith(SUFFIXES):
            what = "no such file" if not file.is_file() else "a file of another kind"
            raise DataError(f"{file}: {what}; a survey is a file that ends with {', '.join(SUFFIXES)}")
        if name.endswith((".sav", ".zsav", ".dta")):
            return _open_labelled(file)
        if name.endswith(".parquet"):
            return _open_parquet(file)
        columns = {name: Column(name) for name in csv_columns(file)}
        return cls(file, columns, lambda names: _read_csv(file, names))

    def cells(self, names: Sequence[str]) -> Iterator[tuple[str, Cells]]:
        """The columns of these names, one by one, in the file's order.

        Raises:
            DataError: a column that is not there, or a damaged file.
        """
        for name in names:
            if name not in self.columns:
                raise DataError(f"{self.path}: there is no column {name!r}{nearest(name, self.columns)}")
        ordered = [name for name in self.columns if name in set(names)]
        for start in range(0, len(ordered), _AT_ONCE):
            for name, values in self.decode(ordered[start : start + _AT_ONCE]).items():
                yield name, _coded(values)


def code_of(value: object) -> Code | None:
    """A cell, or a key of a map, as a code; None where there is nothing."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, bool | np.bool_):
        return int(value)
    if isinstance(value, int | float | np.number):
        number = float(value)
        return int(number) if number.is_integer() else number
    text = one_spelling(str(value))
    if _NUMBER.fullmatch(text):
        return code_of(float(text))
    return text or None


def _coded(values: pd.Series) -> Cells:
    found_N, distinct = pd.factorize(values)
    known = [code_of(value) for value in distinct.tolist()]
    codes = sorted({code for code in known if code is not None}, key=lambda code: (isinstance(code, str), code))
    place = {code: index for index, code in enumerate(codes)}
    # The last entry is for empty cells, which are -1.
    places = np.array([*(-1 if code is None else place[code] for code in known), -1], np.int32)
    return Cells(codes, places[found_N])


def _open_labelled(file: Path) -> SurveyFile:
    """An SPSS or Stata file."""
    import pyreadstat

    read: Callable[..., Any] = pyreadstat.read_dta if file.suffix.lower() == ".dta" else pyreadstat.read_sav

    def decode(names: Sequence[str], **more: bool) -> tuple[pd.DataFrame, Any]:
        try:
            return read(str(file), usecols=list(names) or None, disable_datetime_conversion=True, **more)
        except (pyreadstat.ReadstatError, pyreadstat.PyreadstatError, OSError, ValueError) as error:
            raise DataError(f"{file}: cannot be read: {first_line(error)}") from None

    # Ranges of missing codes are told only to who asks for the codes in them.
    _, about = decode((), metadataonly=True, user_missing=True)
    columns = {}
    for name in about.column_names:
        missing = about.missing_ranges.get(name, [])
        labels = {code: text for code, text in _labels(about.variable_value_labels.get(name, {})) if text}
        labels = {code: text for code, text in labels.items() if not any(_inside(code, part) for part in missing)}
        measure = about.variable_measure.get(name, "")
        label = " ".join(one_spelling(about.column_names_to_labels.get(name) or "").split())
        columns[name] = Column(name, label, labels, "" if measure == "unknown" else measure)

    def series(names: Sequence[str]) -> Mapping[str, pd.Series]:
        frame, _ = decode(names)
        return {name: frame[name] for name in names}

    return SurveyFile(file, columns, series)


def _labels(found: Mapping[object, str]) -> Iterator[tuple[Code, str]]:
    known = [(code_of(code), " ".join(one_spelling(text).split())) for code, text in found.items()]
    yield from sorted(
        ((code, text) for code, text in known if code is not None), key=lambda pair: (isinstance(pair[0], str), pair[0])
    )


def _inside(code: Code, part: Mapping[str, object]) -> bool:
    low, high = code_of(part["lo"]), code_of(part["hi"])
    if isinstance(code, str) or isinstance(low, str) or isinstance(high, str):
        return code == low
    return (low is None or low <= code) and (high is None or code <= high)


def _read_csv(file: Path, names: Sequence[str]) -> Mapping[str, pd.Series]:
    batches = [batch for batch, _ in csv_batches(file, list(names))]
    return _series(pa.Table.from_batches(batches)) if batches else {name: pd.Series([], dtype=object) for name in names}


def _open_parquet(file: Path) -> SurveyFile:
    import pyarrow.parquet

    def read(names: Sequence[str]) -> Mapping[str, pd.Series]:
        try:
            return _series(pyarrow.parquet.read_table(file, columns=list(names)))
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{file}: cannot be read as parquet: {first_line(error)}") from None

    try:
        names = pyarrow.parquet.read_schema(file).names
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: cannot be read as parquet: {first_line(error)}") from None
    return SurveyFile(file, {name: Column(name) for name in names}, read)


def _series(table: pa.Table) -> Mapping[str, pd.Series]:
    return {name: table[name].to_pandas() for name in table.column_names}
