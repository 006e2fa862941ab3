"""Data ready for training: answers split by person, merged into histograms, with one list of distinct profiles."""

from __future__ import annotations

import dataclasses
import json
import platform
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
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
    choice_schema,
    people_lists,
    single_answers,
)  # fmt: skip
from cuma_ds.data.splits import HELDOUT, SPLITS, TRAIN, Share, assign_splits, draws
from cuma_ds.errors import DataError, nearest
from cuma_ds.files import atomic_folder
from cuma_ds.identity import SEAL, seal_holds, sealed
from cuma_ds.identity import file_sha256 as sha256
from cuma_ds.profiles import ProfileEncoder, ProfileTable, linearize
from cuma_ds.profiles.linearize import country_of, plain_profile
from cuma_ds.profiles.table import Encoder

FORMAT_VERSION = 2
TABLE_FILE = "profiles.safetensors"
_ALWAYS = ("train", "test", "heldout")

__all__ = ["PreparedData", "ProfileList", "Question", "Rows", "check_questions", "prepare_rows", "sha256"]


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
        try:
            with atomic_folder(target) as beside:
                for name, split in self.splits.items():
                    split.rows.save(beside / f"{name}.arrow")
                self.splits["train"].questions.save(beside / "questions.arrow")
                with (beside / "profiles.jsonl").open("w", encoding="utf-8") as file:
                    file.writelines(json.dumps(profile, ensure_ascii=False) + "\n" for profile in self.profiles)
                hashes = {file.name: sha256(file) for file in sorted(beside.iterdir())}
                manifest = sealed({**self.manifest, "hashes": hashes})
                (beside / "manifest.json").write_text(
                    json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
                )
        except FileExistsError:
            if not is_prepared(target):
                raise DataError(f"{target} exists and is no prepared folder; choose another folder") from None
            here = {"versions": None, SEAL: None}
            if {**read_manifest(target), **here} != {**manifest, **here}:
                raise DataError(
                    f"{target} already holds other prepared data; choose another folder or remove it first"
                ) from None
        splits = {
            name: split.at(target / f"{name}.arrow", target / "questions.arrow") for name, split in self.splits.items()
        }
        return dataclasses.replace(self, manifest=manifest, splits=splits, root=target)

    @classmethod
    def load(cls, folder: str | Path) -> PreparedData:
        """Read what :meth:`save` wrote; splits stay on disk and are memory-mapped.

        Raises:
            DataError: no prepared folder, another format version, or a missing or damaged file.
        """
        root = Path(folder)
        manifest = read_manifest(root)
        for name in (*(f"{split}.arrow" for split in manifest["splits"]), "questions.arrow", "profiles.jsonl"):
            if not (root / name).is_file():
                raise DataError(f"the prepared folder {root} is incomplete: {name} is missing; prepare it again")
            if sha256(root / name) != manifest["hashes"].get(name):
                raise DataError(
                    f"the prepared folder {root} is damaged: {name} has changed since it was written; prepare it again"
                )
        with (root / "profiles.jsonl").open(encoding="utf-8") as lines:
            profiles = [json.loads(line) for line in lines]
        questions, groups = (
            ArrowFile.open_questions(root / "questions.arrow"),
            [country_of(profile["fields"]) for profile in profiles],
        )
        splits = {
            name: Split(manifest["kind"], ArrowFile.open(root / f"{name}.arrow"), questions, groups)
            for name in manifest["splits"]
        }
        return cls(manifest, splits, profiles, root)

    def with_template(self, template: str) -> PreparedData:
        """The same data with sentences written by another template; profiles given as text stay as they are."""
        if self.manifest["template"] == template:
            return self
        profiles = [
            {**profile, "sentence": linearize(profile["fields"] or profile["sentence"], template)}
            for profile in self.profiles
        ]
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
        draw_P: [P] a number in [0, 1) for each person, of :func:`cuma_ds.data.splits.draws`.
        profiles: all profiles.
        inputs: what was read, name to version or sha256.
        questions: all questions (kind choice).
        question_N, answer_N: [N] int32 (kind choice).
        payload: the other stored columns of ``SCHEMAS[kind]``, N rows in the same order (other kinds).
        skipped: what was left out, reason to count.
        given_N: [N] split of each row's person where the source says so.
        weight_N: [N] survey weight of each row, in any unit; None where all count alike.
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
    payload: ArrowFile | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    given_N: np.ndarray | None = None
    weight_N: np.ndarray | None = None


