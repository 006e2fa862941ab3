"""Records of any source, checked in several processes and gathered with little memory."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa

from cuma_ds.config import DataSection
from cuma_ds.data.raw import ProfileList, ReadOptions, Rows, check_questions
from cuma_ds.data.rows import QUESTION_SCHEMA, SCHEMAS, ArrowFile, Question
from cuma_ds.data.sources.files import Chunk, Input, lines_of, record_of
from cuma_ds.data.sources.records import (
    KEYS,
    RESPONDENTS,
    Convert,
    Row,
    answer_of,
    expected_keys,
    messages_of,
    person_of,
    preference_of,
    profile_of,
    question_of,
    row_kind,
    shares_of,
    weight_of,
)
from cuma_ds.data.splits import draws
from cuma_ds.errors import DataError

# Smaller inputs are read before other processes have started.
_WORTH_WORKERS = 64 << 20
# So many wrong rows are named.
_NAMED = 20
# Kinds of rows that are about a question with options.
_ASKED = ("choice", "distribution")


class _Contradiction(DataError):
    """Two rows that do not go together. Neither is wrong by itself, so it is not known which to leave out."""


@dataclass
class Part:
    """What one chunk of records holds, with numbers of its own: small enough to be sent between processes.

    rows: person, profile, question and answer of each row; person -1 where nothing names one.
    unnamed: what identifies each row without a person in its source.
    weights: survey weight of each row, where they are asked for; people behind each share of a distribution.
    has_weights: whether any row names one.
    wrong: place and fault of each row that was left out.
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
    wrong: list[tuple[str, str]] = field(default_factory=list)
    where: str = ""
    consumed: int = 0

    def take(self, kind: str, where: str, question: Question | None = None) -> int:
        """Note the kind of rows and the question of one; the question's number, 0 without one."""
        self.kind, self.where = kind, self.where or where
        if question is None:
            return 0
        return self.questions.setdefault(question.question_id, (len(self.questions), question, where))[0]

    def take_shares(self, question: Question, place: tuple[int, int], people: Sequence[float]) -> None:
        """One row per option that has a share. The distribution stands in the place of a person who gave them all.

        Args:
            question: that was asked.
            place: numbers of the profile and the question.
            people: behind each option.
        """
        profile, number = place
        name = f"{question.question_id}\0{self.profiles.profiles[profile]['sentence']}"
        distribution = self.persons.setdefault(name, len(self.persons))
        for option, weight in enumerate(people):
            if weight:
                self.rows.extend((distribution, profile, number, option))
                self.weights.append(weight)

    def leave_out(self, where: str, error: DataError, config: DataSection) -> None:
        """Note a wrong row, where the recipe leaves such rows out.

        Raises:
            DataError: it refuses them, or the row contradicts another one.
        """
        if config.on_bad_row == "refuse" or isinstance(error, _Contradiction):
            raise error
        self.wrong.append((where, str(error)))


def read_part(chunk: Chunk, convert: Convert, template: str, config: DataSection) -> Part:
    """Check and count the rows of one chunk.

    Raises:
        DataError: one line with file and line (or row) for the first thing that is wrong, unless the recipe leaves it
            out.
    """
    part = Part(profiles=ProfileList(template), consumed=chunk.consumed)
    payload: list[tuple] = []
    for where, undecoded in lines_of(chunk):
        try:
            converted = convert(record_of(undecoded, where), where)
        except DataError as error:
            part.leave_out(where, error, config)
            continue
        if converted.record_id is not None:
            part.record_ids.append((str(converted.record_id), where))
        if converted.skipped is not None:
            part.skipped[converted.skipped] += 1
        for row in converted.rows:
            try:
                _add(part, row, where, config, payload)
            except DataError as error:
                part.leave_out(where, error, config)
    if part.kind and part.kind not in _ASKED:
        schema = _payload_schema(part.kind)
        columns = list(zip(*payload, strict=True)) if payload else [()] * len(schema)
        part.payload = pa.RecordBatch.from_arrays(
            [pa.array(c, t.type) for c, t in zip(columns, schema, strict=True)], schema=schema
        )
    return part


