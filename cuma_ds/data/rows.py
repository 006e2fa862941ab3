"""Rows of one split, memory-mapped: what belongs to a question or a profile is looked up, never repeated on disk.

Shapes: M rows of a split, Q questions, n options of a question.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Required, TypedDict, get_args, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
_PEOPLE = pa.list_(pa.int32())
SCHEMAS = {
    "choice": pa.schema(
        {"profile": pa.int32(), "people": _PEOPLE, "question": pa.int32(), "counts": pa.list_(pa.int32())}
    ),
    "chat": pa.schema({"profile": pa.int32(), "people": _PEOPLE, "messages": _MESSAGES}),
    # margin: how much more the chosen answer was liked, in the source's units; null where the source has no scores.
    "preference": pa.schema(
        {"profile": pa.int32(), "people": _PEOPLE, "prompt": _MESSAGES, "chosen": pa.string(), "rejected": pa.string()}
        | {"margin": pa.float32()}
    ),
}
# With survey weights: counts are sums of weights; answers are people per option, weights one number for each of people.
WEIGHTED_CHOICE = pa.schema(
    {**dict(zip(SCHEMAS["choice"].names, SCHEMAS["choice"].types, strict=True)), "counts": pa.list_(pa.float64())}
    | {"answers": pa.list_(pa.int32()), "weights": pa.list_(pa.float64())}
)
# Distributions are stored as weighted choices: people is the number of the distribution, once for each option that has
# a share, and weights are the people behind those shares.
DISTRIBUTIONS = WEIGHTED_CHOICE.with_metadata({"rows": "distributions"})
QUESTION_SCHEMA = pa.schema(
    {"question_id": pa.string(), "question": pa.string(), "options": pa.list_(pa.string()), "scale": pa.string()}
)
# Of a benchmark with a short label for each question beside its text.
LABELLED_QUESTIONS = QUESTION_SCHEMA.append(pa.field("label", pa.string()))
BATCH_ROWS = 65_536

Scale = Literal["ordinal", "nominal"]
SCALES: tuple[Scale, ...] = get_args(Scale)


@dataclass(frozen=True)
class Question:
    """A choice question.

    Attributes:
        scale: ``ordinal`` where the order of the options means something, so that answers can be near or far from one
            another; ``nominal`` where it means nothing.
        label: the question in a few words, where the source has them.
    """

    question_id: str
    text: str
    options: tuple[str, ...]
    scale: Scale = "ordinal"
    label: str | None = None

    def columns(self) -> list[str | list[str]]:
        """The question as one row of ``QUESTION_SCHEMA``, without its label."""
        return [self.question_id, self.text, list(self.options), self.scale]


class Row(TypedDict, total=False):
    """A row of a split, see :class:`Split` for the keys that each kind has."""

    profile: Required[int]
    people: list[int]
    group: str
    question_id: str
    question: str
    label: str
    options: list[str]
    scale: Scale
    counts: list[float]
    answers: list[int]
    weights: list[float]
    messages: list[dict[str, str]]
    prompt: list[dict[str, str]]
    chosen: str
    rejected: str
    margin: float | None


class ArrowFile:
    """An Arrow table in one file (memory-mapped) or in memory.

    Attributes:
        table: its rows.
        file: where it is on disk; None in memory.
    """

    def __init__(self, table: pa.Table, file: Path | None = None) -> None:
        self.table = table
        self.file = file

    @classmethod
    def open(cls, file: Path) -> ArrowFile:
        """Map a file that :meth:`write` made."""
        with pa.memory_map(str(file)) as source:
            return cls(pa.ipc.open_stream(source).read_all(), file)

    @classmethod
    @contextmanager
    def write(cls, schema: pa.Schema, file: Path | None) -> Iterator[Callable[[pa.RecordBatch], None]]:
        """A function that appends batches to a new file."""
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            yield writer.write_batch

    @classmethod
    def collect(cls, schema: pa.Schema, batches: Iterable[pa.RecordBatch], file: Path | None) -> ArrowFile:
        """Batches as one table: streamed to ``file``, or in memory without one."""
        if file is None:
            return cls(pa.Table.from_batches(list(batches), schema))
        with cls.write(schema, file) as append:
            for batch in batches:
                append(batch)
        return cls.open(file)

    @classmethod
    def open_rows(cls, file: Path) -> ArrowFile:
        """Map a file of rows; preferences that release 0.1.0 wrote have no margin, and get null."""
        rows = cls.open(file)
        if "rejected" not in rows.table.column_names or "margin" in rows.table.column_names:
            return rows
        return cls(rows.table.append_column("margin", pa.nulls(rows.table.num_rows, pa.float32())), file)

    @classmethod
    def open_questions(cls, file: Path) -> ArrowFile:
        """Map a file of questions; those that release 0.1.0 wrote have no scale, which meant ordinal."""
        questions = cls.open(file)
        if "scale" in questions.table.column_names:
            return questions
        scale = pa.array(["ordinal"] * questions.table.num_rows, pa.string())
        return cls(questions.table.append_column("scale", scale), file)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Some columns, ``BATCH_ROWS`` rows at most at a time. What is read from a file does not stay in memory."""
        if self.file is None:
            yield from self.table.select(columns).to_batches(BATCH_ROWS)
            return
        fields = sorted(self.table.schema.get_field_index(name) for name in columns)
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        with pa.OSFile(str(self.file)) as source, pa.ipc.open_stream(source, options=options) as reader:
            for batch in reader:
                yield from (batch.slice(start, BATCH_ROWS) for start in range(0, len(batch), BATCH_ROWS))

    def save(self, file: Path) -> None:
        """Put the table at ``file``: linked where it is a file already and the disk allows, else written."""
        if self.file is None:
            with self.write(self.table.schema, file) as append:
                for batch in self.table.to_batches(BATCH_ROWS):
                    append(batch)
            return
        try:
            os.link(self.file, file)
        except OSError:
            shutil.copyfile(self.file, file)


