"""The folder of one run: opened for a new run, or for resuming the same one; never emptied."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cuma_ds.config import CHANGED_SINCE_0_1_0, NEW_SINCE_0_1_0, DataSection, RunConfig, load_started
from cuma_ds.data.prepared import PreparedData, read_manifest
from cuma_ds.data.sources.files import find_input
from cuma_ds.errors import CheckpointError, ConfigError, DataError
from cuma_ds.identity import IDENTITY_FILE, changed_part, content_sha256, file_sha256, read_identity, sealed
from cuma_ds.parallel.backbone import backbone_fingerprint
from cuma_ds.parallel.stored import find_checkpoint, read_adapters, read_state
from cuma_ds.profiles import ProfileEncoder, ProfileTable

# What may change between two starts of one run without changing what is learned (or, for steps, how far).
_FREE_SECTIONS = {"run", "parallel", "checkpoint", "telemetry", "evaluation"}
_FREE_KEYS = {
    ("training", "steps"),
    ("training", "micro_batch_size"),
    ("model", "attention"),
    ("model", "gradient_checkpointing"),
    ("data", "packing"),
    ("profiles", "batch_size"),
    ("profiles", "cache_dir"),
}
_PATHS = {("model", "path"), ("profiles", "encoder"), ("data", "path")}
# What a run keeps of its data and its embedded profiles.
DATA_FOLDER, TABLE_FILE = "data", "profiles.safetensors"


def as_started(config: RunConfig) -> RunConfig:
    """The recipe of a run that may have been started by an earlier release.

    Where a default has changed since, and the recipe does not name the key, a run goes on with the value it was started with.

    Args:
        config: the recipe as read.

    Returns:
        The recipe with those values filled in; ``config`` itself for a new run.
    """
    recipe = config.run_dir / "config.yaml"
    if not recipe.is_file():
        return config
    try:
        started = load_started(recipe)
    except ConfigError:
        return config  # open_run_folder refuses it
    sections: dict[str, Any] = {}
    for (section, key), released in (NEW_SINCE_0_1_0 | CHANGED_SINCE_0_1_0).items():
        now = sections.get(section, getattr(config, section))
        if key not in now.model_fields_set and getattr(getattr(started, section), key) == released:
            sections[section] = now.model_copy(update={key: released})
    return config.model_copy(update=sections)


def learned_settings(config: RunConfig, names: bool = False) -> dict[str, Any]:
    """The settings that decide what is learned, flat.

    Keys that release 0.1.0 did not have are left out where they say what it did, so that its checkpoints are still recognised.

    Args:
        names: with the names of the folders of model, encoder and data, which were all that release 0.1.0 knew of them. Today a run
            holds hashes of their content, so folders may move and be renamed.
    """
    flat: dict[str, Any] = {"run.seed": config.run.seed}
    for section, values in json.loads(config.model_dump_json()).items():
        if section in _FREE_SECTIONS:
            continue
        for key, value in values.items():
            if (
                (section, key) in _FREE_KEYS
                or _is_as_released(section, key, value)
                or ((section, key) in _PATHS and not names)
            ):
                continue
            flat[f"{section}.{key}"] = Path(value).name if (section, key) in _PATHS and value else value
    flat["data.heldout_fraction"] = config.data.heldout
    return flat


def _is_as_released(section: str, key: str, value: Any) -> bool:
    return (section, key) in NEW_SINCE_0_1_0 and NEW_SINCE_0_1_0[section, key] == value


def fingerprint(config: RunConfig, names: bool = False) -> str:
    """SHA-256 of :func:`learned_settings`."""
    return content_sha256(learned_settings(config, names))


def known_fingerprints(config: RunConfig) -> set[str]:
    """Fingerprints of the checkpoints this run may go on from: its own, and those that release 0.1.0 gave it."""
    return {fingerprint(config), read_identity(config.run_dir).get("fingerprint_0_1_0", "")} - {""}


def open_run_folder(config: RunConfig) -> Path:
    """Create the run folder, or check that the one there belongs to this configuration. Rank 0 calls it.

    Raises:
        ConfigError: the folder holds a run of another configuration; names the first setting that differs.
        CheckpointError: the folder holds something else, cannot be written, or was started with another model, encoder or data.
    """
    folder = config.run_dir
    recipe = folder / "config.yaml"
    if recipe.is_file():
        identity = read_identity(folder)
        try:
            before, now = (learned_settings(one, names=not identity) for one in (load_started(recipe), config))
        except ConfigError as error:
            raise CheckpointError(
                f"{folder} holds a run whose recipe cannot be read ({error}); choose another run.name"
            ) from None
        for key in before | now:
            section, _, name = key.partition(".")
            # What is left out says what release 0.1.0 did.
            started, value = (settings.get(key, NEW_SINCE_0_1_0.get((section, name))) for settings in (before, now))
            if started != value:
                raise ConfigError(
                    f"{folder} holds a run with {key}: {started}, but this recipe says {value}; "
                    "choose another run.name, or restore the recipe to resume"
                )
        _check_started_with(config, identity)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is no run folder (it has no config.yaml); choose another run.name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        (folder / ".config.yaml").replace(recipe)
    except OSError as error:
        raise CheckpointError(f"cannot write the run folder {folder}: {error.strerror}") from None
    return folder


def record_identity(config: RunConfig, data: PreparedData, table: ProfileTable | None) -> None:
    """Write down what the run was started with, unless it stands there. Rank 0 calls it.

    A run that release 0.1.0 started is taken up as it is found; a warning says so once.

    Args:
        data, table: of the run folder.
    """
    folder = config.run_dir
    identity = read_identity(folder)
    if identity:
        return
    identity = {
        "backbone": backbone_fingerprint(config.model),
        "encoder": None if table is None else table.fingerprint,
        "source": source_hashes(config.data) if _is_prepared(config.data) else data.manifest["inputs"],
        "data": content_sha256(data.manifest["hashes"]),
        "profiles": None if table is None else table.sha256,
    }
    if any((folder / "checkpoints").glob("step-*")):
        identity["fingerprint_0_1_0"] = fingerprint(config, names=True)
        warnings.warn(
            f"{folder} was started by release 0.1.0, which wrote no hashes: model, encoder and data are taken as they are now and "
            "checked from here on",
            stacklevel=2,
        )
    text = json.dumps(sealed(identity), indent=2, ensure_ascii=False) + "\n"
    (folder / f".{IDENTITY_FILE}").write_text(text, encoding="utf-8")
    (folder / f".{IDENTITY_FILE}").replace(folder / IDENTITY_FILE)


def check_backbone(config: RunConfig, identity: Mapping[str, Any]) -> None:
    """Raise a CheckpointError if ``model.path`` holds another model than a run was trained on.

    Args:
        identity: of the run or a checkpoint; nothing is checked where it names no backbone.
    """
    known = identity.get("backbone")
    change = known and changed_part(config.model.path, known, backbone_fingerprint(config.model))
    if change:
        raise CheckpointError(
            f"model.path: {change} than {config.run_dir} was trained with; restore the folder, or start a run of another run.name"
        )


@dataclass(frozen=True)
class TrainedRun:
    """What a run folder holds: one checkpoint, and the data and embedded profiles behind it.

    checkpoint: its folder.  adapters: its tensors, see :func:`~cuma_ds.parallel.stored.read_adapters`.  identity: fingerprints it
    was trained with, empty in checkpoints of release 0.1.0.  table: None for methods without profiles.
    """

    checkpoint: Path
    adapters: dict[str, Tensor]
    identity: dict[str, Any]
    data: PreparedData
    table: ProfileTable | None


def open_trained(run_dir: Path, config: RunConfig, step: int | None = None) -> TrainedRun:
    """Read one checkpoint of a run with its data and profiles, and check that all of them and the backbone are as in training.

    Args:
        config: the recipe of the run; its ``model.path`` is the backbone that will be used.
        step: which checkpoint; the newest by default.

    Raises:
        CumaError: something is missing, damaged, or not what the run was trained with; one line says what.
    """
    checkpoint = find_checkpoint(run_dir / "checkpoints", step)
    state = read_state(checkpoint)
    identity = state.get("identity") or read_identity(run_dir)
    data = PreparedData.load(run_dir / DATA_FOLDER)
    table = ProfileTable.load(run_dir / TABLE_FILE) if config.adapters.uses_profiles else None
    if table is not None and table.sentences != data.sentences:
        raise DataError(
            f"{run_dir}: {TABLE_FILE} and data/ hold different profiles; this run folder was put together from two runs"
        )
    check_own_data(run_dir, data, table, identity)
    check_backbone(config, identity)
    return TrainedRun(checkpoint, read_adapters(checkpoint, state), identity, data, table)


def check_own_data(run_dir: Path, data: PreparedData, table: ProfileTable | None, identity: Mapping[str, Any]) -> None:
    """Raise a DataError if data and profiles in a run folder are not those of its identity."""
    for name, now in (
        (f"{DATA_FOLDER}/", content_sha256(data.manifest["hashes"])),
        (TABLE_FILE, None if table is None else table.sha256),
    ):
        known = identity.get("data" if name == f"{DATA_FOLDER}/" else "profiles")
        if known is not None and now is not None and known != now:
            raise DataError(
                f"{run_dir}: {name} is not what this run was trained with; restore it from a copy of the run folder"
            )


def source_hashes(data: DataSection, known: Iterable[str] = ()) -> dict[str, str]:
    """sha256 of each file that ``data.path`` names now, by its name; empty where nothing is there, or a hub id is named.

    Args:
        data: the recipe's data section. Of a prepared folder these are the hashes its manifest holds.
        known: names of a benchmark's files to look for; rows of your own are found by themselves.
    """
    if data.path is None or not Path(data.path).exists():
        return {}
    place = Path(data.path)
    if _is_prepared(data):
        return dict(read_manifest(place)["hashes"])
    if data.source == "jsonl":
        return find_input(place).identity
    files = [place] if place.is_file() else [file for file in sorted(place.rglob("*")) if file.is_file()]
    return {file.name: file_sha256(file) for file in files if file.name in known}


def _is_prepared(data: DataSection) -> bool:
    return data.path is not None and (Path(data.path) / "manifest.json").is_file()


def _check_started_with(config: RunConfig, identity: Mapping[str, Any]) -> None:
    """Whether model, encoder and data still are what the run was started with.

    Encoder and data are not needed any more, so where they are gone a warning is enough. Of a run of release 0.1.0 only the hashes of
    raw files are known.
    """
    folder, encoder, data = config.run_dir, config.profiles.encoder, config.data
    check_backbone(config, identity)
    known = identity.get("encoder")
    there = encoder is not None and known is not None and not _is_gone("profiles.encoder", encoder, folder)
    if there and Path(str(encoder)).expanduser().is_dir() and ProfileEncoder(str(encoder)).fingerprint != known:
        raise CheckpointError(
            f"profiles.encoder: {encoder} is another encoder than {folder} was started with; restore it, or choose another run.name"
        )
    known = identity.get("source")
    if known is None and not _is_prepared(data) and (folder / DATA_FOLDER / "manifest.json").is_file():
        known = read_manifest(folder / DATA_FOLDER)["inputs"]
    if not known or data.path is None or _is_gone("data.path", data.path, folder):
        return
    now = source_hashes(data, known)
    changed = sorted(name for name in (known.keys() | now.keys() if now else ()) if known.get(name) != now.get(name))
    if changed:
        what = "is new" if changed[0] not in known else "is missing" if changed[0] not in now else "has changed"
        raise CheckpointError(
            f"data.path: {changed[0]} in {data.path} {what} since {folder} was started, and the run keeps the data it was "
            "started with; restore it to resume, or choose another run.name to train on the data as it is now"
        )


def _is_gone(key: str, place: str, folder: Path) -> bool:
    """Whether a place on this machine no longer is there; a warning says so. Hub ids are never gone."""
    gone = not Path(place).expanduser().exists() and (place.count("/") != 1 or place.startswith((".", "/", "~")))
    if gone:
        warnings.warn(
            f"{key}: there is nothing at {place} any more; {folder} goes on with what it was started with", stacklevel=2
        )
    return gone
