"""Where answers come from: a source is one file here with ``read(path, options) -> Rows``, and one line in
:data:`SOURCES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from cuma_ds.data.raw import ReadOptions, Rows
from cuma_ds.data.sources import (
    community_alignment,
    global_opinions,
    jsonl,
    prism,
    subpop,
    survey,
    synthetic,
    worldvaluesbench,
    wvs_sample,
)


class Source(NamedTuple):
    """A way to read answers.

    Attributes:
        read: from the place that ``data.path`` names.
        needs: what that place is; None for a source that needs none.
    """

    read: Callable[[str, ReadOptions], Rows]
    needs: str | None


# By the value of data.source.
SOURCES = {
    "wvs-sample": Source(wvs_sample.read, None),
    "synthetic": Source(synthetic.read, None),
    "jsonl": Source(
        jsonl.read, "a .jsonl, .jsonl.gz or .parquet file, a folder of them, a datasets folder or a hub id"
    ),
    "survey": Source(survey.read, "a .sav, .dta, .csv or .parquet file of a survey"),
    "wvb": Source(
        worldvaluesbench.read, "the benchmark's folder, or one with the WVS-7 CSV and the benchmark's three JSON files"
    ),
    "global-opinions": Source(global_opinions.read, "the data set's CSV file"),
    "subpop": Source(subpop.read, "the data set's .jsonl file"),
    "opinionqa": Source(subpop.read, "its .jsonl file in the form of SubPOP"),
    "community-alignment": Source(community_alignment.read, "the data set's CSV file or folder"),
    "prism": Source(prism.read, "the folder with conversations.jsonl and survey.jsonl"),
}
