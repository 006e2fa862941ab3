"""What a source reads, before it is split and merged."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import pyarrow as pa

from cuma_ds.config import DataSection
from cuma_ds.data.rows import LABELLED_QUESTIONS, QUESTION_SCHEMA, ArrowFile, Question
from cuma_ds.errors import DataError, nearest
from cuma_ds.profiles.linearize import country_of, linearize, plain_profile

Progress = Callable[[int, int], None]


class ReadOptions(NamedTuple):
    """How a source is read.

    Attributes:
        config: the section ``data`` of a recipe.
        template: how profile fields become a sentence.
        spool: folder for large intermediate files; None keeps all in memory.
        workers: processes that read; by the size of the input if None.
        progress: told (done, in all).
    """

    config: DataSection
    template: str = "generic"
    spool: Path | None = None
    workers: int | None = None
    progress: Progress | None = None


class Profile(TypedDict):
    """A distinct profile: its sentence, and its fields (none where it was given as a sentence)."""

    sentence: str
    fields: dict[str, object]


class ProfileList:
    """Collects distinct profiles in the order they come; equal sentences are one profile."""

    def __init__(self, template: str) -> None:
        self.template = template
        self.profiles: list[Profile] = []
        self.groups: list[str] = []
        self._rows: dict[str, int] = {}
        self._seen: dict[tuple[object, ...], int] = {}

    def add(self, profile: Mapping[str, object] | str) -> int:
        """The profile's row.

        Raises:
            DataError: nothing in the profile is usable.
        """
        given = {} if isinstance(profile, str) else profile
        key = (
            profile if isinstance(profile, str) else "",
            *((name, type(value), value) for name, value in given.items()),
        )
        if key not in self._seen:
            plain = plain_profile(profile)
            self._seen[key] = self._add(linearize(plain, self.template), {} if isinstance(plain, str) else plain)
        return self._seen[key]

    def merge(self, other: ProfileList, row: int) -> int:
        """The row of a profile that another list (of the same template) holds."""
        return self._add(**other.profiles[row])

    def _add(self, sentence: str, fields: dict[str, object]) -> int:
        if sentence not in self._rows:
            self._rows[sentence] = len(self.profiles)
            self.profiles.append({"sentence": sentence, "fields": fields})
            self.groups.append(country_of(fields))
        return self._rows[sentence]


@dataclass(frozen=True)
class Rows:
    """What a source read, before it is split: one entry per answer, conversation or preference.

    Attributes:
        kind: choice | chat | preference.
        person_N, profile_N: [N] int32.
        draw_P: [P] a number in [0, 1) for each person, of :func:`cuma_ds.data.splits.draws`.
        profiles: all profiles.
        inputs: what was read, name to version or sha256.
        questions: all questions (kind choice).
        question_N, answer_N: [N] int32 (kind choice).
        option_NQ: [N, Q] int8, instead of these two: a row is a person with all their answers, -1 for none.
        payload: the other stored columns of ``SCHEMAS[kind]``, N rows in the same order (other kinds).
        skipped: what was left out, reason to count.
        given_N: [N] split of each row's person where the source says so.
        weight_N: [N] survey weight of each row, in any unit; None where all count alike.
        distributions: rows are the shares of published distributions. Then a person is one distribution, and
            ``weight_N`` are the people behind each share.
        probe_NQ: [N, Q] bool, the answers of ``option_NQ`` that are also a split of their own; None where none are.
    """

    kind: str
    person_N: np.ndarray
    draw_P: np.ndarray
    profile_N: np.ndarray
    profiles: ProfileList
    inputs: dict[str, str]
    questions: ArrowFile = field(default_factory=lambda: ArrowFile(QUESTION_SCHEMA.empty_table()))
    question_N: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    answer_N: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    option_NQ: np.ndarray | None = None
    payload: ArrowFile | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    given_N: np.ndarray | None = None
    weight_N: np.ndarray | None = None
    distributions: bool = False
    probe_NQ: np.ndarray | None = None


def question_file(questions: Sequence[Question], file: Path | None) -> ArrowFile:
    """Questions as an Arrow table."""
    schema = LABELLED_QUESTIONS if any(question.label for question in questions) else QUESTION_SCHEMA
    rows = [
        {**dict(zip(QUESTION_SCHEMA.names, question.columns(), strict=True)), "label": question.label}
        for question in questions
    ]
    return ArrowFile.collect(schema, [pa.RecordBatch.from_pylist(rows, schema)], file)


def check_questions(config: DataSection, known: Collection[str]) -> list[str]:
    """The ids of ``known`` that the recipe keeps, in their order.

    Raises:
        DataError: ``config.questions`` names one that is not there.
    """
    for question in config.questions or ():
        if question not in known:
            raise DataError(
                f"data.questions: there is no question {question!r}{nearest(question, known)}; "
                f"the data has {', '.join(known)}"
            )
    return [question for question in known if config.questions is None or question in config.questions]