def prepare_rows(rows: Rows, config: DataSection, spool: Path | None = None) -> PreparedData:
    """Split by person, and merge equal questions of one profile into answer counts.

    Args:
        rows: of a source.
        config: split settings.
        spool: folder for the splits' files; in memory without one.

    Raises:
        DataError: no rows, or none left for training; weights for something else than choice questions.
    """
    if config.weights and rows.kind != "choice":
        raise DataError(
            f"data.weights is true, but only choice questions have weights, not kind {rows.kind}; leave it out"
        )
    split_N = split_rows(rows, config)
    weight_N = None if rows.weight_N is None else with_mean_one(rows.weight_N)
    schema = choice_schema(weight_N is not None) if rows.kind == "choice" else SCHEMAS[rows.kind]
    files, sizes = {}, {}
    for number, name in enumerate(SPLITS):
        chosen_N = split_N == number
        if name not in _ALWAYS and not chosen_N.any():
            continue
        file = None if spool is None else spool / f"{name}.arrow"
        if rows.kind == "choice":
            options_Q = np.array([len(options) for options in rows.questions.table["options"]], np.int64)
            batches = histogram_batches(
                rows.person_N[chosen_N], rows.profile_N[chosen_N], rows.question_N[chosen_N], rows.answer_N[chosen_N],
                options_Q, None if weight_N is None else weight_N[chosen_N],
            )  # fmt: skip
        else:
            batches = _chosen_batches(rows, chosen_N)
        files[name] = ArrowFile.collect(schema, batches, file)
        sizes[name] = count_sizes(rows.person_N[chosen_N], rows.profile_N[chosen_N])
    return finish(rows, files, sizes, config)


def question_file(questions: Sequence[Question], file: Path | None) -> ArrowFile:
    """Questions as an Arrow table."""
    rows = [dict(zip(QUESTION_SCHEMA.names, question.columns(), strict=True)) for question in questions]
    return ArrowFile.collect(QUESTION_SCHEMA, [pa.RecordBatch.from_pylist(rows, QUESTION_SCHEMA)], file)


def with_mean_one(weight_N: np.ndarray, answers_N: np.ndarray | None = None) -> np.ndarray:
    """[N] weights whose mean over all answers is 1, so that a sum of weights is comparable with a number of answers.

    Args:
        weight_N: positive.
        answers_N: answers that have each weight; one without it.

    Raises:
        DataError: weights so far apart that the smallest would count nothing.
    """
    relative_N = weight_N / weight_N.max()  # equal weights are exactly 1 from here on
    if not relative_N.min():
        reach = f"{weight_N.min():g} to {weight_N.max():g}"
        raise DataError(f"survey weights reach from {reach}, too far to be added up; correct them")
    return relative_N / np.average(relative_N, weights=answers_N)


