"""A user's own answers, conversations or preferences: JSON lines, parquet, a ``datasets`` folder or a hub id."""

from __future__ import annotations

from cuma_ds.data.raw import ReadOptions, Rows
from cuma_ds.data.sources.files import find_input
from cuma_ds.data.sources.gather import read_records
from cuma_ds.data.sources.records import as_is


def read(path: str, options: ReadOptions) -> Rows:
    """Read rows as :mod:`cuma_ds.data.sources.records` describes them.

    Without ``person_id`` each row is a person of its own; without ``question_id`` equal texts are one question.

    Args:
        path: a .jsonl, .jsonl.gz or .parquet file, a folder of them, a ``datasets`` folder or a hub id.
        options: how to read.

    Raises:
        DataError: one line with file, line and what was allowed for the first thing that is wrong.
    """
    return read_records(find_input(path), as_is, options)
