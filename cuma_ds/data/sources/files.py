"""Raw files as a stream of records: JSON lines (plain or gzipped), parquet, a ``datasets`` folder or a hub id."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from cuma_ds.errors import DataError
from cuma_ds.files import first_line, is_hub_id
from cuma_ds.identity import file_sha256
from cuma_ds.strict_json import read_json

CHUNK_BYTES = 4 << 20
CHUNK_ROWS = 2_000
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


# A line of JSON, or a row of a table.
Undecoded = bytes | dict[str, object]


def decode(chunk: Chunk) -> Iterator[tuple[str, dict[str, object]]]:
    """The chunk's records, each with its place (``file:line`` or ``file: row``).

    Raises:
        DataError: a line that is no JSON object in UTF-8.
    """
    for where, undecoded in lines_of(chunk):
        yield where, record_of(undecoded, where)


def lines_of(chunk: Chunk) -> Iterator[tuple[str, Undecoded]]:
    """The chunk's records as they stand, each with its place, for :func:`record_of`; empty lines are left out."""
    if isinstance(chunk.data, pa.RecordBatch):
        for number, row in enumerate(chunk.data.to_pylist(), start=chunk.first):
            # A table has every column in every row; a null is a key that is not there.
            yield f"{chunk.where}: row {number}", {key: value for key, value in row.items() if value is not None}
        return
    for number, line in enumerate(chunk.data, start=chunk.first):
        if line.strip():
            yield f"{chunk.where}:{number}", line


def record_of(undecoded: Undecoded, where: str) -> dict[str, object]:
    """The record that stands at a place.

    Raises:
        DataError: no JSON object in UTF-8.
    """
    return _object(undecoded, where) if isinstance(undecoded, bytes) else undecoded


def find_input(path: str | Path, split: str | None = None) -> Input:
    """Whatever a user may call data: a .jsonl, .jsonl.gz or .parquet file, a folder of them, a ``datasets`` folder, a
    hub id.

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
                f"{path} is neither a prepared folder nor a folder with .jsonl, .jsonl.gz or .parquet files, "
                "nor one that datasets saved"
            )
        return _files(files)
    if place.is_file():
        return _files([place])
    if is_hub_id(str(path)) and not place.suffix and not place.parent.is_dir():
        return _hub(str(path), split)
    raise DataError(
        f"there is no data at {path}; expected a .jsonl, .jsonl.gz or .parquet file, a folder of them, "
        "a datasets folder or a hub id"
    )


def not_utf8(start: bytes) -> str:
    """What to say about a file that is not UTF-8, by its first bytes: its likely encoding and how to convert it."""
    encoding = "UTF-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "LATIN1"
    return f"not UTF-8 text; save it as UTF-8, e.g. with iconv -f {encoding} -t UTF-8 FILE > NEW"


def _files(files: list[Path]) -> Input:
    def chunks() -> Iterator[Chunk]:
        before = 0
        for file in files:
            yield from (_parquet(file, before) if file.suffix == ".parquet" else _lines(file, before))
            before += file.stat().st_size

    return Input(chunks, sum(file.stat().st_size for file in files), {file.name: file_sha256(file) for file in files})


def _lines(file: Path, before: int) -> Iterator[Chunk]:
    first, number, lines, held = 1, 0, list[bytes](), 0
    try:
        with file.open("rb") as raw:
            stream: Any = gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw
            for number, line in enumerate(stream, start=1):
                lines.append(line)
                held += len(line)
                if held >= CHUNK_BYTES:
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
            for batch in table.iter_batches(CHUNK_ROWS):
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
        for start in range(0, len(rows), CHUNK_ROWS):
            table = rows.with_format("arrow")[start : start + CHUNK_ROWS].combine_chunks()
            for batch in table.to_batches():
                yield Chunk(where, start + 1, batch, min(start + CHUNK_ROWS, len(rows)))

    return Input(chunks, len(rows), {where: str(rows._fingerprint)})


def _object(line: bytes, where: str) -> dict[str, object]:
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