class Split:
    """Rows as mappings, columns as lists; read from disk when asked for.

    A row of kind choice has profile, question_id, question, label (where questions have labels), options, scale, counts
    (answers per option), people (one number per answer, those who chose the first option first) and group (the country,
    or ""). With survey weights counts are their sums, and there are answers (people per option) and weights (of each of
    ``people``). A row of kind chat has profile, messages, people (the one person) and group; one of kind preference
    profile, prompt, chosen, rejected, margin (or None), people and group. Numbers of people mean nothing outside this
    data.

    Args:
        kind: choice | chat | preference.
        rows: the stored columns (``SCHEMAS``, ``WEIGHTED_CHOICE``).
        questions: Q rows of ``QUESTION_SCHEMA`` or ``LABELLED_QUESTIONS``.
        groups: country of each profile, or "".
    """

    def __init__(self, kind: str, rows: ArrowFile, questions: ArrowFile, groups: Sequence[str]) -> None:
        self.kind = kind
        self.rows = rows
        self.questions = questions
        self.groups = groups
        # Offsets of the batches, so that one row is found without walking through all of them.
        self._batches = rows.table.to_batches()
        self._starts = np.cumsum([0, *(len(batch) for batch in self._batches)])

    @property
    def column_names(self) -> list[str]:
        """Keys of a row."""
        stored = list(SCHEMAS[self.kind].names)
        if self.kind == "choice":
            stored = ["profile", *QUESTION_SCHEMA.names, "counts", "people"]
            stored += ["answers", "weights"] if self.weighted else []
        return [*stored, "group"]

    @property
    def weighted(self) -> bool:
        """Whether answers count by survey weights."""
        return "weights" in self.rows.table.column_names

    @property
    def distributions(self) -> bool:
        """Whether the answers are published shares, of no person in particular (see ``DISTRIBUTIONS``)."""
        return self.rows.table.schema.metadata == DISTRIBUTIONS.metadata

    def __len__(self) -> int:
        return self.rows.table.num_rows

    def __iter__(self) -> Iterator[Row]:
        for batch in self.rows.table.to_batches(4096):
            for row in batch.to_pylist():
                yield self._complete(row)

    @overload
    def __getitem__(self, key: str) -> list[Any]: ...

    @overload
    def __getitem__(self, key: int | np.integer) -> Row: ...

    def __getitem__(self, key: str | int | np.integer) -> list[Any] | Row:
        """One row by number, or one column by name as a list."""
        if isinstance(key, str):
            return self._column(key)
        number = int(key)
        number = number + len(self) if number < 0 else number
        if not 0 <= number < len(self):
            raise IndexError(f"row {key} of {len(self)}")
        place = int(np.searchsorted(self._starts, number, side="right")) - 1
        batch = self._batches[place].slice(number - self._starts[place], 1)
        return self._complete(batch.to_pylist()[0])

    def to_list(self) -> list[Row]:
        """All rows."""
        return list(self)

    def select(self, numbers: Iterable[int]) -> Split:
        """The rows with these numbers, in memory."""
        chosen = self.rows.table.take(pa.array(list(numbers), pa.int64()))
        return Split(self.kind, ArrowFile(chosen), self.questions, self.groups)

    def at(self, rows: Path, questions: Path) -> Split:
        """The same rows, known to stand in these files now."""
        return Split(
            self.kind, ArrowFile(self.rows.table, rows), ArrowFile(self.questions.table, questions), self.groups
        )

    def numbers(self, name: str) -> np.ndarray:
        """[M] int32: the stored column ``profile``, or ``question`` (the question's row)."""
        return self.rows.table[name].to_numpy()

    def answers(self) -> np.ndarray:
        """[M] int64: people's answers behind each row; 1 for a conversation or a preference."""
        if self.kind != "choice":
            return np.ones(len(self), np.int64)
        totals = [np.zeros(0, np.int64)]
        for chunk in self.rows.table["answers" if self.weighted else "counts"].chunks:
            offsets, values = chunk.offsets.to_numpy(), chunk.values.to_numpy()
            if len(chunk):
                totals.append(np.add.reduceat(values[: offsets[-1]], offsets[:-1], dtype=np.int64))
        return np.concatenate(totals)

    def sizes(self) -> dict[str, int]:
        """Number of rows, answers, people and profiles, as a manifest holds them."""
        people = self.rows.table["people"].combine_chunks().flatten().to_numpy()
        return {
            "examples": len(self),
            "answers": int(self.answers().sum()),
            "people": len(np.unique(people)),
            "profiles": len(np.unique(self.numbers("profile"))),
        }

    def characters(self) -> np.ndarray:
        """[M] int64: characters of each row's texts: the question with its options, or all that is said."""
        if self.kind == "choice":
            table = self.questions.table.combine_chunks()
            text_Q = _characters(table["question"]) + _characters(table["options"])
            return text_Q[self.numbers("question")]
        columns = ["messages"] if self.kind == "chat" else ["prompt", "chosen", "rejected"]
        return sum((_characters(self.rows.table[name]) for name in columns), np.zeros(len(self), np.int64))

    def question(self, number: int) -> Question:
        """A question by its row."""
        question_id, text, options, scale = (
            self.questions.table[name][number].as_py() for name in QUESTION_SCHEMA.names
        )
        label = self.questions.table["label"][number].as_py() if self.labelled else None
        return Question(question_id, text, tuple(options), scale, label)

    @property
    def labelled(self) -> bool:
        """Whether its questions have short labels."""
        return "label" in self.questions.table.column_names

    def _column(self, name: str) -> list[Any]:
        if name == "group":
            return [self.groups[profile] for profile in self.numbers("profile")]
        if self.kind == "choice" and name in QUESTION_SCHEMA.names:
            numbers, place = np.unique(self.numbers("question"), return_inverse=True)
            values = self.questions.table[name].take(pa.array(numbers)).to_pylist() if len(numbers) else []
            return [values[index] for index in place]
        if name not in self.column_names:
            raise KeyError(name)
        return self.rows.table[name].to_pylist()

    def _complete(self, row: Any) -> Row:
        if self.kind == "choice":
            question = self.question(row["question"])
            row = {**row, **dict(zip(QUESTION_SCHEMA.names, question.columns(), strict=True))}
            row |= {} if question.label is None else {"label": question.label}
        row["group"] = self.groups[row["profile"]]
        return row


