"""A user's own answers, conversations or preferences: JSON lines, parquet, a ``datasets`` folder or a hub id."""

from __future__ import annotations

from pathlib import Path

from cuma_ds.config import DataSection
from cuma_ds.data.prepared import PreparedData
from cuma_ds.data.sources.files import find_input
from cuma_ds.data.sources.records import Progress, as_is, prepare_records


def prepare_jsonl(
    path: str | Path,
    config: DataSection,
    template: str,
    spool: Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PreparedData:
    """Read rows as :mod:`cuma_ds.data.sources.records` describes them.

    Without ``person_id`` each row is a person of its own; without ``question_id`` equal texts are one question.

    Args:
        path: a .jsonl, .jsonl.gz or .parquet file, a folder of them, a ``datasets`` folder or a hub id.
        config: split settings.
        template: how profile fields become a sentence.
        spool, workers, progress: as in :func:`cuma_ds.data.sources.records.prepare_records`.

    Raises:
        DataError: one line with file, line and what was allowed for the first thing that is wrong.
    """
    return prepare_records(find_input(path), as_is, config, template, spool, workers, progress)
