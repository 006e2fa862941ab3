"""Data ready for training: answers split by person, merged into histograms, with one list of distinct profiles."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

import cuma_ds
from cuma_ds.config import DataSection
from cuma_ds.data.rows import (
    BATCH_ROWS,
    QUESTION_SCHEMA,
    SCHEMAS,
    ArrowFile,
    Question,
    Split,
    choice_batch,
    people_lists,
    single_answers,
)  # fmt: skip
from cuma_ds.data.splits import SPLITS, assign_splits
from cuma_ds.errors import DataError, nearest
from cuma_ds.profiles import ProfileEncoder, ProfileTable, linearize
from cuma_ds.profiles.linearize import country_of
from cuma_ds.profiles.table import Encoder

FORMAT_VERSION = 2
TABLE_FILE = "profiles.safetensors"
_ALWAYS = ("train", "test", "heldout")

__all__ = ["PreparedData", "ProfileList", "Question", "Rows", "check_questions", "prepare_choice", "prepare_rows", "sha256"]


@dataclass(frozen=True)
class PreparedData:
    """Splits ``train``, ``test`` (other people, same countries), ``heldout`` (countries never trained on; profiles where there is
    no country), and where asked for ``heldout_profiles`` and, where the source names such people, ``valid``.

    Attributes:
        manifest: format_version, source, kind (choice | chat | preference), template, split settings, versions, hashes, and per
            split the number of examples, answers (before merging), people and profiles.
        splits: rows by split, see :class:`~cuma_ds.data.rows.Split`.
        profiles: distinct profiles as ``{"sentence": str, "fields": dict}``; ``profile`` is a row of this list.
        root: the folder it was read from, None for data that is only in memory.
    """

    manifest: dict[str, Any]
    splits: dict[str, Split]
    profiles: list[dict[str, Any]]
    root: Path | None = None

    @property
    def kind(self) -> str:
        """``choice``, ``chat`` or ``preference``."""
        return self.manifest["kind"]

    @property
    def evaluation_splits(self) -> list[str]:
        """Splits to judge a model on: all but ``train`` and ``valid``, in order, where there are rows."""
        return [name for name in SPLITS if name not in ("train", "valid") and len(self.splits.get(name, ()))]

    @cached_property
    def sentences(self) -> list[str]:
        """Profile sentences by profile index."""
        return [profile["sentence"] for profile in self.profiles]

    def profile_table(self, encoder: Encoder, cache_dir: str | Path | None = None) -> ProfileTable:
        """The embedded profiles: those in the prepared folder if this encoder made them, else built through the cache.

        Raises:
            DataError: sentences that the encoder cannot tell apart, because it does not read them to their end.
        """
        if isinstance(encoder, ProfileEncoder):
            encoder.check_lengths(self.sentences)
        stored = self.root / TABLE_FILE if self.root else None
        if stored is not None and stored.is_file():
            table = ProfileTable.load(stored)
            if table.fingerprint == encoder.fingerprint and table.sentences == self.sentences:
                return table
        return ProfileTable.build(self.sentences, encoder, cache_dir)

    def save(self, folder: str | Path) -> PreparedData:
        """Write the folder beside its place and rename it: it is there completely or not at all.

        Returns:
            The data as saved. A folder that already holds exactly this data is left as it is.

        Raises:
            DataError: the folder exists and holds something else.
        """
        target = Path(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
        beside.mkdir()
        try:
            for name, split in self.splits.items():
                split.rows.save(beside / f"{name}.arrow")
            self.splits["train"].questions.save(beside / "questions.arrow")
            with (beside / "profiles.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(profile, ensure_ascii=False) + "\n" for profile in self.profiles)
            hashes = {file.name: sha256(file) for file in sorted(beside.iterdir())}
            manifest = {**self.manifest, "hashes": hashes}
            (beside / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            if (target / "manifest.json").is_file():
                if {**_read_manifest(target), "versions": None} != {**manifest, "versions": None}:
                    raise DataError(f"{target} already holds other prepared data; choose another folder or remove it first")
            elif target.exists() and (not target.is_dir() or any(target.iterdir())):
                raise DataError(f"{target} exists and is no prepared folder; choose another folder")
            else:
                os.replace(beside, target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        splits = {name: split.at(target / f"{name}.arrow", target / "questions.arrow") for name, split in self.splits.items()}
        return dataclasses.replace(self, manifest=manifest, splits=splits, root=target)

    @classmethod
    def load(cls, folder: str | Path) -> PreparedData:
        """Read what :meth:`save` wrote; splits stay on disk and are memory-mapped.

        Raises:
            DataError: no prepared folder, another format version, or a missing or damaged file.
        """
        root = Path(folder)
        manifest = _read_manifest(root)
        for name in (*(f"{split}.arrow" for split in manifest["splits"]), "questions.arrow", "profiles.jsonl"):
            if not (root / name).is_file():
                raise DataError(f"the prepared folder {root} is incomplete: {name} is missing; prepare it again")
            if sha256(root / name) != manifest["hashes"].get(name):
                raise DataError(f"the prepared folder {root} is damaged: {name} has changed since it was written; prepare it again")
        with (root / "profiles.jsonl").open(encoding="utf-8") as lines:
            profiles = [json.loads(line) for line in lines]
        questions, groups = ArrowFile.open(root / "questions.arrow"), [country_of(profile["fields"]) for profile in profiles]
        splits = {name: Split(manifest["kind"], ArrowFile.open(root / f"{name}.arrow"), questions, groups) for name in manifest["splits"]}
        return cls(manifest, splits, profiles, root)

    def with_template(self, template: str) -> PreparedData:
        """The same data with sentences written by another template; profiles given as text stay as they are."""
        if self.manifest["template"] == template:
            return self
        profiles = [{**profile, "sentence": linearize(profile["fields"] or profile["sentence"], template)} for profile in self.profiles]
        return dataclasses.replace(self, manifest={**self.manifest, "template": template}, profiles=profiles)

    def with_single_answers(self) -> PreparedData:
        """The same data with one row per answer (one-hot counts) in ``train``; the other splits stay merged."""
        if self.kind != "choice":
            return self
        return dataclasses.replace(self, splits={**self.splits, "train": single_answers(self.splits["train"])})


class ProfileList:
    """Collects distinct profiles in the order they come; equal sentences are one profile."""

    def __init__(self, template: str) -> None:
        self.template = template
        self.profiles: list[dict[str, Any]] = []
        self.groups: list[str] = []
        self._rows: dict[str, int] = {}
        self._seen: dict[Any, int] = {}

    def add(self, profile: dict[str, Any] | str) -> int:
        """The profile's row.

        Raises:
            DataError: nothing in the profile is usable.
        """
        fields = {} if isinstance(profile, str) else dict(profile)
        key = (profile if isinstance(profile, str) else "", *((name, type(value), value) for name, value in fields.items()))
        if key not in self._seen:
            self._seen[key] = self._add(linearize(profile, self.template), fields)
        return self._seen[key]

    def merge(self, other: ProfileList, row: int) -> int:
        """The row of a profile that another list (of the same template) holds."""
        return self._add(**other.profiles[row])

    def _add(self, sentence: str, fields: dict[str, Any]) -> int:
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
        profiles: all profiles.
        inputs: what was read, name to version or sha256.
        questions: all questions (kind choice).
        question_N, answer_N: [N] int32 (kind choice).
        payload: the other stored columns of ``SCHEMAS[kind]``, N rows in the same order (other kinds).
        skipped: what was left out, reason to count.
        given_N: [N] split of each row's person where the source says so.
    """

    kind: str
    person_N: np.ndarray
    profile_N: np.ndarray
    profiles: ProfileList
    inputs: dict[str, str]
    questions: ArrowFile = field(default_factory=lambda: ArrowFile(QUESTION_SCHEMA.empty_table()))
    question_N: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    answer_N: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    payload: ArrowFile | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    given_N: np.ndarray | None = None


