"""JSON that people write: a key that stands twice in one object is a mistake, not a choice of the last one."""

from __future__ import annotations

import json
import re
from typing import Any

_TOKEN = re.compile(r'("(?:[^"\\]|\\.)*")(\s*:)?|[{}]')


class RepeatedKeyError(ValueError):
    """A key that stands twice in one mapping. What stands there is not said: it may be about a person.

    Args:
        key: the key.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(f"key {key!r} stands twice; keep one")


def read_json(text: str) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: broken JSON (``json.JSONDecodeError``), or in one line what else cannot be read: a key that stands
            twice (with both lines of a longer text), too many nested lists or objects, a number with too many digits.
    """
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except RepeatedKeyError as error:
        lines = _lines_of_repeated_key(text)
        if lines[0] == lines[1]:
            raise
        raise ValueError(f"key {error.key!r} stands twice, in lines {lines[0]} and {lines[1]}; keep one") from None
    except RecursionError:
        raise ValueError("too many lists or objects within one another") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The ``object_pairs_hook`` that refuses a key that stands twice.

    Raises:
        RepeatedKeyError: a key stands twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise RepeatedKeyError(next(name for name in names if names.count(name) > 1))
    return found


def _lines_of_repeated_key(text: str) -> tuple[int, int]:
    """The lines, from 1, in which the first repeated key of a valid JSON text stands."""
    objects: list[dict[str, int]] = []
    for token in _TOKEN.finditer(text):
        if token[0] == "{":
            objects.append({})
        elif token[0] == "}":
            objects.pop()
        elif token[2]:
            key, line = json.loads(token[1]), text.count("\n", 0, token.start()) + 1
            if key in objects[-1]:
                return objects[-1][key], line
            objects[-1][key] = line
    return 0, 0
