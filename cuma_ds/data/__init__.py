"""Questions, conversations and who answered them: from sources to batches."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from cuma_ds.config import DataSection
from cuma_ds.data.prepared import PreparedData, is_prepared
from cuma_ds.data.sources.community_alignment import prepare_community_alignment
from cuma_ds.data.sources.jsonl import prepare_jsonl
from cuma_ds.data.sources.prism import prepare_prism
from cuma_ds.data.sources.records import Progress
from cuma_ds.data.sources.worldvaluesbench import prepare_worldvaluesbench
from cuma_ds.data.sources.wvs_sample import prepare_wvs_sample
from cuma_ds.errors import ConfigError, DataError

_DECIDED_WHEN_PREPARED = (
    "source",
    "questions",
    "weights",
    "test_fraction",
    "heldout_fraction",
    "heldout_profile_fraction",
    "split_seed",
)
_SOURCES = {
    "jsonl": prepare_jsonl,
    "wvb": prepare_worldvaluesbench,
    "community-alignment": prepare_community_alignment,
    "prism": prepare_prism,
}
_NEEDS = {
    "jsonl": "a .jsonl, .jsonl.gz or .parquet file, a folder of them, a datasets folder or a hub id",
    "wvb": "the benchmark's folder, or one with the WVS-7 CSV and the benchmark's three JSON files",
    "community-alignment": "the data set's CSV file or folder",
    "prism": "the folder with conversations.jsonl and survey.jsonl",
}

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
    if is_prepared(config.path):
        data = PreparedData.load(config.path).with_template(template)
        _check_recipe(data.manifest, config)
        if config.kind not in (None, data.kind):
            raise DataError(
                f"{config.path} was prepared as kind {data.kind}, but the recipe says data.kind: {config.kind}"
            )
    else:
        data = prepare(config, template)
    return data if config.histogram_targets else data.with_single_answers()


def _check_recipe(manifest: dict[str, Any], config: DataSection) -> None:
    """Refuse a prepared folder that was made with other settings than the recipe's."""
    asked = {
        **json.loads(config.model_dump_json(include=set(_DECIDED_WHEN_PREPARED))),
        "heldout_fraction": config.heldout,
    }
    if "split" not in manifest:
        warnings.warn(
            f"{config.path} was prepared by release 0.1.0, which split each kind of a source in its own way; it is used as it is, "
            "but prepare it again before one model learns from several kinds",
            stacklevel=3,
        )
        # The default of that release was 0.15 for every source.
        if config.heldout_fraction is None:
            del asked["heldout_fraction"]
    for key, value in asked.items():
        prepared_as = {"weights": False, **manifest}["seed" if key == "split_seed" else key]
        if prepared_as != value:
            raise DataError(
                f"{config.path} was prepared with {key} {prepared_as}, but the recipe says data.{key}: {value}; "
                "change the recipe or prepare the data again"
            )


def prepare(
    config: DataSection,
    template: str = "generic",
    spool: Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PreparedData:
    """Read a raw source; answers of one profile to one question are merged into counts.

    Args:
        config: source, path and split settings.
        template: how profile fields become a sentence.
        spool: folder for large intermediate files; in memory without one.
        workers: processes that read; by the size of the input if None.
        progress: told (done, in all).

    Raises:
        DataError: raw files that are missing or wrong; one line.
        ConfigError: a source that needs a path and has none.
    """
    if config.source == "wvs-sample":
        if config.path is not None:
            raise DataError(
                f"{config.path} is no prepared folder: there is no manifest.json; make it with launchers/prepare_data.py wvs-sample"
            )
        return prepare_wvs_sample(config, template)
    if config.path is None:
        raise ConfigError(
            f"data.path is missing; source {config.source} needs {_NEEDS[config.source]}, or a prepared folder"
        )
    return _SOURCES[config.source](config.path, config, template, spool, workers, progress)