def prepare_rows(rows: Rows, config: DataSection, spool: Path | None = None) -> PreparedData:
    """Split by person, and merge equal questions of one profile into answer counts.

    Args:
        rows: of a source.
        config: split settings.
        spool: folder for the splits' files; in memory without one.

    Raises:
        DataError: no rows, or none left for training.
    """
    split_N = split_rows(rows.person_N, rows.profile_N, rows.profiles, config, rows.given_N)
    files, sizes = {}, {}
    for number, name in enumerate(SPLITS):
        chosen_N = split_N == number
        if name not in _ALWAYS and not chosen_N.any():
            continue
        file = None if spool is None else spool / f"{name}.arrow"
        if rows.kind == "choice":
            options_Q = np.array([len(options) for options in rows.questions.table["options"]], np.int64)
            batches = histogram_batches(
                rows.person_N[chosen_N], rows.profile_N[chosen_N], rows.question_N[chosen_N], rows.answer_N[chosen_N], options_Q
            )
        else:
            batches = _chosen_batches(rows, chosen_N)
        files[name] = ArrowFile.collect(SCHEMAS[rows.kind], batches, file)
        sizes[name] = count_sizes(rows.person_N[chosen_N], rows.profile_N[chosen_N])
    return finish(rows.kind, files, sizes, rows.questions, rows.profiles, config, rows.inputs, rows.skipped)