def _characters(column: pa.ChunkedArray) -> np.ndarray:
    """[M] int64: characters of each text, or of each list of texts or messages."""
    counted = [np.zeros(0, np.int64)]
    for chunk in column.chunks:
        if pa.types.is_list(chunk.type):
            texts = chunk.flatten()
            texts = texts.field("content") if pa.types.is_struct(texts.type) else texts
            row_A = pc.list_parent_indices(chunk).to_numpy()
            counted.append(np.bincount(row_A, pc.utf8_length(texts).to_numpy(), len(chunk)).astype(np.int64))
        else:
            counted.append(pc.utf8_length(chunk).to_numpy().astype(np.int64))
    return np.concatenate(counted)


def single_answers(split: Split) -> Split:
    """One row per answer of a choice split (one-hot counts, or its weight instead of 1), in the order of its rows."""

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in split.rows.table.to_batches(BATCH_ROWS):
            lists = batch.column("answers" if split.weighted else "counts")
            start = lists.offsets[0].as_py()
            counts, lengths = lists.flatten().to_numpy(), np.diff(lists.offsets.to_numpy())
            row_of = np.repeat(np.arange(len(lengths)), lengths)
            option_of = np.arange(len(counts)) - np.repeat(lists.offsets.to_numpy()[:-1] - start, lengths)
            row_A, option_A = np.repeat(row_of, counts), np.repeat(option_of, counts)
            people_A = batch.column("people").flatten().to_numpy()
            weight_A = batch.column("weights").flatten().to_numpy() if split.weighted else None
            yield choice_batch(
                Histograms(
                    batch.column("profile").to_numpy()[row_A],
                    batch.column("question").to_numpy()[row_A],
                    lengths[row_A],
                    np.arange(len(row_A)),
                    option_A,
                    np.ones(len(row_A), np.int32),
                    people_A,
                    weight_A,
                )
            )

    rows = ArrowFile.collect(choice_schema(split.weighted), batches(), None)
    return Split("choice", rows, split.questions, split.groups)


