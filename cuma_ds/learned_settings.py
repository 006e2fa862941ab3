"""Which settings of a recipe decide what is learned, and what they were in release 0.1.0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel

from cuma_ds.config import CHANGED_SINCE_0_1_0, NEW_SINCE_0_1_0, RunConfig
from cuma_ds.identity import content_sha256

# What may change between two starts of one run without changing what is learned (or, for steps, how far).
_FREE_SECTIONS = {"run", "parallel", "checkpoint", "telemetry", "evaluation"}
_FREE_KEYS = {
    ("training", "steps"),
    ("training", "epochs"),
    ("training", "micro_batch_size"),
    ("training", "on_nonfinite"),
    ("model", "attention"),
    ("model", "gradient_checkpointing"),
    ("data", "packing"),
    ("profiles", "batch_size"),
    ("profiles", "cache_dir"),
    *(("rollout", key) for key in ("batch_size", "backbone", "keep")),
    *(("judge", key) for key in ("url", "key_variable", "concurrency", "timeout", "retries")),
}
_PATHS = {
    ("model", "path"),
    ("model", "init_from"),
    ("profiles", "encoder"),
    *(("data", key) for key in ("path", "map", "probe")),
}


class Difference(NamedTuple):
    """A setting that is not what the run was started with."""

    key: str
    started: object
    now: object


def with_started_defaults(config: RunConfig, started: RunConfig) -> RunConfig:
    """The recipe of a run that may have been started by an earlier release.

    Where a default has changed since and the recipe does not name the key, the run keeps the value it was started with.
    """
    sections: dict[str, BaseModel] = {}
    for (section, key), released in (NEW_SINCE_0_1_0 | CHANGED_SINCE_0_1_0).items():
        now = sections.get(section, getattr(config, section))
        if key not in now.model_fields_set and getattr(getattr(started, section), key) == released:
            sections[section] = now.model_copy(update={key: released})
    return config.model_copy(update=sections)


def learned_settings(config: RunConfig, names: bool = False) -> dict[str, object]:
    """The settings that decide what is learned, by ``section.key``.

    Keys that release 0.1.0 did not have are left out where their value is what it did. Its checkpoints are recognised
    by that.

    Args:
        config: the recipe.
        names: with the names of the folders of model, encoder and data, as in release 0.1.0. Today a run holds hashes
            of their content, so folders may be renamed.
    """
    flat: dict[str, object] = {"run.seed": config.run.seed}
    for section, values in json.loads(config.model_dump_json()).items():
        if section in _FREE_SECTIONS or values is None:
            continue
        for key, value in values.items():
            place = (section, key)
            as_released = place in NEW_SINCE_0_1_0 and NEW_SINCE_0_1_0[place] == value
            if place in _FREE_KEYS or as_released or (place in _PATHS and not names):
                continue
            flat[f"{section}.{key}"] = Path(value).name if place in _PATHS and value else value
    flat["data.heldout_fraction"] = config.data.heldout
    if config.model.init_from is not None:  # what is there, a run knows by its hash
        flat["model.init_from"] = "a trained model"
    return flat


def first_difference(started: RunConfig, now: RunConfig, names: bool = False) -> Difference | None:
    """The first setting that decides what is learned and has changed; None where there is none (``names`` as above)."""
    before, after = learned_settings(started, names), learned_settings(now, names)
    for key in before | after:
        section, _, name = key.partition(".")
        # A key that is left out has the value that says what release 0.1.0 did.
        pair = [settings.get(key, NEW_SINCE_0_1_0.get((section, name))) for settings in (before, after)]
        if pair[0] != pair[1]:
            return Difference(key, *pair)
    return None


def fingerprint(config: RunConfig, names: bool = False) -> str:
    """SHA-256 of :func:`learned_settings`."""
    return content_sha256(learned_settings(config, names))
