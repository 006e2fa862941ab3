"""A user's own answers or conversations: one JSON object per line, plain or gzipped."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from cuma_ds.config import DataSection
from cuma_ds.data.prepared import PreparedData, ProfileList, Question, check_questions, prepare_chat, prepare_choice, sha256
from cuma_ds.data.rendering import LETTERS
from cuma_ds.errors import DataError, nearest

_KEYS = {
    "choice": ("profile", "question", "options", "answer", "question_id", "person_id"),
    "chat": ("profile", "messages", "person_id"),
}
_OPTIONAL = ("question_id", "person_id")
_ROLES = ("system", "user", "assistant")


def prepare_jsonl(path: str | Path, config: DataSection, template: str) -> PreparedData:
    """Read choice questions or conversations.

    A choice row is ``{"profile": {...} or "text", "question": str, "options": [str, ...], "answer": index or text,
    "question_id"?: str, "person_id"?: str}``; a chat row ``{"profile", "messages": [{"role", "content"}, ...], "person_id"?}``.
    Without ``person_id`` each row is a person of its own; without ``question_id`` equal texts are one question.

    Args:
        path: a .jsonl or .jsonl.gz file, or a folder of them.
        config: split settings.
        template: how profile fields become a sentence.

    Raises:
        DataError: one line with file, line and what was allowed for the first thing that is wrong.
    """
    files = _files(Path(path))
    profiles = ProfileList(template)
    questions: dict[str, tuple[int, Question]] = {}
    conversations: list[list[dict[str, str]]] = []
    table: list[tuple[str, int, int, int]] = []
    kind = ""
    for where, row in _rows(files):
        row_kind = _kind(row, where)
        kind = kind or row_kind
        if row_kind != kind:
            raise DataError(f"{where}: a {row_kind} row after {kind} rows; one data set holds one kind")
        if kind == "choice":
            number, question = _question(row, where, questions)
            if config.questions is not None and question.question_id not in config.questions:
                continue
        try:
            profile = profiles.add(_profile(row["profile"], where))
        except DataError as error:
            raise DataError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
        person = _identifier(row, "person_id", where)
        person = f"row {len(table)}" if person is None else f"id {person}"
        if kind == "choice":
            table.append((person, profile, number, _answer(row["answer"], question.options, where)))
        else:
            conversations.append(_messages(row["messages"], where))
            table.append((person, profile, 0, 0))
    check_questions(config, [question.question_id for _, question in questions.values()])
    if not table:
        raise DataError(f"{path} holds no rows; expected one JSON object per line with {' or '.join(map(_expected, _KEYS))}")
    answers = pd.DataFrame(table, columns=["person", "profile", "question", "answer"])
    answers["person"] = pd.factorize(answers["person"], sort=True)[0]
    inputs = {file.name: sha256(file) for file in files}
    if kind == "chat":
        return prepare_chat(answers, conversations, profiles, config, inputs)
    return prepare_choice(answers, [question for _, question in questions.values()], profiles, config, inputs)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for pattern in ("*.jsonl", "*.jsonl.gz") for file in path.glob(pattern))
        if not files:
            raise DataError(f"{path} is neither a prepared folder nor a folder with .jsonl or .jsonl.gz files")
        return files
    if not path.is_file():
        raise DataError(f"there is no data at {path}; expected a .jsonl or .jsonl.gz file, or a folder")
    return [path]


def _rows(files: list[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in files:
        open_bytes: Callable[..., Any] = gzip.open if file.suffix == ".gz" else open
        number = 0
        try:
            with open_bytes(file, "rb") as stream:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        yield f"{file}:{number}", _object(line, f"{file}:{number}")
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{file}:{number + 1}: cannot be read: {error}") from None


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError(f"{where}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: broken JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row is a JSON object with {' or '.join(map(_expected, _KEYS))}, not {type(row).__name__}")
    return row


def _kind(row: dict[str, Any], where: str) -> str:
    kind = "chat" if "messages" in row else "choice"
    known = _KEYS[kind]
    if kind == "choice" and "question" not in row and "options" not in row:
        raise DataError(f"{where}: neither a choice nor a chat row; expected {' or '.join(map(_expected, _KEYS))}")
    for key in row:
        if key not in known:
            raise DataError(f"{where}: unknown key {key!r}{nearest(key, known)}; a {kind} row allows: {', '.join(known)}")
    for key in known:
        if key not in row and key not in _OPTIONAL:
            raise DataError(f"{where}: key {key!r} is missing; a {kind} row has: {_expected(kind)}")
    return kind


def _expected(kind: str) -> str:
    return ", ".join(key for key in _KEYS[kind] if key not in _OPTIONAL)


def _profile(profile: Any, where: str) -> dict[str, Any] | str:
    if isinstance(profile, str):
        return profile
    if not isinstance(profile, dict):
        raise DataError(f"{where}: profile is {type(profile).__name__}; allowed: an object of fields or a sentence")
    for name, value in profile.items():
        if isinstance(value, dict | list):
            raise DataError(f"{where}: profile field {name!r} is {type(value).__name__}; allowed: text, a number, true, false or null")
    return profile


def _identifier(row: dict[str, Any], key: str, where: str) -> str | None:
    value = row.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
        raise DataError(f"{where}: {key} is {type(value).__name__}; allowed: text or a whole number")
    return None if value is None else str(value)


def _question(row: dict[str, Any], where: str, questions: dict[str, tuple[int, Question]]) -> tuple[int, Question]:
    text, options = row["question"], row["options"]
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: question is empty or not text; allowed: the question as asked")
    if not isinstance(options, list) or not all(isinstance(option, str) and option.strip() for option in options):
        raise DataError(f"{where}: options is not a list of texts; allowed: 2 to {len(LETTERS)} different texts")
    options = tuple(option.strip() for option in options)
    if not 2 <= len(options) <= len(LETTERS) or len(set(options)) < len(options):
        raise DataError(
            f"{where}: options has {len(options)} texts, {len(set(options))} different; allowed: 2 to {len(LETTERS)} different texts"
        )
    text = text.strip()
    question_id = _identifier(row, "question_id", where)
    if question_id is None:
        question_id = hashlib.sha256(json.dumps([text, options]).encode()).hexdigest()[:12]
    number, known = questions.setdefault(question_id, (len(questions), Question(question_id, text, options)))
    if known.options != options:
        raise DataError(
            f"{where}: question_id {question_id!r} had other options before; one question has one list of options, in one order"
        )
    if known.text != text:
        raise DataError(f"{where}: question_id {question_id!r} had another text before; one question has one text")
    return number, known


def _answer(answer: Any, options: tuple[str, ...], where: str) -> int:
    if isinstance(answer, str) and answer.strip() in options:
        return options.index(answer.strip())
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return answer
    shown = repr(answer) if isinstance(answer, int | float | bool) or answer is None else f"a {type(answer).__name__} that is no option"
    raise DataError(f"{where}: answer is {shown}; allowed: 0 to {len(options) - 1}, or the text of an option")


def _messages(messages: Any, where: str) -> list[dict[str, str]]:
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
        raise DataError(f"{where}: message {roles.index('system', 1) + 1} has role 'system'; only the first message may")
    if roles[-1] != "assistant" or "user" not in roles or roles.index("assistant") < roles.index("user"):
        raise DataError(
            f"{where}: a conversation starts with a user message (after an optional system one) and ends with an assistant message"
        )
    return messages
