"""Community Alignment (facebook/community-alignment-dataset, v1.1): one CSV row a conversation of up to four turns,
four answers each.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

from cuma_ds.data.raw import ReadOptions, Rows
from cuma_ds.data.sources.delimited import csv_columns, find_csv, require_columns
from cuma_ds.data.sources.gather import read_records
from cuma_ds.data.sources.records import Converted, Row, anonymous, person_of
from cuma_ds.errors import DataError
from cuma_ds.profiles.linearize import one_spelling

_TURNS = ("first", "second", "third", "fourth")
_LETTERS = ("a", "b", "c", "d")
_FIELDS = {
    "annotator_country": "country",
    "annotator_age": "age",
    "annotator_gender": "gender",
    "annotator_education_level": "education",
    "annotator_ethnicity": "ethnicity",
    "annotator_political": "political orientation",
}
_END = "<|end_of_text|>"
_KINDS = ("chat", "choice", "preference")


def read(path: str, options: ReadOptions) -> Rows:
    """Read conversations by ``data.kind``.

    ``chat`` (default): the conversation along the preferred answers. ``choice``: which of the four first answers the
    person prefers; equal prompts with equal answers are one question. ``preference``: in each turn, the preferred
    answer against each of the other three.

    Args:
        path: the CSV file (also gzipped), or a folder that holds exactly one.
        options: how to read.

    Raises:
        DataError: no or several CSV files, a missing column, an unknown preferred response, a conversation that comes
            twice.
    """
    file = _find(Path(path))
    turns = [
        f"{turn}_turn_{part}"
        for turn in _TURNS
        for part in ("prompt", *(f"response_{x}" for x in _LETTERS), "preferred_response")
    ]
    columns = ["conversation_id", "annotator_id", *_FIELDS, *turns]
    require_columns(file, csv_columns(file), columns)
    convert = partial(convert_conversation, kind=options.config.kind or "chat")
    return read_records(find_csv(file, columns), convert, options)


def convert_conversation(record: Row, where: str, kind: str) -> Converted:
    """Rows of one conversation; a turn without prompt, preference or preferred answer ends it."""
    for name in ("conversation_id", "annotator_id"):
        if person_of(record, name, where) is None:
            raise DataError(
                f"{where}: {name} is {record.get(name) or 'empty'}; each conversation names itself and its annotator"
            )
    cells = {column: "" if value is None else str(value) for column, value in record.items()}
    profile = {field: _readable(field, cells.get(column) or None) for column, field in _FIELDS.items()}
    if anonymous(profile):
        return Converted([], record["conversation_id"], "conversations of people of whom nothing is known")
    who = {"profile": profile, "person_id": record["annotator_id"]}
    messages: list[dict[str, str]] = []
    rows: list[dict[str, object]] = []
    for turn in _TURNS:
        answers = {x: cells.get(f"{turn}_turn_response_{x}", "").replace(_END, "").strip() for x in _LETTERS}
        prompt, preferred = cells.get(f"{turn}_turn_prompt", "").strip(), cells.get(f"{turn}_turn_preferred_response")
        if preferred and preferred.removeprefix("response_") not in _LETTERS:
            raise DataError(
                f"{where}: {turn}_turn_preferred_response is {preferred!r}; allowed: response_a to response_d, "
                "or nothing"
            )
        chosen = answers[preferred.removeprefix("response_")] if preferred else ""
        if not prompt or not chosen:
            break
        messages.append({"role": "user", "content": prompt})
        if kind == "choice":
            text, chosen, *options = map(one_spelling, [prompt, chosen, *answers.values()])
            if not all(options) or len(set(options)) < len(options):
                return Converted(
                    [], record["conversation_id"], "conversations whose four first answers are not four different texts"
                )
            question = f"{text}\n\nWhich of these answers does this person prefer?"
            question_id = hashlib.sha256("\0".join([text, *options]).encode()).hexdigest()[:12]
            row = {
                **who,
                "question": question,
                "options": options,
                "answer": options.index(chosen),
                "question_id": question_id,
            }
            return Converted([{**row, "scale": "nominal"}], record["conversation_id"])
        others = [answer for answer in dict.fromkeys(answers.values()) if answer and answer != chosen]
        rows.extend({**who, "prompt": list(messages), "chosen": chosen, "rejected": other} for other in others)
        messages.append({"role": "assistant", "content": chosen})
    if not messages:
        return Converted(
            [], record["conversation_id"], "conversations without a first prompt and a preferred answer to it"
        )
    return Converted([{**who, "messages": messages}] if kind == "chat" else rows, record["conversation_id"])


def _readable(field: str, value: str | None) -> str | None:
    return value.title() if field == "country" and value and value.islower() else value


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(f"there is no data at {path}; expected the CSV file of Community Alignment, or its folder")
    files = sorted(
        {file for pattern in ("*.csv", "*.csv.gz") for file in (*path.glob(pattern), *(path / "data").glob(pattern))}
    )
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise DataError(
            f"{path} holds {len(files)} CSV files ({found}); name one, e.g. filtered_community_alignment.csv"
        )
    return files[0]
