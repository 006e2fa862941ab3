"""Delimited files (CSV, also gzipped): their header, and batches of some of their columns."""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.csv

from cuma_ds.data.sources.files import CHUNK_BYTES, CHUNK_ROWS, Chunk, Input, not_utf8
from cuma_ds.errors import DataError
from cuma_ds.identity import file_sha256


def find_csv(file: Path, columns: list[str]) -> Input:
    """One delimited file (also gzipped) whose texts may span lines; only ``columns`` are read, as text.

    Raises:
        DataError: a column is missing, or the file cannot be read.
    """

    def chunks() -> Iterator[Chunk]:
        number = 1
        for batch, consumed in csv_batches(file, columns):
            for start in range(0, len(batch), CHUNK_ROWS):
                part = batch.slice(start, CHUNK_ROWS)
                yield Chunk(str(file), number, part, consumed)
                number += len(part)

    return Input(chunks, file.stat().st_size, {file.name: file_sha256(file)})


def csv_batches(
    file: Path, columns: list[str], types: dict[str, pa.DataType] | None = None
) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Batches of some columns of a delimited file, and the bytes read so far.

    Args:
        types: of columns that are not text; where there are any, no text of a tab-separated file spans lines.

    Raises:
        DataError: a missing column, a cell of another type, text that is not UTF-8, a damaged file.
    """
    header, delimiter = _header(file)
    parse = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=types is None or delimiter != "\t")
    convert = pyarrow.csv.ConvertOptions(
        include_columns=columns,
        column_types={name: (types or {}).get(name, pa.string()) for name in columns},
        strings_can_be_null=True,
        null_values=[""],
        quoted_strings_can_be_null=True,
    )
    try:
        with file.open("rb") as raw:
            stream = pa.CompressedInputStream(raw, "gzip") if file.suffix == ".gz" else raw
            read = pyarrow.csv.ReadOptions(block_size=CHUNK_BYTES)
            with pyarrow.csv.open_csv(
                stream, read_options=read, parse_options=parse, convert_options=convert
            ) as reader:
                for batch in reader:
                    yield batch, min(raw.tell() if not raw.closed else 0, file.stat().st_size)
    except (OSError, pa.ArrowException, ValueError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: {_csv_problem(error, file, header)}") from None


def csv_columns(file: Path) -> list[str]:
    """The header of a delimited file.

    Raises:
        DataError: no readable header.
    """
    return _header(file)[0]


def _header(file: Path) -> tuple[list[str], str]:
    """The columns of a delimited file, and what separates them: comma, semicolon or tabulator, whichever the header
    has.
    """
    opener: Callable[..., IO[str]] = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8-sig", newline="") as lines:
            line = lines.readline()
        found = [(next(csv.reader([line], delimiter=mark), []), mark) for mark in (",", ";", "\t")]
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error) as error:
        raise DataError(f"{file}: {_csv_problem(error, file)}") from None
    return max(found, key=lambda columns: len(columns[0]))


def require_columns(file: Path, found: list[str], needed: list[str]) -> None:
    """Raise a DataError that names the missing columns of ``file``."""
    missing = [name for name in needed if name not in found]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise DataError(
            f"{file}: column {shown} is missing; the file has {len(found)} columns: {', '.join(found[:8])}, ... "
            "(the header must hold the names of the variables, not their labels)"
        )


def _csv_problem(error: BaseException, file: Path, header: Sequence[str] = ()) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, UnicodeDecodeError) or "invalid UTF8" in text:
        with file.open("rb") as raw:
            return not_utf8(raw.read(2))
    cell = re.search(r"CSV column #(\d+): (?:Row #(\d+): )?CSV conversion error to \w+: invalid value '(.*)'", text)
    if cell and int(cell[1]) < len(header):
        row = f"row {cell[2]}: " if cell[2] else ""
        is_comma = re.fullmatch(r"-?\d*,\d+", cell[3])
        advice = "save numbers with a decimal point" if is_comma else "save the codes, not their labels"
        return f"{row}{header[int(cell[1])]} is {cell[3][:40]!r}, which is no number; {advice}"
    return f"cannot be read: {text[:200]}"
