"""The prepared folder: answers split by person, merged into histograms, with one list of distinct profiles."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from cuma_ds.data.raw import Profile
from cuma_ds.data.rows import ArrowFile, Split, single_answers
from cuma_ds.data.splits import PROBE, SPLITS
from cuma_ds.errors import ConfigError, DataError, nearest
from cuma_ds.files import atomic_folder, is_plain_name
from cuma_ds.identity import SEAL, file_sha256, seal_holds, sealed
from cuma_ds.profiles import ProfileEncoder, ProfileTable, Wording, linearize
from cuma_ds.profiles.embedding import Encoder
from cuma_ds.profiles.linearize import country_of, value_of

FORMAT_VERSION = 2
TABLE_FILE = "profiles.safetensors"


@dataclass(frozen=True)
class PreparedData:
    """Splits ``train``, ``test`` (other people, same countries), ``heldout`` (countries never trained on; profiles
    where there is no country), and where asked for ``heldout_profiles`` and ``heldout_questions`` (everybody's
    answers to questions never trained on) and, where the source names such people, ``valid``.

    Attributes:
        manifest: format_version, source, kind (choice | chat | preference), how profiles are worded (template, format,
            fields), split settings, what was drawn of the training split, versions, hashes, and per split the number
            of examples, answers (before merging), people and profiles. Without texts, also the names of the fields.
        splits: rows by split, see :class:`~cuma_ds.data.rows.Split`.
        profiles: distinct profiles as ``{"sentence": str, "fields": dict}``; ``profile`` is a row of this list.
        root: the folder it was read from, None for data that is only in memory.
    """

    manifest: dict[str, Any]
    splits: dict[str, Split]
    profiles: list[Profile]
    root: Path | None = None

    @property
    def kind(self) -> str:
        """``choice``, ``chat`` or ``preference``."""
        return self.manifest["kind"]

    @property
    def evaluation_splits(self) -> list[str]:
        """Splits to judge a model on: all but ``train`` and ``valid``, in order, where there are rows."""
        return [name for name in (*SPLITS, PROBE) if name not in ("train", "valid") and len(self.splits.get(name, ()))]

    @property
    def keeps_text(self) -> bool:
        """Whether profiles are there as they were read; false for what :meth:`without_texts` made."""
        return "profile_fields" not in self.manifest

    @property
    def field_names(self) -> list[str]:
        """Names of the fields that profiles have, or had."""
        if not self.keeps_text:
            return self.manifest["profile_fields"]
        return list(dict.fromkeys(name for profile in self.profiles for name in profile["fields"]))

    @cached_property
    def sentences(self) -> list[str]:
        """Profile sentences by profile index."""
        return [profile["sentence"] for profile in self.profiles]

    def profile_table(
        self,
        encoder: Encoder,
        cache_dir: str | Path | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> ProfileTable:
        """The embedded profiles: those in the prepared folder if this encoder made them, else built through the cache.

        Args:
            encoder, cache_dir, progress: as in :meth:`ProfileTable.build`.

        Raises:
            DataError: as :meth:`stored_table`.
        """
        table = self.stored_table(encoder)
        return ProfileTable.build(self.sentences, encoder, cache_dir, progress) if table is None else table

    def stored_table(self, encoder: Encoder) -> ProfileTable | None:
        """The embedded profiles in the prepared folder if this encoder made them, else None.

        Raises:
            DataError: sentences that the encoder cannot tell apart, because it does not read them to their end;
                no texts.
        """
        self._check_text()
        if isinstance(encoder, ProfileEncoder):
            encoder.check_lengths(self.sentences)
        stored = self.root / TABLE_FILE if self.root else None
        if stored is not None and stored.is_file():
            table = ProfileTable.load(stored)
            if table.fingerprint == encoder.fingerprint and table.sentences == self.sentences:
                return table
        return None

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
                hashes = {file.name: file_sha256(file) for file in sorted(beside.iterdir())}
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
            if file_sha256(root / name) != manifest["hashes"].get(name):
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
            name: Split(manifest["kind"], ArrowFile.open_rows(root / f"{name}.arrow"), questions, groups)
            for name in manifest["splits"]
        }
        return cls(manifest, splits, profiles, root)

    def with_wording(self, wording: Wording) -> PreparedData:
        """The same data with sentences written in another way; profiles given as text stay as they are.

        Profiles that the wording makes equal stay apart: reports still know their other fields. Rows of profiles
        without any field that the wording reads are left out and counted.

        Raises:
            ConfigError: the wording names a field that no profile has.
            DataError: nothing is left for training, or the data has no texts.
        """
        self._check_text()
        asked = _written(wording)
        if {key: self.manifest.get(key) for key in ("template", "format", "fields")} == asked:
            return self
        self._check_fields(wording)
        profiles, unknown = [], []
        for row, profile in enumerate(self.profiles):
            try:
                sentence = linearize(profile["fields"] or profile["sentence"], wording)
            except DataError:
                unknown.append(row)
                sentence = profile["sentence"]
            profiles.append(Profile(sentence=sentence, fields=profile["fields"]))
        given = {key: value for key, value in asked.items() if value is not None}
        manifest = {key: value for key, value in self.manifest.items() if key not in asked} | given
        data = dataclasses.replace(self, manifest=manifest, profiles=profiles)
        return data._without_profiles(unknown) if unknown else data

    def _check_text(self) -> None:
        if not self.keeps_text:
            raise DataError(
                f"{self.root} is the data of a run with profiles.keep_text: false, which has no profiles to read; "
                "use the data it was made from"
            )

    def without_texts(self) -> PreparedData:
        """The same data with numbers for profiles and countries: ``profile 7`` instead of a sentence, ``group 2``
        instead of a country, and no other field. Numbers follow the order in which the data has them.
        """
        countries = [country_of(profile["fields"]) for profile in self.profiles]
        number = {country: place for place, country in enumerate(dict.fromkeys(filter(None, countries)), start=1)}
        profiles = [
            Profile(sentence=f"profile {row}", fields={"country": f"group {number[country]}"} if country else {})
            for row, country in enumerate(countries)
        ]
        held = [f"group {number[name]}" for name in self.manifest["heldout_groups"] if name in number]
        manifest = {**self.manifest, "profile_fields": self.field_names, "heldout_groups": held}
        return dataclasses.replace(self, manifest=manifest, profiles=profiles)

    def _check_fields(self, wording: Wording) -> None:
        """Refuse a wording that names a field which no profile has."""
        known = dict.fromkeys(name for profile in self.profiles for name in profile["fields"])
        for field in wording.named:
            if not any(value_of(profile["fields"], field) for profile in self.profiles):
                key = "profiles.fields" if field in (wording.fields or ()) else "profiles.format"
                raise ConfigError(
                    f"{key}: no profile has the field {field!r}{nearest(field, known)}; "
                    f"they have {', '.join(known) or 'none, but sentences'}"
                )

    def _without_profiles(self, unknown: Sequence[int]) -> PreparedData:
        """The data without the rows of some profiles."""
        kept = {
            name: split.select(np.flatnonzero(~np.isin(split.numbers("profile"), unknown)))
            for name, split in self.splits.items()
        }
        left_out = sum(len(split) - len(kept[name]) for name, split in self.splits.items())
        if not len(kept["train"]):
            raise DataError("nothing is left for training: no profile has an answer to the fields that are asked for")
        skipped = {**self.manifest.get("skipped", {}), "rows of profiles without the fields that are read": left_out}
        return self.with_splits(kept, {"skipped": skipped})

    def with_splits(self, splits: Mapping[str, Split], facts: Mapping[str, object]) -> PreparedData:
        """The same data with other rows in some splits, and with ``facts`` in the manifest."""
        sizes = {name: dict(size) for name, size in self.manifest["splits"].items()}
        for name, split in splits.items():
            sizes[name] |= split.sizes()
        manifest = {**self.manifest, "splits": sizes, **facts}
        return dataclasses.replace(self, manifest=manifest, splits={**self.splits, **splits})

    def with_single_answers(self) -> PreparedData:
        """The same data with one row per answer (one-hot counts) in ``train``; the other splits stay merged.

        Raises:
            DataError: the data are distributions.
        """
        if self.kind != "choice":
            return self
        if self.splits["train"].distributions:
            raise DataError("data.histogram_targets is false, but distributions are of no single answers; leave it out")
        return dataclasses.replace(self, splits={**self.splits, "train": single_answers(self.splits["train"])})


def _written(wording: Wording) -> dict[str, object]:
    """A wording as a manifest holds it."""
    fields = None if wording.fields is None else list(wording.fields)
    return {"template": wording.template, "format": wording.format, "fields": fields}


def is_prepared(place: str | Path | None) -> TypeGuard[str | Path]:
    """Whether there is a prepared folder."""
    return place is not None and (Path(place) / "manifest.json").is_file()


def _is_shaped(manifest: dict[str, Any]) -> bool:
    wanted = {"splits": dict, "hashes": dict, "kind": str, "heldout_groups": list, "profile_fields": list}
    return all(isinstance(manifest[key], kind) for key, kind in wanted.items() if key in manifest)


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
    if not isinstance(manifest, dict) or "format_version" not in manifest or not _is_shaped(manifest):
        raise DataError(f"{file} is not the manifest of a prepared folder; prepare it again")
    if manifest["format_version"] != FORMAT_VERSION:
        raise DataError(
            f"{file} has format_version {manifest['format_version']}; this version reads {FORMAT_VERSION}; "
            "prepare it again"
        )
    if not all(map(is_plain_name, manifest.get("splits", ()))):
        raise DataError(f"{file} names a split that is no file of its folder; prepare it again")
    if SEAL in manifest and not seal_holds(manifest):
        raise DataError(
            f"the prepared folder {root} is damaged: manifest.json has changed since it was written; prepare it again"
        )
    return manifest
