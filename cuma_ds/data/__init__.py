"""Questions, conversations and who answered them: from sources to batches."""

from __future__ import annotations

import json
from pathlib import Path

from cuma_ds.config import DataSection
from cuma_ds.data.prepared import PreparedData
from cuma_ds.data.sources.jsonl import prepare_jsonl
from cuma_ds.data.sources.wvs_sample import prepare_wvs_sample
from cuma_ds.errors import ConfigError, DataError

_DECIDED_WHEN_PREPARED = ("source", "questions", "test_fraction", "heldout_fraction", "split_seed")

__all__ = ["PreparedData", "load_data", "prepare"]


def load_data(config: DataSection, template: str = "generic") -> PreparedData:
    """The data a recipe asks for, from a prepared folder or straight from its source.

    Args:
        config: the data section; with ``histogram_targets: false`` each training answer is a row of its own.
        template: how profile fields become a sentence; a prepared folder of another template is rewritten in memory.

    Raises:
        DataError: unreadable data, or a prepared folder that was split differently from what the recipe says.
        ConfigError: source jsonl without a path.
    """
    if config.path is not None and (Path(config.path) / "manifest.json").is_file():
        data = PreparedData.load(config.path).with_template(template)
        prepared_as = {key: data.manifest["seed" if key == "split_seed" else key] for key in _DECIDED_WHEN_PREPARED}
        for key, value in json.loads(config.model_dump_json(include=set(_DECIDED_WHEN_PREPARED))).items():
            if prepared_as[key] != value:
                raise DataError(
                    f"{config.path} was prepared with {key} {prepared_as[key]}, but the recipe says data.{key}: {value}; "
                    "change the recipe or prepare the data again"
                )
    else:
        data = prepare(config, template)
    return data if config.histogram_targets else data.with_single_answers()


def prepare(config: DataSection, template: str = "generic") -> PreparedData:
    """Read a raw source; answers of one profile to one question are merged into counts."""
    if config.source == "jsonl":
        if config.path is None:
            raise ConfigError("data.path is missing; source jsonl needs a .jsonl or .jsonl.gz file, or a prepared folder")
        return prepare_jsonl(config.path, config, template)
    if config.path is not None:
        raise DataError(
            f"{config.path} is no prepared folder: there is no manifest.json; make it with launchers/prepare_data.py wvs-sample"
        )
    return prepare_wvs_sample(config, template)
