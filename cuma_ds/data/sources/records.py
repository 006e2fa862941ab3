"""Rows of choice questions, distributions, conversations or preferences: the formats, and what is wrong with a row.

A row is one of

- ``{"profile", "question", "options", "answer", "question_id"?, "person_id"?, "scale"?, "weight"?}``
- ``{"profile", "question", "options", "shares", "question_id"?, "scale"?, "weight"?}``
- ``{"profile", "messages", "person_id"?}``
- ``{"profile", "prompt", "chosen", "rejected", "person_id"?, "margin"?}``

Sources of other formats turn their records into such rows.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from cuma_ds.data.rendering import LETTERS
from cuma_ds.data.rows import SCALES, Question
from cuma_ds.errors import DataError, nearest
from cuma_ds.profiles.linearize import is_missing, one_spelling

KEYS = {
    "choice": ("profile", "question", "options", "answer", "question_id", "person_id", "scale", "weight"),
    "distribution": ("profile", "question", "options", "shares", "question_id", "scale", "weight"),
    "chat": ("profile", "messages", "person_id"),
    "preference": ("profile", "prompt", "chosen", "rejected", "person_id", "margin"),
}
# Keys that only one kind has.
_TOLD_BY = {"messages": "chat", "chosen": "preference", "rejected": "preference", "shares": "distribution"}
_OPTIONAL = ("question_id", "person_id", "scale", "weight", "margin")
# Besides the words that mean a missing value in a profile.
_NOBODY = {"none", "nil", "undefined", "anonymous"}
_ROLES = ("system", "user", "assistant")
_LARGEST_MARGIN = 1e30  # what float32 holds
# People behind a distribution that does not say how many it asked: about a national sample of the usual surveys.
RESPONDENTS = 1000.0
# Published shares are rounded; their sum may be off by this part.
_ROUNDING = 0.02
Row = dict[str, object]


@dataclass(frozen=True)
class Converted:
    """What a source makes of one raw record.

    rows: in the formats above.  record_id: must not come twice.  skipped: why the record gives no (or fewer) rows.
    """

    rows: list[Row]
    record_id: object = None
    skipped: str | None = None


Convert = Callable[[Row, str], Converted]


def as_is(record: Row, where: str) -> Converted:
    """A record that is a row already."""
    return Converted([record])


def anonymous(profile: Mapping[str, object]) -> bool:
    """Whether no field of a profile has a usable value."""
    return all(is_missing(value) for value in profile.values())


def row_kind(row: dict[str, object], where: str) -> str:
    """``choice``, ``distribution``, ``chat`` or ``preference`` by the row's keys.

    Raises:
        DataError: none of them, an unknown or a missing key.
    """
    kind = next((kind for key, kind in _TOLD_BY.items() if key in row), "choice")
    known = KEYS[kind]
    if kind == "choice" and "question" not in row and "options" not in row:
        raise DataError(f"{where}: neither a choice nor a chat row; expected {' or '.join(map(expected_keys, KEYS))}")
    for key in row:
        if key not in known:
            raise DataError(
                f"{where}: unknown key {key!r}{nearest(key, known)}; a {kind} row allows: {', '.join(known)}"
            )
    for key in known:
        if key not in row and key not in _OPTIONAL:
            raise DataError(f"{where}: key {key!r} is missing; a {kind} row has: {expected_keys(kind)}")
    return kind


def expected_keys(kind: str) -> str:
    """The keys a row of this kind must have."""
    return ", ".join(key for key in KEYS[kind] if key not in _OPTIONAL)


def profile_of(profile: object, where: str) -> dict[str, object] | str:
    if isinstance(profile, str):
        return profile
    if not isinstance(profile, dict):
        raise DataError(f"{where}: profile is {type(profile).__name__}; allowed: an object of fields or a sentence")
    for name, value in profile.items():
        if value is not None and not isinstance(value, str | int | float):
            raise DataError(
                f"{where}: profile field {name!r} is {type(value).__name__}; allowed: text, a number, true, "
                "false or null"
            )
    return profile


def person_of(row: Row, key: str, where: str) -> str | None:
    """The id of a row's person, in one spelling; None for words that mean there is none ("", "nan", "None", "unknown",
    ...).

    Raises:
        DataError: neither text nor a whole number.
    """
    value = row.get(key)
    if is_missing(value) and not isinstance(value, list | dict):
        return None
    person = _identifier(row, key, where)
    return None if person is None or person.lower() in _NOBODY else person


def _identifier(row: Row, key: str, where: str) -> str | None:
    value = row.get(key)
    if isinstance(value, float) and value.is_integer():
        # A column of whole numbers with gaps is one of floats in many tables.
        value = int(value)
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
        raise DataError(f"{where}: {key} is {type(value).__name__}; allowed: text or a whole number")
    return None if value is None else one_spelling(str(value)) or None


def question_of(row: dict[str, object], where: str) -> Question:
    text, options = row["question"], row["options"]
    if not isinstance(text, str) or not one_spelling(text):
        raise DataError(f"{where}: question is empty or not text; allowed: the question as asked")
    if not isinstance(options, list) or not all(isinstance(option, str) and one_spelling(option) for option in options):
        raise DataError(f"{where}: options is not a list of texts; allowed: 2 to {len(LETTERS)} different texts")
    options = tuple(one_spelling(option) for option in options)
    if not 2 <= len(options) <= len(LETTERS) or len(set(options)) < len(options):
        raise DataError(
            f"{where}: options has {len(options)} texts, {len(set(options))} different; allowed: "
            f"2 to {len(LETTERS)} different texts"
        )
    text = one_spelling(text)
    question_id = _identifier(row, "question_id", where)
    if question_id is None:
        question_id = hashlib.sha256(json.dumps([text, options]).encode()).hexdigest()[:12]
    scale = row.get("scale", "ordinal")
    if scale not in SCALES:
        raise DataError(
            f"{where}: scale is {scale!r}; allowed: {', '.join(SCALES)} (nominal: "
            "the order of the options means nothing)"
        )
    return Question(question_id, text, options, scale)


def answer_of(answer: object, options: tuple[str, ...], where: str) -> int:
    if isinstance(answer, str) and one_spelling(answer) in options:
        return options.index(one_spelling(answer))
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return answer
    shown = (
        repr(answer)
        if isinstance(answer, int | float | bool) or answer is None
        else f"a {type(answer).__name__} that is no option"
    )
    raise DataError(f"{where}: answer is {shown}; allowed: 0 to {len(options) - 1}, or the text of an option")


def shares_of(shares: object, options: tuple[str, ...], where: str) -> list[float]:
    """The share of each option, adding up to 1.

    Args:
        shares: a number for each option, adding up to 1 or (percentages) to 100, but for rounding.
        options: of the question.

    Raises:
        DataError: not one number per option, a negative one, or a sum that is off by more than 2%.
    """
    if not isinstance(shares, list) or len(shares) != len(options):
        shown = f"has {len(shares)} numbers" if isinstance(shares, list) else f"is {type(shares).__name__}"
        raise DataError(f"{where}: shares {shown}; allowed: one number for each of the {len(options)} options")
    for option, share in enumerate(shares):
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= sys.float_info.max:
            shown = f"{share!r:.40}" if isinstance(share, int | float) else type(share).__name__
            raise DataError(f"{where}: shares[{option}] is {shown}; allowed: a number from 0 on")
    total = float(sum(shares))
    if not any(abs(total - whole) <= _ROUNDING * whole for whole in (1.0, 100.0)):
        raise DataError(f"{where}: shares sum to {total:g}; allowed: 1, or 100 for percentages, within {_ROUNDING:.0%}")
    return [share / total for share in shares]


def weight_of(row: Row, where: str, default: float = 1.0) -> float:
    weight = row.get("weight")
    if weight is None:
        return default
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= sys.float_info.max:
        shown = f"{weight!r:.40}" if isinstance(weight, int | float) else type(weight).__name__
        raise DataError(f"{where}: weight is {shown}; allowed: a positive number ({default:g} where a row has none)")
    return float(weight)


def messages_of(messages: object, where: str, last: str = "assistant") -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages is empty or not a list; allowed: objects with role and content")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise DataError(f"{where}: message {number + 1} is not an object with exactly the keys role and content")
        if message["role"] not in _ROLES:
            raise DataError(f"{where}: message {number + 1} has role {message['role']!r}; allowed: {', '.join(_ROLES)}")
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise DataError(f"{where}: message {number + 1} has no text in content")
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise DataError(
            f"{where}: message {roles.index('system', 1) + 1} has role 'system'; only the first message may"
        )
    if roles[-1] != last or "user" not in roles or "assistant" in roles[: roles.index("user")]:
        kind, article = ("conversation", "an") if last == "assistant" else ("prompt", "a")
        raise DataError(
            f"{where}: a {kind} starts with a user message (after an optional system one) and ends with {article} "
            f"{last} message"
        )
    return messages


class Preference(NamedTuple):
    """The stored columns of one pair; ``margin`` is None where the source has no scores."""

    prompt: list[dict[str, str]]
    chosen: str
    rejected: str
    margin: float | None


def preference_of(row: Row, where: str) -> Preference:
    """Two different answers to one prompt.

    Raises:
        DataError: a prompt or an answer without text, a prompt that does not end with the user, answers that differ in
            nothing but white space around them, a margin that is no number.
    """
    prompt = row["prompt"]
    messages = messages_of([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, where, "user")
    chosen, rejected = (_answer_text(row[key], key, where) for key in ("chosen", "rejected"))
    if chosen.strip() == rejected.strip():
        raise DataError(f"{where}: chosen and rejected are the same answer; allowed: two different answers")
    return Preference(messages, chosen, rejected, _margin(row.get("margin"), where))


def _answer_text(text: object, key: str, where: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: {key} is empty or not text; allowed: an answer")
    return text


def _margin(margin: object, where: str) -> float | None:
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not abs(margin) <= _LARGEST_MARGIN:
        shown = f"{margin!r:.40}" if isinstance(margin, int | float) else type(margin).__name__
        raise DataError(
            f"{where}: margin is {shown}; allowed: a number (how much more the chosen answer was liked), or null"
        )
    return float(margin)