def choice_schema(weighted: bool) -> pa.Schema:
    """The stored columns of choice questions."""
    return WEIGHTED_CHOICE if weighted else SCHEMAS["choice"]


class Histograms(NamedTuple):
    """Answer histograms by their cells.

    Attributes:
        profile_M, question_M: [M] of each row.
        options_M: [M] number of options.
        row_C, option_C, count_C: [C] cells that are not zero, row by row.
        person_A: [A] who answered, in the order of the cells.
        weight_A: [A] of each answer; None where all count alike.
    """

    profile_M: np.ndarray
    question_M: np.ndarray
    options_M: np.ndarray
    row_C: np.ndarray
    option_C: np.ndarray
    count_C: np.ndarray
    person_A: np.ndarray
    weight_A: np.ndarray | None


def choice_batch(cells: Histograms) -> pa.RecordBatch:
    """Answer histograms as stored columns."""
    offsets = _offsets(cells.options_M)
    place_C = offsets[cells.row_C] + cells.option_C
    values = np.zeros(offsets[-1], np.int32)
    values[place_C] = cells.count_C
    counts = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
    answers_M = np.bincount(cells.row_C, cells.count_C, len(cells.options_M)).astype(np.int64)
    people = people_lists(cells.person_A, answers_M)
    columns = [pa.array(cells.profile_M.astype(np.int32)), people, pa.array(cells.question_M.astype(np.int32)), counts]
    if cells.weight_A is not None:
        sums = np.bincount(np.repeat(place_C, cells.count_C), cells.weight_A, len(values))
        columns[-1] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(sums))
        columns += [counts, pa.ListArray.from_arrays(people.offsets, pa.array(cells.weight_A))]
    return pa.RecordBatch.from_arrays(columns, schema=choice_schema(cells.weight_A is not None))


def people_lists(person_A: np.ndarray, answers_M: np.ndarray) -> pa.ListArray:
    """The people of each row: the next ``answers_M[m]`` of ``person_A``."""
    return pa.ListArray.from_arrays(pa.array(_offsets(answers_M)), pa.array(person_A.astype(np.int32)))


def _offsets(lengths_M: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths_M)]).astype(np.int32)