def _add(part: Part, row: Row, where: str, config: DataSection, payload: list[tuple]) -> None:
    """Check a row, then take it in. A row that is wrong leaves nothing behind."""
    kind = row_kind(row, where)
    if part.kind and kind != part.kind:
        raise _Contradiction(f"{where}: a {kind} row after {part.kind} rows; one data set holds one kind")
    question = question_of(row, where) if kind in _ASKED else None
    if question is not None:
        _, known, first = part.questions.get(question.question_id, (0, question, where))
        _same_question(question, known, where, first)
        if config.questions is not None and question.question_id not in config.questions:
            part.take(kind, where, question)
            return
    pair = preference_of(row, where) if kind == "preference" else None
    if pair is not None and pair.margin is not None and pair.margin < config.min_margin:
        part.take(kind, where)
        part.skipped["pairs with a margin below data.min_margin"] += 1
        return
    texts = (messages_of(row["messages"], where),) if kind == "chat" else pair
    shares, weight, answer = [0.0], None, 0
    if question is not None and kind == "distribution":
        shares, weight = shares_of(row["shares"], question.options, where), weight_of(row, where, RESPONDENTS)
    elif question is not None:
        answer = answer_of(row["answer"], question.options, where)
        weight = weight_of(row, where) if config.weights else None
    person_id = None if kind == "distribution" else person_of(row, "person_id", where)
    try:
        profile = part.profiles.add(profile_of(row["profile"], where))
    except DataError as error:
        raise DataError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
    number = part.take(kind, where, question)
    part.has_weights |= row.get("weight") is not None
    if texts is not None:
        payload.append(texts)
    if question is not None and weight is not None and kind == "distribution":
        part.take_shares(question, (profile, number), [weight * share for share in shares])
        return
    if weight is not None:
        part.weights.append(weight)
    if person_id is None:
        part.unnamed.append(Path(where).name)
    person = -1 if person_id is None else part.persons.setdefault(person_id, len(part.persons))
    part.rows.extend((person, profile, number, answer))


def read_records(source: Input, convert: Convert, options: ReadOptions) -> Rows:
    """Read all records of a source, in as many processes as are worth it.

    Kept in memory are four small integers per row, the distinct profiles, and the ids of people and questions; texts
    go to ``options.spool`` as they are read.

    Args:
        source: undecoded records.
        convert: a module's function (or a ``functools.partial`` of one), so that other processes find it.
        options: ``workers``: one per core for inputs above 64 MB if None, else none besides this one. ``progress`` is
            told bytes.

    Raises:
        DataError: the first thing that is wrong.
    """
    config, progress = options.config, options.progress
    with _Gathered(options) as gathered:
        for part in _parts(source, convert, options):
            gathered.add(part)
            if progress is not None:
                progress(min(part.consumed, source.size), source.size)
    gathered.say_wrong()
    if gathered.kind in _ASKED:
        check_questions(config, list(gathered.questions))
    if not len(gathered.rows):
        names = ", ".join(source.identity)
        raise DataError(
            f"{names} holds no rows; expected {' or '.join(map(expected_keys, KEYS))}{_reasons(gathered.skipped)}"
        )
    return gathered.finished(source.identity)


def _reasons(skipped: Mapping[str, int]) -> str:
    return f" (left out: {', '.join(f'{count} {reason}' for reason, count in skipped.items())})" if skipped else ""


