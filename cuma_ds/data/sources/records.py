"""Rows of choice questions, conversations or preferences: checked one by one, gathered with little memory.

A row is one of

- ``{"profile", "question", "options", "answer", "question_id"?, "person_id"?, "scale"?, "weight"?}``
- ``{"profile", "messages", "person_id"?}``
- ``{"profile", "prompt", "chosen", "rejected", "person_id"?}``

Sources of other formats turn their records into such rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cuma_ds.config import DataSection
from cuma_ds.data.prepared import PreparedData, ProfileList, Rows, check_questions, prepare_rows
from cuma_ds.data.rendering import LETTERS
from cuma_ds.data.rows import QUESTION_SCHEMA, SCALES, SCHEMAS, ArrowFile, Question
from cuma_ds.data.sources.files import Chunk, Input, decode
from cuma_ds.data.splits import draws
from cuma_ds.errors import DataError, nearest
from cuma_ds.profiles.linearize import is_missing, one_spelling

_KEYS = {
    "choice": ("profile", "question", "options", "answer", "question_id", "person_id", "scale", "weight"),
    "chat": ("profile", "messages", "person_id"),
    "preference": ("profile", "prompt", "chosen", "rejected", "person_id"),
}
_OPTIONAL = ("question_id", "person_id", "scale", "weight")
# Besides the words that mean a missing value in a profile.
_NOBODY = {"none", "nil", "undefined", "anonymous"}
_ROLES = ("system", "user", "assistant")
# Smaller inputs are read before other processes have started.
_WORTH_WORKERS = 64 << 20

Row = dict[str, Any]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Converted:
    """What a source makes of one raw record.

    rows: in the formats above.  record_id: must not come twice.  skipped: why the record gives no (or fewer) rows.
    """

    rows: list[Row]
    record_id: str | None = None
    skipped: str | None = None


Convert = Callable[[Row, str], Converted]


def as_is(record: Row, where: str) -> Converted:
    """A record that is a row already."""
    return Converted([record])


def anonymous(profile: Mapping[str, Any]) -> bool:
    """Whether no field of a profile has a usable value."""
    return all(is_missing(value) for value in profile.values())


@dataclass
class Part:
    """What one chunk of records holds, with numbers of its own: small enough to be sent between processes.

    rows: person, profile, question and answer of each row; person -1 where nothing names one.
    unnamed: what identifies each row without a person in its source.
    weights: survey weight of each row, where they are asked for.
    has_weights: whether any row names one.
    """

    kind: str = ""
    persons: dict[str, int] = field(default_factory=dict)
    profiles: ProfileList = field(default_factory=lambda: ProfileList("generic"))
    questions: dict[str, tuple[int, Question, str]] = field(default_factory=dict)
    rows: array = field(default_factory=lambda: array("i"))
    unnamed: list[str] = field(default_factory=list)
    weights: array = field(default_factory=lambda: array("d"))
    has_weights: bool = False
    payload: pa.RecordBatch | None = None
    record_ids: list[tuple[str, str]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    where: str = ""
    consumed: int = 0


def read_part(chunk: Chunk, convert: Convert, template: str, config: DataSection) -> Part:
    """Check and count the rows of one chunk.

    Raises:
        DataError: one line with file and line (or row) for the first thing that is wrong.
    """
    part = Part(profiles=ProfileList(template), consumed=chunk.consumed)
    payload: list[tuple] = []
    for where, record in decode(chunk):
        converted = convert(record, where)
        if converted.record_id is not None:
            part.record_ids.append((str(converted.record_id), where))
        if converted.skipped is not None:
            part.skipped[converted.skipped] += 1
        for row in converted.rows:
            _add(part, row, where, config, payload)
    if part.kind and part.kind != "choice":
        schema = _payload_schema(part.kind)
        columns = list(zip(*payload, strict=True))
        part.payload = pa.RecordBatch.from_arrays(
            [pa.array(c, t.type) for c, t in zip(columns, schema, strict=True)], schema=schema
        )
    return part


def _add(part: Part, row: Row, where: str, config: DataSection, payload: list[tuple]) -> None:
    kind = row_kind(row, where)
    if part.kind and kind != part.kind:
        raise DataError(f"{where}: a {kind} row after {part.kind} rows; one data set holds one kind")
    part.kind, part.where = kind, part.where or where
    number = answer = 0
    if kind == "choice":
        question = _question(row, where)
        number, known, first = part.questions.setdefault(question.question_id, (len(part.questions), question, where))
        _same_question(question, known, where, first)
        if config.questions is not None and question.question_id not in config.questions:
            return
    try:
        profile = part.profiles.add(_profile(row["profile"], where))
    except DataError as error:
        raise DataError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
    person_id = person_of(row, "person_id", where)
    person = -1 if person_id is None else part.persons.setdefault(person_id, len(part.persons))
    if person_id is None:
        part.unnamed.append(Path(where).name)
    if kind == "choice":
        answer = _answer(row["answer"], question.options, where)
        part.has_weights |= row.get("weight") is not None
        if config.weights:
            part.weights.append(_weight(row, where))
    elif kind == "chat":
        payload.append((_messages(row["messages"], where),))
    else:
        payload.append(
            (_prompt(row["prompt"], where), *(_answer_text(row, key, where) for key in ("chosen", "rejected")))
        )
    part.rows.extend((person, profile, number, answer))


def prepare_records(
    source: Input,
    convert: Convert,
    config: DataSection,
    template: str,
    spool: Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PreparedData:
    """Read all records of a source, in as many processes as are worth it, and split what they hold.

    Kept in memory are four small integers per row, the distinct profiles, and the ids of people and questions; texts go to
    ``spool`` as they are read.

    Args:
        convert: a module's function (or a ``functools.partial`` of one), so that other processes find it.
        spool: folder for what is read and for the splits; in memory without one.
        workers: processes; default: one per core for inputs above 64 MB, else none besides this one.
        progress: told (bytes read, bytes in all).

    Raises:
        DataError: the first thing that is wrong.
    """
    with _Gathered(config, template, spool) as gathered:
        for part in _parts(source, convert, template, config, workers):
            gathered.add(part)
            if progress is not None:
                progress(min(part.consumed, source.size), source.size)
    if gathered.kind == "choice":
        check_questions(config, list(gathered.questions))
    if not len(gathered.rows):
        names = ", ".join(source.identity)
        raise DataError(
            f"{names} holds no rows; expected {' or '.join(map(expected_keys, _KEYS))}{_reasons(gathered.skipped)}"
        )
    return prepare_rows(gathered.finished(source.identity), config, spool)


def _reasons(skipped: Mapping[str, int]) -> str:
    return f" (left out: {', '.join(f'{count} {reason}' for reason, count in skipped.items())})" if skipped else ""


def _parts(source: Input, convert: Convert, template: str, config: DataSection, workers: int | None) -> Iterator[Part]:
    count = ((os.cpu_count() or 1) if source.size > _WORTH_WORKERS else 0) if workers is None else workers
    if count < 2:
        yield from (read_part(chunk, convert, template, config) for chunk in source.chunks())
        return
    # Fresh processes: this one may hold threads of libraries that do not survive a fork.
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        waiting: deque[Future[Part]] = deque()
        try:
            for chunk in source.chunks():
                waiting.append(pool.submit(read_part, chunk, convert, template, config))
                # Few chunks wait at a time, so that memory does not grow with the input.
                if len(waiting) > 2 * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                "a process that read the data died, most likely for want of memory; use --workers 1"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Gathered:
    """All parts, with numbers that hold for all of them."""

    def __init__(self, config: DataSection, template: str, spool: Path | None) -> None:
        self.config = config
        self.kind = ""
        self.rows = array("i")
        self.persons: dict[str, int] = {}
        self.unnamed_draws = array("d")
        self.weights = array("d")
        self.has_weights = False
        self.profiles = ProfileList(template)
        # Question id to its number, the hash of all that belongs to it, and where it came first; the texts are in the spool.
        self.questions: dict[str, tuple[int, bytes, str]] = {}
        self.skipped: Counter[str] = Counter()
        self._records: set[bytes] = set()
        self._spool = spool
        self._open: ExitStack = ExitStack()
        self._texts: _Spool | None = None
        self._asked: _Spool | None = None

    def __enter__(self) -> _Gathered:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def add(self, part: Part) -> None:
        """Take a part in, in the order of the input."""
        for record_id, where in part.record_ids:
            key = hashlib.blake2b(record_id.encode(), digest_size=12).digest()
            if key in self._records:
                raise DataError(f"{where}: the id {record_id!r} has come before; each record has an id of its own")
            self._records.add(key)
        self.skipped.update(part.skipped)
        if not part.kind:
            return
        if self.kind and part.kind != self.kind:
            raise DataError(f"{part.where}: a {part.kind} row after {self.kind} rows; one data set holds one kind")
        self.kind = part.kind
        # The last entry maps "nobody" (-1) to itself.
        persons = np.array([*(self.persons.setdefault(name, len(self.persons)) for name in part.persons), -1], np.int32)
        profiles = np.array(
            [self.profiles.merge(part.profiles, row) for row in range(len(part.profiles.profiles))], np.int32
        )
        questions = np.array(
            [self._question(question, where) for _, question, where in part.questions.values()], np.int32
        )
        local = np.frombuffer(part.rows, np.int32).reshape(-1, 4)
        rows = local.copy()
        if len(local):
            rows[:, 0], rows[:, 1] = persons[local[:, 0]], profiles[local[:, 1]]
            if self.kind == "choice":
                rows[:, 2] = questions[local[:, 2]]
        self.rows.frombytes(rows.tobytes())
        self.unnamed_draws.frombytes(draws(self.config.split_seed, "row", part.unnamed).tobytes())
        self.weights.extend(part.weights)
        self.has_weights |= part.has_weights
        if part.payload is not None:
            if self._texts is None:
                self._texts = self._open.enter_context(_Spool(part.payload.schema, self._spool, "texts"))
            self._texts.append(part.payload)

    def _question(self, question: Question, where: str) -> int:
        content = hashlib.blake2b(json.dumps(question.columns()).encode(), digest_size=12).digest()
        known = self.questions.get(question.question_id)
        if known is None:
            if self._asked is None:
                self._asked = self._open.enter_context(_Spool(QUESTION_SCHEMA, self._spool, "questions"))
            row = dict(zip(QUESTION_SCHEMA.names, question.columns(), strict=True))
            self._asked.append(pa.RecordBatch.from_pylist([row], QUESTION_SCHEMA))
            known = self.questions[question.question_id] = (len(self.questions), content, where)
        elif known[1] != content:
            raise DataError(
                f"{where}: question_id {question.question_id!r} has another text, other options or another scale than at {known[2]}; "
                "one question has one of each"
            )
        return known[0]

    def finished(self, inputs: dict[str, str]) -> Rows:
        """Everything, ready to be split. People are numbered by their sorted ids, then come rows without a person, in their order."""
        rows = np.frombuffer(self.rows, np.int32).reshape(-1, 4)
        names = sorted(self.persons)
        place = np.empty(len(names) + 1, np.int32)
        place[[self.persons[name] for name in names]] = np.arange(len(names), dtype=np.int32)
        person_N = place[rows[:, 0]]
        nobody_N = rows[:, 0] < 0
        person_N[nobody_N] = len(names) + np.arange(nobody_N.sum(), dtype=np.int32)
        questions = self._asked.read() if self._asked is not None else ArrowFile(QUESTION_SCHEMA.empty_table())
        payload = self._texts.read() if self._texts is not None else None
        _warn_of_one_for_many(np.bincount(person_N[~nobody_N]), names, len(rows))
        self._check_weights(inputs)
        draw_P = np.concatenate(
            [draws(self.config.split_seed, "person", names), np.frombuffer(self.unnamed_draws, np.float64)]
        )
        return Rows(
            self.kind, person_N, draw_P, rows[:, 1], self.profiles, inputs, questions, rows[:, 2], rows[:, 3], payload,
            self.skipped, weight_N=np.frombuffer(self.weights, np.float64) if self.config.weights else None,
        )  # fmt: skip

    def _check_weights(self, inputs: dict[str, str]) -> None:
        if self.kind == "choice" and self.config.weights and not self.has_weights:
            names = ", ".join(inputs)
            raise DataError(
                f"data.weights is true, but no row of {names} has a weight; leave it out, or give the rows weights"
            )
        if self.has_weights and not self.config.weights:
            warnings.warn("rows have weights that count nothing, because data.weights is false", stacklevel=2)


def _warn_of_one_for_many(rows_P: np.ndarray, names: list[str], rows: int) -> None:
    """Say which id has so many rows that it may stand for nobody."""
    most = int(rows_P.argmax()) if len(rows_P) else 0
    if len(rows_P) and rows_P[most] > max(50, rows / 100):
        name = names[most] if len(names[most]) <= 6 else f"{names[most][:4]}..."
        warnings.warn(
            f"one person, with the id {name!r}, has {rows_P[most]:,} of {rows:,} rows; where that id stands for nobody, "
            "leave it out: each such row is then a person of its own",
            stacklevel=2,
        )


class _Spool:
    """An Arrow table that grows on disk, or in memory without a folder; small batches are gathered first."""

    def __init__(self, schema: pa.Schema, folder: Path | None, name: str) -> None:
        self.schema = schema
        self._file = None if folder is None else folder / f"{name}.arrow"
        self._held: list[pa.RecordBatch] = []
        self._writer: Any = None

    def __enter__(self) -> _Spool:
        if self._file is not None:
            self._writer = pa.ipc.new_stream(str(self._file), self.schema)
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()

    def append(self, batch: pa.RecordBatch) -> None:
        """Add rows."""
        self._held.append(batch)
        if self._writer is not None and len(self._held) >= 512:
            self._flush()

    def read(self) -> ArrowFile:
        """What was added; after the end of the context."""
        if self._file is not None:
            return ArrowFile.open(self._file)
        return ArrowFile(pa.Table.from_batches(self._held, self.schema).combine_chunks())

    def _flush(self) -> None:
        if self._writer is not None and self._held:
            self._writer.write_table(pa.Table.from_batches(self._held, self.schema).combine_chunks())
            self._held = []


def _payload_schema(kind: str) -> pa.Schema:
    return pa.schema([column for column in SCHEMAS[kind] if column.name not in ("profile", "people")])


def _same_question(question: Question, known: Question, where: str, first: str) -> None:
    what = f"{where}: question_id {question.question_id!r}"
    if known.options != question.options:
        raise DataError(
            f"{what} had other options before, at {first}; one question has one list of options, in one order"
        )
    if known.text != question.text:
        raise DataError(f"{what} had another text before, at {first}; one question has one text")
    if known.scale != question.scale:
        raise DataError(
            f"{what} has scale {question.scale}, but {known.scale} at {first}; "
            "one question has one scale (ordinal where a row does not say)"
        )


def row_kind(row: dict[str, Any], where: str) -> str:
    """``choice``, ``chat`` or ``preference`` by the row's keys.

    Raises:
        DataError: none of them, an unknown or a missing key.
    """
    kind = "chat" if "messages" in row else "preference" if "chosen" in row or "rejected" in row else "choice"
    known = _KEYS[kind]
    if kind == "choice" and "question" not in row and "options" not in row:
        raise DataError(f"{where}: neither a choice nor a chat row; expected {' or '.join(map(expected_keys, _KEYS))}")
    for key in row:
        if key not in known:
            raise DataError(
                f"{where}: unknown key {key!r}{nearest(key, known)}; a {kind} row allows: {', '.join(known)}"
            )
    for key in known:
        if key not in row and key not in _OPTIONAL:
            raise DataError(f"{where}: key {key!r} is missing; a {kind} row has: {expected_keys(kind)}")
    return kind


def expected_keys(kind: str) -> str:
    """The keys a row of this kind must have."""
    return ", ".join(key for key in _KEYS[kind] if key not in _OPTIONAL)


def _profile(profile: Any, where: str) -> dict[str, Any] | str:
    if isinstance(profile, str):
        return profile
    if not isinstance(profile, dict):
        raise DataError(f"{where}: profile is {type(profile).__name__}; allowed: an object of fields or a sentence")
    for name, value in profile.items():
        if value is not None and not isinstance(value, str | int | float):
            raise DataError(
                f"{where}: profile field {name!r} is {type(value).__name__}; allowed: text, a number, true, false or null"
            )
    return profile


def person_of(row: Row, key: str, where: str) -> str | None:
    """The id of a row's person, in one spelling; None for words that mean there is none ("", "nan", "None", "unknown", ...).

    Raises:
        DataError: neither text nor a whole number.
    """
    value = row.get(key)
    if is_missing(value) and not isinstance(value, list | dict):
        return None
    person = _identifier(row, key, where)
    return None if person is None or person.lower() in _NOBODY else person


def _identifier(row: Row, key: str, where: str) -> str | None:
    value = row.get(key)
    if isinstance(value, float) and value.is_integer():
        # A column of whole numbers with gaps is one of floats in many tables.
        value = int(value)
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
        raise DataError(f"{where}: {key} is {type(value).__name__}; allowed: text or a whole number")
    return None if value is None else one_spelling(str(value)) or None


def _question(row: dict[str, Any], where: str) -> Question:
    text, options = row["question"], row["options"]
    if not isinstance(text, str) or not one_spelling(text):
        raise DataError(f"{where}: question is empty or not text; allowed: the question as asked")
    if not isinstance(options, list) or not all(isinstance(option, str) and one_spelling(option) for option in options):
        raise DataError(f"{where}: options is not a list of texts; allowed: 2 to {len(LETTERS)} different texts")
    options = tuple(one_spelling(option) for option in options)
    if not 2 <= len(options) <= len(LETTERS) or len(set(options)) < len(options):
        raise DataError(
            f"{where}: options has {len(options)} texts, {len(set(options))} different; allowed: 2 to {len(LETTERS)} different texts"
        )
    text = one_spelling(text)
    question_id = _identifier(row, "question_id", where)
    if question_id is None:
        question_id = hashlib.sha256(json.dumps([text, options]).encode()).hexdigest()[:12]
    scale = row.get("scale", "ordinal")
    if scale not in SCALES:
        raise DataError(
            f"{where}: scale is {scale!r}; allowed: {', '.join(SCALES)} (nominal: the order of the options means nothing)"
        )
    return Question(question_id, text, options, scale)


def _answer(answer: Any, options: tuple[str, ...], where: str) -> int:
    if isinstance(answer, str) and one_spelling(answer) in options:
        return options.index(one_spelling(answer))
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return answer
    shown = (
        repr(answer)
        if isinstance(answer, int | float | bool) or answer is None
        else f"a {type(answer).__name__} that is no option"
    )
    raise DataError(f"{where}: answer is {shown}; allowed: 0 to {len(options) - 1}, or the text of an option")


def _weight(row: Row, where: str) -> float:
    weight = row.get("weight")
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= sys.float_info.max:
        shown = f"{weight!r:.40}" if isinstance(weight, int | float) else type(weight).__name__
        raise DataError(f"{where}: weight is {shown}; allowed: a positive number (1 where a row has none)")
    return float(weight)


def _messages(messages: Any, where: str, last: str = "assistant") -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages is empty or not a list; allowed: objects with role and content")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise DataError(f"{where}: message {number + 1} is not an object with exactly the keys role and content")
        if message["role"] not in _ROLES:
            raise DataError(f"{where}: message {number + 1} has role {message['role']!r}; allowed: {', '.join(_ROLES)}")
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise DataError(f"{where}: message {number + 1} has no text in content")
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise DataError(
            f"{where}: message {roles.index('system', 1) + 1} has role 'system'; only the first message may"
        )
    if roles[-1] != last or "user" not in roles or "assistant" in roles[: roles.index("user")]:
        kind, article = ("conversation", "an") if last == "assistant" else ("prompt", "a")
        raise DataError(
            f"{where}: a {kind} starts with a user message (after an optional system one) and ends with {article} {last} message"
        )
    return messages


def _prompt(prompt: Any, where: str) -> list[dict[str, str]]:
    return _messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, where, last="user")


def _answer_text(row: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(row[key], str) or not row[key].strip():
        raise DataError(f"{where}: {key} is empty or not text; allowed: an answer")
    return row[key]