def prepare_choice(
    answers: pd.DataFrame,
    questions: Sequence[Question],
    profiles: ProfileList,
    config: DataSection,
    inputs: dict[str, str],
    spool: Path | None = None,
) -> PreparedData:
    """:func:`prepare_rows` for answers in a data frame with integer columns person, profile, question and answer."""
    columns = [answers[name].to_numpy(np.int32) for name in ("person", "profile", "question", "answer")]
    person_N, profile_N, question_N, answer_N = columns
    table = question_file(questions, None if spool is None else spool / "questions.arrow")
    rows = Rows("choice", person_N, profile_N, profiles, inputs, questions=table, question_N=question_N, answer_N=answer_N)
    return prepare_rows(rows, config, spool)


def question_file(questions: Sequence[Question], file: Path | None) -> ArrowFile:
    """Questions as an Arrow table."""
    columns = [[q.question_id for q in questions], [q.text for q in questions], [list(q.options) for q in questions]]
    batch = pa.RecordBatch.from_arrays([pa.array(c, t.type) for c, t in zip(columns, QUESTION_SCHEMA, strict=True)], schema=QUESTION_SCHEMA)
    return ArrowFile.collect(QUESTION_SCHEMA, [batch], file)


def histogram_batches(
    person_N: np.ndarray, profile_N: np.ndarray, question_N: np.ndarray, answer_N: np.ndarray, options_Q: np.ndarray
) -> Iterator[pa.RecordBatch]:
    """Answers merged into one row per (question, profile) with counts per option, in that order.

    Args:
        person_N, profile_N, question_N, answer_N: [N] int.
        options_Q: [Q] number of options of each question.
    """
    if not len(profile_N):
        return
    width, profiles = int(options_Q.max()), int(profile_N.max()) + 1
    key_N = (question_N.astype(np.int64) * profiles + profile_N) * width + answer_N
    order_N = np.lexsort((person_N, key_N))
    cells, first_C, count_C = np.unique(key_N[order_N], return_index=True, return_counts=True)
    # A row may not be torn apart: cells of one row are neighbours.
    row_C = cells // width
    starts = np.flatnonzero(np.concatenate([[True], row_C[1:] != row_C[:-1]]))
    for first in range(0, len(starts), BATCH_ROWS):
        begin = starts[first]
        end = starts[first + BATCH_ROWS] if first + BATCH_ROWS < len(starts) else len(cells)
        keys, index_C = np.unique(row_C[begin:end], return_inverse=True)
        question_M, counts = keys // profiles, count_C[begin:end]
        people = order_N[first_C[begin] : first_C[begin] + counts.sum()]
        answers_M = np.bincount(index_C, counts).astype(np.int64)
        yield choice_batch(
            keys % profiles, question_M, options_Q[question_M], index_C, cells[begin:end] % width, counts, person_N[people], answers_M
        )


