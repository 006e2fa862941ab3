"""Raw files as a stream of records: JSON lines (plain or gzipped), CSV, parquet, a ``datasets`` folder or a hub id."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from cuma_ds.data.prepared import sha256
from cuma_ds.errors import DataError
from cuma_ds.files import first_line, is_hub_id
from cuma_ds.strict_json import read_json

_CHUNK_BYTES = 4 << 20
_CHUNK_ROWS = 2_000
_JSON = ("*.jsonl", "*.jsonl.gz")
_KINDS = (*_JSON, "*.parquet")


@dataclass(frozen=True)
class Chunk:
    """Some neighbouring records of one file, undecoded, so that another process may decode them.

    where: file name.  first: line or row number of the first record, from 1.  data: lines of JSON, or an Arrow batch.
    consumed: bytes of input that lie behind, for progress.
    """

    where: str
    first: int
    data: list[bytes] | pa.RecordBatch
    consumed: int


@dataclass(frozen=True)
class Input:
    """Files to read: their chunks, their size and what identifies them (name to sha256 or fingerprint)."""

    chunks: Callable[[], Iterator[Chunk]]
    size: int
    identity: dict[str, str]


def decode(chunk: Chunk) -> Iterator[tuple[str, dict[str, Any]]]:
    """The chunk's records, each with its place (``file:line`` or ``file: row``).

    Raises:
        DataError: a line that is no JSON object in UTF-8.
    """
    if isinstance(chunk.data, pa.RecordBatch):
        for number, row in enumerate(chunk.data.to_pylist(), start=chunk.first):
            # A table has every column in every row; a null is a key that is not there.
            yield f"{chunk.where}: row {number}", {key: value for key, value in row.items() if value is not None}
        return
    for number, line in enumerate(chunk.data, start=chunk.first):
        if line.strip():
            yield f"{chunk.where}:{number}", _object(line, f"{chunk.where}:{number}")


def find_input(path: str | Path, split: str | None = None) -> Input:
    """Whatever a user may call data: a .jsonl, .jsonl.gz or .parquet file, a folder of them, a ``datasets`` folder, a hub id.

    Args:
        split: of a hub id or a folder of several splits; default: ``train``, or the only one.

    Raises:
        DataError: nothing readable is there.
    """
    place = Path(path)
    if place.is_dir():
        if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
            return _datasets_folder(place, split)
        files = sorted(file for pattern in _KINDS for file in place.glob(pattern))
        if not files:
            raise DataError(
                f"{path} is neither a prepared folder nor a folder with .jsonl, .jsonl.gz or .parquet files, nor one that datasets saved"
            )
        return _files(files)
    if place.is_file():
        return _files([place])
    if is_hub_id(str(path)) and not place.suffix and not place.parent.is_dir():
        return _hub(str(path), split)
    raise DataError(
        f"there is no data at {path}; expected a .jsonl, .jsonl.gz or .parquet file, a folder of them, a datasets folder or a hub id"
    )


def find_csv(file: Path, columns: list[str]) -> Input:
    """One delimited file (also gzipped) whose texts may span lines; only ``columns`` are read, as text.

    Raises:
        DataError: a column is missing, or the file cannot be read.
    """

    def chunks() -> Iterator[Chunk]:
        number = 1
        for batch, consumed in csv_batches(file, columns):
            for start in range(0, len(batch), _CHUNK_ROWS):
                part = batch.slice(start, _CHUNK_ROWS)
                yield Chunk(str(file), number, part, consumed)
                number += len(part)

    return Input(chunks, file.stat().st_size, {file.name: sha256(file)})


def csv_batches(
    file: Path, columns: list[str], types: dict[str, pa.DataType] | None = None
) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Batches of some columns of a delimited file, and the bytes read so far.

    Args:
        types: of columns that are not text; where there are any, no text of a tab-separated file spans lines.

    Raises:
        DataError: a missing column, a cell of another type, text that is not UTF-8, a damaged file.
    """
    from pyarrow import csv

    header, delimiter = _header(file)
    parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=types is None or delimiter != "\t")
    convert = csv.ConvertOptions(
        include_columns=columns,
        column_types={name: (types or {}).get(name, pa.string()) for name in columns},
        strings_can_be_null=True,
        null_values=[""],
        quoted_strings_can_be_null=True,
    )
    try:
        with file.open("rb") as raw:
            stream = pa.CompressedInputStream(raw, "gzip") if file.suffix == ".gz" else raw
            read = csv.ReadOptions(block_size=_CHUNK_BYTES)
            with csv.open_csv(stream, read_options=read, parse_options=parse, convert_options=convert) as reader:
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
    """The columns of a delimited file, and what separates them: comma, semicolon or tabulator, whichever the header has."""
    import csv

    opener: Callable[..., Any] = gzip.open if file.suffix == ".gz" else open
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


