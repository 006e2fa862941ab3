"""SubPOP (jjssuh/subpop) and OpinionQA in the same form: how groups of Americans answered, one JSON line a question and
group.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence

from cuma_ds.data.raw import ReadOptions, Rows
from cuma_ds.data.sources.files import find_input
from cuma_ds.data.sources.gather import read_records
from cuma_ds.data.sources.no_answer import means_no_answer
from cuma_ds.data.sources.published import on_scale
from cuma_ds.data.sources.records import Converted, Row
from cuma_ds.errors import DataError

_KEYS = ("qkey", "attribute", "group", "question", "options", "ordinal", "responses")
_ATTRIBUTES = {
    "AGE": "age",
    "CITIZEN": "citizenship",
    "CREGION": "region of the United States",
    "EDUCATION": "education",
    "INCOME": "income",
    "MARITAL": "marital status",
    "POLIDEOLOGY": "political ideology",
    "POLPARTY": "political party",
    "RACE": "race",
    "RELIG": "religion",
    "RELIGATTEND": "religious attendance",
    "SEX": "sex",
}


def read(path: str, options: ReadOptions) -> Rows:
    """Read distributions, one for each question and group.

    ``responses`` are of those who answered: the last option ("Refused") is left out, whatever ``refusal_rate`` is.
    Options stand in the order of ``ordinal`` (so one in the middle of the scale is shown in the middle). Those with a
    negative place lie outside the scale and are left out. Where all places are equal, options have no order
    (``nominal``). How many people a group has is not said.

    Args:
        path: a .jsonl file (also gzipped), or a folder of them.
        options: how to read.

    Raises:
        DataError: a missing key, lists of different lengths, a broken line.
    """
    return read_records(find_input(path), convert_distribution, options)


def convert_distribution(record: Row, where: str) -> Converted:
    """One distribution."""
    for key in _KEYS:
        if key not in record:
            raise DataError(f"{where}: key {key!r} is missing; a line has {', '.join(_KEYS)}")
    options, ordinal, responses = (_listed(record[key], key, where) for key in ("options", "ordinal", "responses"))
    if len(options) == len(responses) + 1 and means_no_answer(str(options[-1])):
        options = options[:-1]
    if not len(options) == len(ordinal) == len(responses):
        raise DataError(
            f"{where}: {len(responses)} responses, {len(ordinal)} places in ordinal and {len(options)} options besides "
            "the refusal; allowed: as many of each"
        )
    places = [_place(place) for place in ordinal]
    scale = on_scale([str(option) for option in options], responses, places)
    if scale is None:
        return Converted([], skipped="distributions with unusable responses")
    alike = len(set(places) - {None}) == 1
    return Converted(
        [
            {
                "profile": _profile(record, where),
                "question": record["question"],
                "question_id": record["qkey"],
                "options": scale.options,
                "shares": scale.shares,
                "scale": "nominal" if alike else "ordinal",
            }
        ]
    )


def _profile(record: Row, where: str) -> Mapping[str, object]:
    """Groups of several attributes at once are written as lists."""
    attributes, groups = (
        _listed(value, "attribute", where) if str(value).startswith("[") else [value]
        for value in (record["attribute"], record["group"])
    )
    if len(attributes) != len(groups):
        raise DataError(f"{where}: {len(attributes)} attributes, but {len(groups)} groups; allowed: one of each")
    return {
        _ATTRIBUTES.get(str(name), str(name).lower()): group for name, group in zip(attributes, groups, strict=True)
    }


def _listed(value: object, key: str, where: str) -> Sequence[object]:
    """A list, or the text of one."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = None
    if not isinstance(value, list):
        raise DataError(f"{where}: {key} is no list; save the file as it is published")
    return value


def _place(value: object) -> float | None:
    """Where an option stands on its scale; None for one outside."""
    return float(value) if isinstance(value, int | float) and value >= 0 else None
