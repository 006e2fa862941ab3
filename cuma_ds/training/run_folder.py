"""The folder of one run: opened for a new run, or for resuming the same one; never emptied."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from cuma_ds.config import CHANGED_SINCE_0_1_0, NEW_SINCE_0_1_0, RunConfig, load_config
from cuma_ds.errors import CheckpointError, ConfigError

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
        started = load_config(recipe)
    except ConfigError:
        return config  # open_run_folder refuses it
    sections: dict[str, Any] = {}
    for (section, key), released in (NEW_SINCE_0_1_0 | CHANGED_SINCE_0_1_0).items():
        before, now = getattr(started, section), sections.get(section, getattr(config, section))
        value = getattr(before, key) if key in before.model_fields_set else released
        if key not in now.model_fields_set and value == released:
            sections[section] = now.model_copy(update={key: value})
    return config.model_copy(update=sections)


def learned_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that decide what is learned, flat; folders by their name alone, so that a run can move.

    Keys that release 0.1.0 did not have are left out where they say what it did, so that its checkpoints are still recognised.
    """
    flat: dict[str, Any] = {"run.seed": config.run.seed}
    for section, values in json.loads(config.model_dump_json()).items():
        if section in _FREE_SECTIONS:
            continue
        for key, value in values.items():
            if (section, key) in _FREE_KEYS or _is_as_released(section, key, value):
                continue
            flat[f"{section}.{key}"] = Path(value).name if (section, key) in _PATHS and value else value
    flat["data.heldout_fraction"] = config.data.heldout
    return flat


def _is_as_released(section: str, key: str, value: Any) -> bool:
    return (section, key) in NEW_SINCE_0_1_0 and NEW_SINCE_0_1_0[section, key] == value


def fingerprint(config: RunConfig) -> str:
    """SHA-256 of :func:`learned_settings`."""
    return hashlib.sha256(json.dumps(learned_settings(config), sort_keys=True).encode()).hexdigest()


def open_run_folder(config: RunConfig) -> Path:
    """Create the run folder, or check that the one there belongs to this configuration. Rank 0 calls it.

    Raises:
        ConfigError: the folder holds a run of another configuration; names the first setting that differs.
        CheckpointError: the folder holds something else, or cannot be written.
    """
    folder = config.run_dir
    recipe = folder / "config.yaml"
    if recipe.is_file():
        try:
            before, now = learned_settings(load_config(recipe)), learned_settings(config)
        except ConfigError as error:
            raise CheckpointError(f"{folder} holds a run whose recipe cannot be read ({error}); choose another run.name") from None
        for key, value in now.items():
            if before.get(key) != value:
                raise ConfigError(
                    f"{folder} holds a run with {key}: {before.get(key)}, but this recipe says {value}; "
                    "choose another run.name, or restore the recipe to resume"
                )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is no run folder (it has no config.yaml); choose another run.name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        (folder / ".config.yaml").replace(recipe)
    except OSError as error:
        raise CheckpointError(f"cannot write the run folder {folder}: {error.strerror}") from None
    return folder
