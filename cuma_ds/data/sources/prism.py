"""PRISM (HannahRoseKirk/prism-alignment): conversations in which a person rates several models' answers, and a survey
of these people.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from cuma_ds.data.raw import ReadOptions, Rows
from cuma_ds.data.sources.files import Input, decode, find_input
from cuma_ds.data.sources.gather import read_records
from cuma_ds.data.sources.records import Converted, Row, anonymous, person_of
from cuma_ds.errors import DataError
from cuma_ds.identity import file_sha256

_FILES = ("conversations.jsonl", "survey.jsonl")
# Where the survey keeps what a profile says, by the profile's field.
_FIELDS = {
    "country": ("location", "reside_country"),
    "country of birth": ("location", "birth_country"),
    "age": ("age",),
    "gender": ("gender",),
    "religion": ("religion", "simplified"),
    "education": ("education",),
    "ethnicity": ("ethnicity", "simplified"),
    "employment": ("employment_status",),
    "marital status": ("marital_status",),
}
_SURVEY_KEYS = ("user_id", *dict.fromkeys(place[0] for place in _FIELDS.values()))


def read(path: str, options: ReadOptions) -> Rows:
    """Read conversations by ``data.kind``.

    ``chat`` (default): the whole conversation along the chosen answers. ``preference``: in each turn, the chosen
    answer against each of the others, with the difference of their scores (1 to 100) as margin.

    Args:
        path: folder with conversations.jsonl and survey.jsonl (either may be gzipped).
        options: how to read.

    Raises:
        DataError: a missing file or key, a user who comes twice or is not in the survey, a broken line.
    """
    if options.config.kind == "choice":
        raise DataError("prism holds no choice questions; kind is chat or preference")
    conversations, survey = (_find(Path(path), name) for name in _FILES)
    people = read_survey(find_input(survey))
    source = find_input(conversations)
    source = Input(source.chunks, source.size, {**source.identity, survey.name: file_sha256(survey)})
    convert = partial(convert_conversation, kind=options.config.kind or "chat", people=people)
    return read_records(source, convert, options)


def read_survey(source: Input) -> dict[str, dict[str, object]]:
    """Profile fields by user_id."""
    people: dict[str, dict[str, object]] = {}
    for chunk in source.chunks():
        for where, record in decode(chunk):
            for key in _SURVEY_KEYS:
                if key not in record:
                    raise DataError(f"{where}: key {key!r} is missing; a survey row has: {', '.join(_SURVEY_KEYS)}")
            user = _user(record, where)
            if user in people:
                raise DataError(f"{where}: the user_id {user!r} has come before; each user answered the survey once")
            people[user] = _profile(record, where)
    return people


def convert_conversation(record: Row, where: str, kind: str, people: dict[str, dict[str, object]]) -> Converted:
    """Rows of one conversation; a turn without exactly one chosen answer ends it."""
    for key in ("conversation_id", "user_id", "conversation_history"):
        if key not in record:
            raise DataError(
                f"{where}: key {key!r} is missing; a conversation has conversation_id, user_id and conversation_history"
            )
    user = _user(record, where)
    if user not in people:
        raise DataError(f"{where}: user_id {user!r} is not in the survey")
    who = {"profile": people[user], "person_id": user}
    if anonymous(people[user]):
        return Converted([], record["conversation_id"], "conversations of people of whom nothing is known")
    messages: list[dict[str, str]] = []
    rows: list[dict[str, object]] = []
    for prompt, answers in _turns(record["conversation_history"], where):
        preferred = [answer for answer in answers if answer.get("if_chosen")]
        if len(preferred) != 1 or not _text(preferred[0]) or not prompt:
            break
        chosen, liked = _text(preferred[0]), _score(preferred[0], where)
        messages.append({"role": "user", "content": prompt})
        others: dict[str, float | None] = {}
        for answer in answers:
            others.setdefault(_text(answer), _score(answer, where))
        for rejected, score in others.items():
            if rejected and rejected != chosen:
                margin = None if liked is None or score is None else liked - score
                pair = {"chosen": chosen, "rejected": rejected, "margin": margin}
                rows.append({**who, "prompt": list(messages), **pair})
        messages.append({"role": "assistant", "content": chosen})
    if not messages:
        return Converted([], record["conversation_id"], "conversations without a chosen first answer")
    if kind == "chat":
        return Converted([{**who, "messages": messages}], record["conversation_id"])
    return Converted(rows, record["conversation_id"], None if rows else "conversations without a rejected answer")


def _turns(history: object, where: str) -> list[tuple[str, list[dict[str, object]]]]:
    if not isinstance(history, list):
        raise DataError(
            f"{where}: conversation_history is {type(history).__name__}; allowed: a list of user and model entries"
        )
    turns: dict[int, tuple[list[str], list[dict[str, object]]]] = {}
    for number, entry in enumerate(history, start=1):
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("turn"), int)
            or not isinstance(entry.get("content"), str)
        ):
            raise DataError(
                f"{where}: entry {number} of conversation_history lacks a whole number turn or a text content"
            )
        if entry.get("role") not in ("user", "model"):
            raise DataError(
                f"{where}: entry {number} of conversation_history has role {entry.get('role')!r}; allowed: user, model"
            )
        prompts, answers = turns.setdefault(entry["turn"], ([], []))
        if entry["role"] == "user":
            prompts.append(_text(entry))
        else:
            answers.append(entry)
    return [("\n".join(prompts), answers) for _, (prompts, answers) in sorted(turns.items())]


def _text(entry: dict[str, object]) -> str:
    """What an entry says; PRISM writes EMPTY STRING where a model said nothing."""
    text = str(entry["content"]).strip()
    return "" if text == "EMPTY STRING" else text


def _score(entry: dict[str, object], where: str) -> float | None:
    score = entry.get("score")
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        raise DataError(f"{where}: score is {type(score).__name__}; allowed: a number from 1 to 100, or null")
    return score


def _user(record: Row, where: str) -> str:
    user = person_of(record, "user_id", where)
    if user is None:
        raise DataError(f"{where}: user_id is {record['user_id']!r}, which names nobody; each person has an id")
    return user


def _profile(record: Row, where: str) -> dict[str, object]:
    profile: dict[str, object] = {}
    for field, (key, *inner) in _FIELDS.items():
        value = record[key]
        if inner:
            if value is not None and not isinstance(value, dict):
                raise DataError(f"{where}: {key} is {type(value).__name__}; allowed: an object with {inner[0]}")
            value = (value or {}).get(inner[0])
        profile[field] = value
    # Most people live where they were born; saying it twice would only lengthen the sentence.
    if profile["country of birth"] == profile["country"]:
        del profile["country of birth"]
    return profile


def _find(folder: Path, name: str) -> Path:
    found = next((folder / candidate for candidate in (name, f"{name}.gz") if (folder / candidate).is_file()), None)
    if found is None:
        raise DataError(f"{folder / name} is missing; source prism reads {' and '.join(_FILES)} from one folder")
    return found
