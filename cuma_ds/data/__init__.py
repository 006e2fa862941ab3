"""Questions, conversations and who answered them: from sources to batches."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from cuma_ds.config import DataSection
from cuma_ds.data.build import MADE_BY, build
from cuma_ds.data.pairs import ASKED_BY
from cuma_ds.data.prepared import PreparedData, is_prepared
from cuma_ds.data.raw import Progress, ReadOptions
from cuma_ds.data.sampling import Limits, sample
from cuma_ds.data.sources import SOURCES
from cuma_ds.data.splits import PROBE
from cuma_ds.errors import ConfigError, DataError
from cuma_ds.profiles import Wording

_DECIDED_WHEN_PREPARED = (
    "source",
    "questions",
    "weights",
    "test_fraction",
    "valid_fraction",
    "heldout_fraction",
    "heldout_profile_fraction",
    "heldout_question_fraction",
    "split_seed",
)
# What a source counts.
_COUNTED = {"choice": "answers", "chat": "conversations", "preference": "pairs"}
__all__ = ["PreparedData", "load_data", "prepare"]


def load_data(
    config: DataSection, wording: Wording | str = "generic", progress: Progress | None = None
) -> PreparedData:
    """The data a recipe asks for, from a prepared folder or straight from its source.

    Args:
        config: the data section; with ``histogram_targets: false`` each training answer is a row of its own.
        wording: how profile fields become a sentence (a template's name stands for it); a prepared folder with another
            one is rewritten in memory.
        progress: told (done, in all) while a source is read.

    Raises:
        DataError: unreadable data, a prepared folder that was split differently from what the recipe says, or fewer
            people or answers than the recipe draws.
        ConfigError: source jsonl without a path, or a field that no profile has.
    """
    wording = Wording(wording) if isinstance(wording, str) else wording
    if is_prepared(config.path):
        data = PreparedData.load(config.path)
        _check_recipe(data.manifest, config)
        if config.kind not in (None, data.kind):
            raise DataError(
                f"{config.path} was prepared as kind {data.kind}, but the recipe says data.kind: {config.kind}"
            )
    else:
        data = prepare(config, wording.template, progress=progress)
    _check_labels(data, config)
    data = _drawn(data.with_wording(wording), config)
    return data if config.histogram_targets else data.with_single_answers()


def _drawn(data: PreparedData, config: DataSection) -> PreparedData:
    """The data with the part of its training split that the recipe draws."""
    limits = Limits(config.max_people, config.max_examples, config.sample_seed)
    if limits.people is None and limits.examples is None:
        return data
    drawn = sample(data.splits["train"], limits)
    for key, asked, count, what in (
        ("max_people", limits.people, drawn.of_people, "people are there to learn from"),
        ("max_examples", limits.examples, drawn.answers, f"{_COUNTED[data.kind]} of theirs are there to learn from"),
    ):
        if asked is not None and asked > count:
            raise DataError(
                f"data.{key} is {asked}, but only {count} {what}; lower it, or leave it out to take all of them"
            )
    facts = {"max_people": limits.people, "max_examples": limits.examples, "sample_seed": limits.seed}
    return data.with_splits({"train": drawn.split}, facts)


def _check_labels(data: PreparedData, config: DataSection) -> None:
    """Refuse a prompt style that needs short labels where questions have none."""
    if config.prompt_style == "codebook" and data.kind == "choice" and not data.splits["train"].labelled:
        again = "; prepare it again, release 0.1.0 did not keep them" if data.manifest["source"] == "wvb" else ""
        raise DataError(
            "data.prompt_style is codebook, but the questions of this data have no short labels; only those of wvb "
            f"have{again}, or use letters or metadata"
        )


def _check_recipe(manifest: dict[str, Any], config: DataSection) -> None:
    """Refuse a prepared folder that was made with other settings than the recipe's."""
    asked = {
        **json.loads(config.model_dump_json(include=set(_DECIDED_WHEN_PREPARED))),
        "heldout_fraction": config.heldout,
    }
    if "split" not in manifest:
        warnings.warn(
            f"{config.path} was prepared by release 0.1.0, which split each kind of a source in its own way; "
            "it is used as it is, "
            "but prepare it again before one model learns from several kinds",
            stacklevel=3,
        )
        # The default of that release was 0.15 for every source.
        if config.heldout_fraction is None:
            del asked["heldout_fraction"]
    asked |= {key: getattr(config, key) for key in (*ASKED_BY, *MADE_BY) if key in manifest}
    if manifest["kind"] == "preference":
        asked["min_margin"] = config.min_margin
    if config.probe is not None and PROBE not in manifest["splits"]:
        raise DataError(
            f"{config.path} was prepared without a probe, but the recipe says data.probe: {config.probe}; "
            "change the recipe or prepare the data again"
        )
    # What release 0.1.0 did not write.
    released = {"weights": False, "min_margin": 0.0, "valid_fraction": 0.0, "heldout_question_fraction": 0.0}
    for key, value in asked.items():
        prepared_as = {**released, **manifest}["seed" if key == "split_seed" else key]
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
    source = SOURCES[config.source]
    if source.needs is None and config.path is not None:
        raise DataError(
            f"{config.path} is no prepared folder: there is no manifest.json; "
            f"make it with launchers/prepare_data.py {config.source}"
        )
    if source.needs is not None and config.path is None:
        raise ConfigError(f"data.path is missing; source {config.source} needs {source.needs}, or a prepared folder")
    return build(source.read(config.path or "", ReadOptions(config, template, spool, workers, progress)), config, spool)