def _parts(source: Input, convert: Convert, options: ReadOptions) -> Iterator[Part]:
    config, template, workers = options.config, options.template, options.workers
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

    def __init__(self, options: ReadOptions) -> None:
        self.config = options.config
        self.kind = ""
        self.rows = array("i")
        self.persons: dict[str, int] = {}
        self.unnamed_draws = array("d")
        self.weights = array("d")
        self.has_weights = False
        self.profiles = ProfileList(options.template)
        # Question id to its number, the hash of all that belongs to it, and where it came first; the texts are in the
        # spool.
        self.questions: dict[str, tuple[int, bytes, str]] = {}
        self.skipped: Counter[str] = Counter()
        self.wrong: list[tuple[str, str]] = []
        self._records: set[bytes] = set()
        self._spool = options.spool
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
        self.wrong += part.wrong
        if not part.kind:
            return
        if self.kind and part.kind != self.kind:
            raise DataError(f"{part.where}: a {part.kind} row after {self.kind} rows; one data set holds one kind")
        self.kind = part.kind
        # The last entry maps -1 (no person is named) to itself.
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
            if self.kind in _ASKED:
                rows[:, 2] = questions[local[:, 2]]
        self.rows.frombytes(rows.tobytes())
        self.unnamed_draws.frombytes(draws(self.config.split_seed, "row", part.unnamed).tobytes())
        self.weights.extend(part.weights)
        self.has_weights |= part.has_weights
        if part.payload is not None:
            if self._texts is None:
                self._texts = self._open.enter_context(_Spool(part.payload.schema, self._spool, "texts"))
            self._texts.append(part.payload)

    def say_wrong(self) -> None:
        """Count the wrong rows that were left out, and name them."""
        if self.wrong:
            self.skipped["wrong rows"] += len(self.wrong)
            places = ", ".join(Path(where).name for where, _ in self.wrong[:_NAMED])
            more = f", and {len(self.wrong) - _NAMED:,} more" if len(self.wrong) > _NAMED else ""
            warnings.warn(
                f"left out {len(self.wrong):,} wrong row(s): {places}{more}; the first: {self.wrong[0][1]}",
                stacklevel=4,
            )

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
                f"{where}: question_id {question.question_id!r} has another text, "
                f"other options or another scale than at {known[2]}; "
                "one question has one of each"
            )
        return known[0]

    def finished(self, inputs: dict[str, str]) -> Rows:
        """Everything, ready to be split. People are numbered by their sorted ids, then come rows without a person, in
        their order.
        """
        rows = np.frombuffer(self.rows, np.int32).reshape(-1, 4)
        names = sorted(self.persons)
        place = np.empty(len(names) + 1, np.int32)
        place[[self.persons[name] for name in names]] = np.arange(len(names), dtype=np.int32)
        person_N = place[rows[:, 0]]
        unnamed_N = rows[:, 0] < 0
        person_N[unnamed_N] = len(names) + np.arange(unnamed_N.sum(), dtype=np.int32)
        questions = self._asked.read() if self._asked is not None else ArrowFile(QUESTION_SCHEMA.empty_table())
        payload = self._texts.read() if self._texts is not None else None
        _warn_of_one_for_many(np.bincount(person_N[~unnamed_N]), names, len(rows))
        self._check_weights(inputs)
        draw_P = np.concatenate(
            [draws(self.config.split_seed, "person", names), np.frombuffer(self.unnamed_draws, np.float64)]
        )
        distributions = self.kind == "distribution"
        return Rows(
            "choice" if distributions else self.kind,
            person_N,
            draw_P,
            rows[:, 1],
            self.profiles,
            inputs,
            questions,
            rows[:, 2],
            rows[:, 3],
            payload=payload,
            skipped=self.skipped,
            weight_N=np.frombuffer(self.weights, np.float64) if self.config.weights or distributions else None,
            distributions=distributions,
        )

    def _check_weights(self, inputs: dict[str, str]) -> None:
        if self.kind == "choice" and self.config.weights and not self.has_weights:
            names = ", ".join(inputs)
            raise DataError(
                f"data.weights is true, but no row of {names} has a weight; leave it out, or give the rows weights"
            )
        if self.kind == "distribution":
            if self.config.weights:
                raise DataError(
                    f"data.weights is true, but {', '.join(inputs)} holds distributions, which always count by their "
                    "weight; leave it out"
                )
            return
        if self.has_weights and not self.config.weights:
            warnings.warn("rows have weights that count nothing, because data.weights is false", stacklevel=2)


def _warn_of_one_for_many(rows_P: np.ndarray, names: list[str], rows: int) -> None:
    """Say which id has so many rows that it may stand for no person in particular."""
    most = int(rows_P.argmax()) if len(rows_P) else 0
    if len(rows_P) and rows_P[most] > max(50, rows / 100):
        name = names[most] if len(names[most]) <= 6 else f"{names[most][:4]}..."
        warnings.warn(
            f"one person, with the id {name!r}, has {rows_P[most]:,} of {rows:,} rows; "
            "where that id stands for nobody, "
            "leave it out: each such row is then a person of its own",
            stacklevel=2,
        )


class _Spool:
    """An Arrow table that grows on disk, or in memory without a folder; small batches are gathered first."""

    def __init__(self, schema: pa.Schema, folder: Path | None, name: str) -> None:
        self.schema = schema
        self._file = None if folder is None else folder / f"{name}.arrow"
        self._held: list[pa.RecordBatch] = []
        self._writer: pa.RecordBatchStreamWriter | None = None

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
        raise _Contradiction(
            f"{what} had other options before, at {first}; one question has one list of options, in one order"
        )
    if known.text != question.text:
        raise _Contradiction(f"{what} had another text before, at {first}; one question has one text")
    if known.scale != question.scale:
        raise _Contradiction(
            f"{what} has scale {question.scale}, but {known.scale} at {first}; "
            "one question has one scale (ordinal where a row does not say)"
        )