def _chosen_batches(rows: Rows, chosen_N: np.ndarray) -> Iterator[pa.RecordBatch]:
    assert rows.payload is not None
    start = 0
    for batch in rows.payload.table.to_batches(4096):
        places = np.flatnonzero(chosen_N[start : start + len(batch)])
        if len(places):
            profile_M = pa.array(rows.profile_N[start + places].astype(np.int32))
            people_M = people_lists(rows.person_N[start + places], np.ones(len(places), np.int32))
            part = batch.take(pa.array(places))
            yield pa.RecordBatch.from_arrays([profile_M, people_M, *part.columns], schema=SCHEMAS[rows.kind])
        start += len(batch)


def check_questions(config: DataSection, known: Collection[str]) -> list[str]:
    """The ids of ``known`` that the recipe keeps, in their order.

    Raises:
        DataError: ``config.questions`` names one that is not there.
    """
    for question in config.questions or ():
        if question not in known:
            raise DataError(f"data.questions: there is no question {question!r}{nearest(question, known)}; the data has {', '.join(known)}")
    return [question for question in known if config.questions is None or question in config.questions]


def sha256(file: Path) -> str:
    """Hex digest of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def split_rows(
    person_N: np.ndarray, profile_N: np.ndarray, profiles: ProfileList, config: DataSection, given_N: np.ndarray | None = None
) -> np.ndarray:
    """[N] int8 index into ``SPLITS``, by the recipe's fractions and seed.

    Raises:
        DataError: nothing is left for training.
    """
    countries = sorted(set(profiles.groups) - {""})
    code = {country: index for index, country in enumerate(countries)}
    unit_N = np.array([code.get(group, -1) for group in profiles.groups], np.int32)[profile_N] if countries else profile_N
    split_N = assign_splits(
        person_N, unit_N, config.test_fraction, config.heldout_fraction, config.split_seed,
        profile_N, config.heldout_profile_fraction, given_N,
    )  # fmt: skip
    if not (split_N == 0).any():
        raise DataError(
            f"nothing is left for training: {len(person_N)} rows of {len(np.unique(person_N))} people with test_fraction "
            f"{config.test_fraction} and heldout_fraction {config.heldout_fraction}; give more people or hold out less"
        )
    return split_N


def count_sizes(person_N: np.ndarray, profile_N: np.ndarray) -> dict[str, int]:
    """Answers, people and profiles of a split."""
    return {"answers": len(person_N), "people": len(np.unique(person_N)), "profiles": len(np.unique(profile_N))}


def finish(
    kind: str,
    files: dict[str, ArrowFile],
    sizes: dict[str, dict[str, int]],
    questions: ArrowFile,
    profiles: ProfileList,
    config: DataSection,
    inputs: dict[str, str],
    skipped: Mapping[str, int],
) -> PreparedData:
    """Splits with their manifest.

    Args:
        files: stored rows by split.
        sizes: answers, people and profiles by split.
    """
    splits = {name: Split(kind, file, questions, profiles.groups) for name, file in files.items()}
    heldout = np.unique(splits["heldout"].numbers("profile"))
    manifest = {
        "format_version": FORMAT_VERSION,
        "source": config.source,
        "kind": kind,
        "template": profiles.template,
        "test_fraction": config.test_fraction,
        "heldout_fraction": config.heldout_fraction,
        "heldout_profile_fraction": config.heldout_profile_fraction,
        "seed": config.split_seed,
        "questions": None if config.questions is None else list(config.questions),
        "versions": {"cuma_ds": cuma_ds.__version__, "python": platform.python_version(), "pyarrow": pa.__version__},
        "inputs": inputs,
        "skipped": dict(skipped),
        "hashes": {},
        "splits": {name: {"examples": len(splits[name]), **sizes[name]} for name in splits},
        "heldout_groups": sorted({profiles.groups[profile] for profile in heldout} - {""}),
    }
    return PreparedData(manifest, splits, profiles.profiles)


def _read_manifest(root: Path) -> dict[str, Any]:
    file = root / "manifest.json"
    if not file.is_file():
        raise DataError(f"{root} is no prepared folder: there is no manifest.json; make one with launchers/prepare_data.py")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or "format_version" not in manifest:
        raise DataError(f"{file} is not the manifest of a prepared folder; prepare it again")
    if manifest["format_version"] != FORMAT_VERSION:
        raise DataError(f"{file} has format_version {manifest['format_version']}; this version reads {FORMAT_VERSION}; prepare it again")
    return manifest