def not_utf8(start: bytes) -> str:
    """What to say about a file that is not UTF-8, by its first bytes: its likely encoding and how to convert it."""
    encoding = "UTF-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "LATIN1"
    return f"not UTF-8 text; save it as UTF-8, e.g. with iconv -f {encoding} -t UTF-8 FILE > NEW"


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


def _files(files: list[Path]) -> Input:
    def chunks() -> Iterator[Chunk]:
        before = 0
        for file in files:
            yield from (_parquet(file, before) if file.suffix == ".parquet" else _lines(file, before))
            before += file.stat().st_size

    return Input(chunks, sum(file.stat().st_size for file in files), {file.name: sha256(file) for file in files})


def _lines(file: Path, before: int) -> Iterator[Chunk]:
    first, number, lines, held = 1, 0, list[bytes](), 0
    try:
        with file.open("rb") as raw:
            stream: Any = gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw
            for number, line in enumerate(stream, start=1):
                lines.append(line)
                held += len(line)
                if held >= _CHUNK_BYTES:
                    yield Chunk(str(file), first, lines, before + raw.tell())
                    first, lines, held = number + 1, [], 0
            yield Chunk(str(file), first, lines, before + file.stat().st_size)
    except (OSError, EOFError, zlib.error) as error:
        if lines:
            # What could be read is judged first: an earlier broken line is the better message.
            yield Chunk(str(file), first, lines, before)
        raise DataError(f"{file}:{number + 1}: cannot be read: {error}") from None


def _parquet(file: Path, before: int) -> Iterator[Chunk]:
    import pyarrow.parquet

    try:
        number = 1
        with pyarrow.parquet.ParquetFile(file) as table:
            total = max(table.metadata.num_rows, 1)
            for batch in table.iter_batches(_CHUNK_ROWS):
                yield Chunk(str(file), number, batch, before + file.stat().st_size * number // total)
                number += len(batch)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: cannot be read as parquet: {' '.join(str(error).split())[:200]}") from None


def _datasets_folder(folder: Path, split: str | None) -> Input:
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:
        raise DataError(f"{folder} cannot be read as a datasets folder: {first_line(error)}") from None
    if isinstance(loaded, DatasetDict):
        loaded = _one_split(loaded, str(folder), split)
    return _dataset(loaded, folder.name)


def _hub(name: str, split: str | None) -> Input:
    from datasets import load_dataset

    try:
        loaded = load_dataset(name)
    except Exception as error:
        raise DataError(
            f"{name} is neither a file or folder here nor a data set the hub gives us: {first_line(error)}"
        ) from None
    return _dataset(_one_split(loaded, name, split), name)


def _one_split(splits: Any, where: str, wanted: str | None) -> Any:
    name = wanted or ("train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else None)
    if name not in splits:
        asked = f"has no split {wanted!r}" if wanted else "has several splits"
        raise DataError(f"{where} {asked}; choose one with --split: {', '.join(splits)}")
    return splits[name]


def _dataset(rows: Any, where: str) -> Input:
    def chunks() -> Iterator[Chunk]:
        for start in range(0, len(rows), _CHUNK_ROWS):
            table = rows.with_format("arrow")[start : start + _CHUNK_ROWS].combine_chunks()
            for batch in table.to_batches():
                yield Chunk(where, start + 1, batch, min(start + _CHUNK_ROWS, len(rows)))

    return Input(chunks, len(rows), {where: str(rows._fingerprint)})


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = read_json(line.decode("utf-8-sig"))
        if b"\\ud" in line.lower():
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise DataError(f"{where}: {not_utf8(line)}") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(
            f"{where}: \\u{ord(half):04x} is half of a pair and no character; write the pair, or leave it out"
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: broken JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row is a JSON object, not {type(row).__name__}")
    return row