def histogram_batches(
    person_N: np.ndarray, profile_N: np.ndarray, question_N: np.ndarray, answer_N: np.ndarray, options_Q: np.ndarray,
    weight_N: np.ndarray | None = None,
) -> Iterator[pa.RecordBatch]:  # fmt: skip
    """Answers merged into one row per (question, profile) with counts per option, in that order.

    Args:
        person_N, profile_N, question_N, answer_N: [N] int.
        options_Q: [Q] number of options of each question.
        weight_N: [N] of each answer; None where all count alike.
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
            keys % profiles, question_M, options_Q[question_M], index_C, cells[begin:end] % width, counts, person_N[people],
            answers_M, None if weight_N is None else weight_N[people],
        )  # fmt: skip


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
            raise DataError(
                f"data.questions: there is no question {question!r}{nearest(question, known)}; the data has {', '.join(known)}"
            )
    return [question for question in known if config.questions is None or question in config.questions]


def split_rows(rows: Rows, config: DataSection) -> np.ndarray:
    """[N] int8 index into ``SPLITS``, by the recipe's fractions and seed.

    Raises:
        DataError: nothing is left for training.
    """
    seed, sentences = config.split_seed, [profile["sentence"] for profile in rows.profiles.profiles]
    countries = sorted(set(rows.profiles.groups) - {""})
    code = {country: index for index, country in enumerate(countries)}
    unit_G = (
        np.array([code.get(group, -1) for group in rows.profiles.groups], np.int32)
        if countries
        else np.arange(len(sentences))
    )
    units = Share(draws(seed, "unit", countries or sentences), config.heldout)
    profiles = (
        Share(draws(seed, "profile", sentences), config.heldout_profile_fraction)
        if config.heldout_profile_fraction
        else None
    )
    people = Share(rows.draw_P, config.test_fraction)
    split_N = assign_splits(
        rows.person_N, people, unit_G[rows.profile_N], units, rows.profile_N, profiles, rows.given_N
    )
    expected = round(config.heldout * len(units.draw))
    if expected and not (split_N == HELDOUT).any():
        what = "countries" if countries else "profiles"
        warnings.warn(
            f"none of the {len(units.draw)} {what} is held out with heldout_fraction {config.heldout} and split_seed {seed}; "
            "another seed or a larger fraction holds out some",
            stacklevel=2,
        )
    if not (split_N == TRAIN).any():
        raise DataError(
            f"nothing is left for training: {len(rows.person_N)} rows of {len(np.unique(rows.person_N))} people with test_fraction "
            f"{config.test_fraction} and heldout_fraction {config.heldout}; give more people or hold out less"
        )
    return split_N


def count_sizes(person_N: np.ndarray, profile_N: np.ndarray) -> dict[str, int]:
    """Answers, people and profiles of a split."""
    return {"answers": len(person_N), "people": len(np.unique(person_N)), "profiles": len(np.unique(profile_N))}


def finish(
    rows: Rows, files: dict[str, ArrowFile], sizes: dict[str, dict[str, int]], config: DataSection
) -> PreparedData:
    """Splits with their manifest.

    Args:
        rows: all that was read.
        files: stored rows by split.
        sizes: answers, people and profiles by split.
    """
    profiles = rows.profiles
    splits = {name: Split(rows.kind, file, rows.questions, profiles.groups) for name, file in files.items()}
    heldout = np.unique(splits["heldout"].numbers("profile"))
    manifest = {
        "format_version": FORMAT_VERSION,
        "source": config.source,
        "kind": rows.kind,
        "template": profiles.template,
        # Release 0.1.0 had no such key: it drew among the people present, so that two kinds of one source did not agree.
        "split": {"by": "hash", "people": "drawn" if rows.given_N is None else "given by the source"},
        "test_fraction": config.test_fraction,
        "heldout_fraction": config.heldout,
        "heldout_profile_fraction": config.heldout_profile_fraction,
        "seed": config.split_seed,
        "questions": None if config.questions is None else list(config.questions),
        # Without weights a folder is as release 0.1.0 wrote it.
        **({"weights": True} if config.weights else {}),
        "versions": {"cuma_ds": cuma_ds.__version__, "python": platform.python_version(), "pyarrow": pa.__version__},
        "inputs": rows.inputs,
        "skipped": dict(rows.skipped),
        "hashes": {},
        "splits": {name: {"examples": len(splits[name]), **sizes[name]} for name in splits},
        "heldout_groups": sorted({profiles.groups[profile] for profile in heldout} - {""}),
    }
    return PreparedData(manifest, splits, profiles.profiles)


def is_prepared(place: str | Path | None) -> TypeGuard[str | Path]:
    """Whether there is a prepared folder."""
    return place is not None and (Path(place) / "manifest.json").is_file()


def read_manifest(root: Path) -> dict[str, Any]:
    """``manifest.json`` of a prepared folder.

    Raises:
        DataError: it is missing, damaged, or of another format.
    """
    file = root / "manifest.json"
    if not file.is_file():
        raise DataError(
            f"{root} is no prepared folder: there is no manifest.json; make one with launchers/prepare_data.py"
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or "format_version" not in manifest:
        raise DataError(f"{file} is not the manifest of a prepared folder; prepare it again")
    if manifest["format_version"] != FORMAT_VERSION:
        raise DataError(
            f"{file} has format_version {manifest['format_version']}; this version reads {FORMAT_VERSION}; prepare it again"
        )
    if SEAL in manifest and not seal_holds(manifest):
        raise DataError(
            f"the prepared folder {root} is damaged: manifest.json has changed since it was written; prepare it again"
        )
    return manifest
