"""Data ready for training: answers split by person, merged into histograms, with one list of distinct profiles."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import secrets
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset

import cuma_ds
from cuma_ds.config import DataSection
from cuma_ds.data.splits import SPLITS, assign_splits
from cuma_ds.errors import DataError, nearest
from cuma_ds.profiles import ProfileTable, linearize
from cuma_ds.profiles.linearize import country_of
from cuma_ds.profiles.table import Encoder

FORMAT_VERSION = 1
TABLE_FILE = "profiles.safetensors"

_SCHEMAS = {
    "choice": pa.schema(
        {
            "profile": pa.int32(),
            "question_id": pa.string(),
            "question": pa.string(),
            "options": pa.list_(pa.string()),
            "counts": pa.list_(pa.int32()),
            "group": pa.string(),
        }
    ),
    "chat": pa.schema(
        {"profile": pa.int32(), "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})), "group": pa.string()}
    ),
}


@dataclass(frozen=True)
class Question:
    """A choice question; the order of its options is its scale."""

    question_id: str
    text: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class PreparedData:
    """Splits ``train``, ``test`` (other people, same countries) and ``heldout`` (countries or profiles never trained on).

    Attributes:
        manifest: format_version, source, kind (choice | chat), template, split settings, versions, hashes, and per split
            the number of examples, answers (before merging), people and profiles.
        splits: rows of kind choice hold profile, question_id, question, options, counts (answers per option), group (the
            country, or ""); of kind chat profile, messages, group.
        profiles: distinct profiles as ``{"sentence": str, "fields": dict}``; ``profile`` is a row of this list.
        root: the folder it was read from, None for data that is only in memory.
    """

    manifest: dict[str, Any]
    splits: dict[str, Dataset]
    profiles: list[dict[str, Any]]
    root: Path | None = None

    @property
    def kind(self) -> str:
        """``choice`` or ``chat``."""
        return self.manifest["kind"]

    @property
    def sentences(self) -> list[str]:
        """Profile sentences by profile index."""
        return [profile["sentence"] for profile in self.profiles]

    def profile_table(self, encoder: Encoder, cache_dir: str | Path | None = None) -> ProfileTable:
        """The embedded profiles: those in the prepared folder if this encoder made them, else built through the cache."""
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
                table = split.with_format(None).data.table.combine_chunks()
                with pa.OSFile(str(beside / f"{name}.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                    writer.write_table(table)
            lines = [json.dumps(profile, ensure_ascii=False) for profile in self.profiles]
            (beside / "profiles.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
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
        return dataclasses.replace(self, manifest=manifest, root=target)

    @classmethod
    def load(cls, folder: str | Path) -> PreparedData:
        """Read what :meth:`save` wrote; splits stay on disk and are memory-mapped.

        Raises:
            DataError: no prepared folder, another format version, or a missing or damaged file.
        """
        root = Path(folder)
        manifest = _read_manifest(root)
        for name in (*(f"{split}.arrow" for split in SPLITS), "profiles.jsonl"):
            if not (root / name).is_file():
                raise DataError(f"the prepared folder {root} is incomplete: {name} is missing; prepare it again")
            if sha256(root / name) != manifest["hashes"].get(name):
                raise DataError(f"the prepared folder {root} is damaged: {name} has changed since it was written; prepare it again")
        splits = {name: Dataset.from_file(str(root / f"{name}.arrow")) for name in SPLITS}
        with (root / "profiles.jsonl").open(encoding="utf-8") as lines:
            profiles = [json.loads(line) for line in lines]
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
        table = self.splits["train"].data.table.combine_chunks()
        counts = [np.asarray(row) for row in table["counts"].to_pylist()]
        rows = np.repeat(np.arange(len(counts)), [row.sum() for row in counts])
        one_hot = [np.eye(len(row), dtype=np.int32)[option] for row in counts for option in np.repeat(np.arange(len(row)), row)]
        place = table.schema.get_field_index("counts")
        table = table.take(pa.array(rows)).set_column(place, "counts", pa.array(one_hot, type=pa.list_(pa.int32())))
        return dataclasses.replace(self, splits={**self.splits, "train": Dataset(table)})


class ProfileList:
    """Collects distinct profiles in the order they come; equal sentences are one profile."""

    def __init__(self, template: str) -> None:
        self.template = template
        self.profiles: list[dict[str, Any]] = []
        self.groups: list[str] = []
        self._rows: dict[str, int] = {}

    def add(self, profile: dict[str, Any] | str) -> int:
        """The profile's row.

        Raises:
            DataError: nothing in the profile is usable.
        """
        sentence = linearize(profile, self.template)
        if sentence not in self._rows:
            self._rows[sentence] = len(self.profiles)
            self.profiles.append({"sentence": sentence, "fields": {} if isinstance(profile, str) else dict(profile)})
            self.groups.append(country_of(profile))
        return self._rows[sentence]


def prepare_choice(
    answers: pd.DataFrame, questions: Sequence[Question], profiles: ProfileList, config: DataSection, inputs: dict[str, str]
) -> PreparedData:
    """Split answers by person and merge equal questions of one profile into answer counts.

    Args:
        answers: one row per answer, integer columns person, profile, question (index into ``questions``), answer.
        questions: all questions.
        profiles: all profiles.
        config: split settings.
        inputs: what the answers were read from, name to version or sha256.

    Raises:
        DataError: no answers, or none left for training.
    """
    split_N = _split(answers, profiles, config)
    splits = {}
    for number, name in enumerate(SPLITS):
        part = answers[split_N == number]
        counts = part.groupby(["question", "profile", "answer"]).size().rename("count").reset_index()
        rows = counts.groupby(["question", "profile"], sort=True).ngroup().to_numpy()
        keys = counts.drop_duplicates(["question", "profile"])
        widest = max(len(question.options) for question in questions)
        histogram = np.zeros((len(keys), widest), np.int32)
        histogram[rows, counts["answer"].to_numpy()] = counts["count"].to_numpy()
        asked = [questions[index] for index in keys["question"]]
        columns = {
            "profile": keys["profile"].to_numpy(np.int32),
            "question_id": [question.question_id for question in asked],
            "question": [question.text for question in asked],
            "options": [list(question.options) for question in asked],
            "counts": [row[: len(question.options)] for row, question in zip(histogram, asked, strict=True)],
            "group": [profiles.groups[index] for index in keys["profile"]],
        }
        splits[name] = Dataset(pa.table(columns, schema=_SCHEMAS["choice"]))
    return _finish("choice", answers, split_N, splits, profiles, config, inputs)


def prepare_chat(
    rows: pd.DataFrame, conversations: list[list[dict[str, str]]], profiles: ProfileList, config: DataSection, inputs: dict[str, str]
) -> PreparedData:
    """Split conversations by person.

    Args:
        rows: one row per conversation, integer columns person and profile.
        conversations: messages of each row.
        profiles, config, inputs: as in :func:`prepare_choice`.
    """
    split_N = _split(rows, profiles, config)
    splits = {}
    for number, name in enumerate(SPLITS):
        chosen = np.flatnonzero(split_N == number)
        profile_M = rows["profile"].to_numpy(np.int32)[chosen]
        columns = {
            "profile": profile_M,
            "messages": [conversations[index] for index in chosen],
            "group": [profiles.groups[index] for index in profile_M],
        }
        splits[name] = Dataset(pa.table(columns, schema=_SCHEMAS["chat"]))
    return _finish("chat", rows, split_N, splits, profiles, config, inputs)


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


def _split(answers: pd.DataFrame, profiles: ProfileList, config: DataSection) -> np.ndarray:
    countries = sorted(set(profiles.groups) - {""})
    code = {country: index for index, country in enumerate(countries)}
    profile_N = answers["profile"].to_numpy()
    unit_N = np.array([code.get(group, -1) for group in profiles.groups])[profile_N] if countries else profile_N
    split_N = assign_splits(answers["person"].to_numpy(), unit_N, config.test_fraction, config.heldout_fraction, config.split_seed)
    if not (split_N == 0).any():
        people = answers["person"].nunique()
        raise DataError(
            f"nothing is left for training: {len(answers)} rows of {people} people with test_fraction {config.test_fraction} and "
            f"heldout_fraction {config.heldout_fraction}; give more people or hold out less"
        )
    return split_N


def _finish(
    kind: str,
    answers: pd.DataFrame,
    split_N: np.ndarray,
    splits: dict[str, Dataset],
    profiles: ProfileList,
    config: DataSection,
    inputs: dict[str, str],
) -> PreparedData:
    sizes = {}
    for number, name in enumerate(SPLITS):
        part = answers[split_N == number]
        sizes[name] = {
            "examples": len(splits[name]),
            "answers": len(part),
            "people": int(part["person"].nunique()),
            "profiles": int(part["profile"].nunique()),
        }
    manifest = {
        "format_version": FORMAT_VERSION,
        "source": config.source,
        "kind": kind,
        "template": profiles.template,
        "test_fraction": config.test_fraction,
        "heldout_fraction": config.heldout_fraction,
        "seed": config.split_seed,
        "questions": None if config.questions is None else list(config.questions),
        "versions": {"cuma_ds": cuma_ds.__version__, "python": platform.python_version(), "pyarrow": pa.__version__},
        "inputs": inputs,
        "hashes": {},
        "splits": sizes,
        "heldout_groups": sorted(set(splits["heldout"]["group"]) - {""}),
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
