"""Formats of profile sentences, as a recipe writes them: ``A person from {country}[, aged {age}].``

``{name}`` stands for a field of the profile. A part in square brackets is left out where a field in it has no answer.
``{{``, ``}}``, ``[[`` and ``]]`` stand for single brackets.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

_PART = re.compile(r"\{\{|\}\}|\[\[|\]\]|\{(?P<field>[^{}\[\]]*)\}|[\[\]{}]|[^\[\]{}]+")
# What stands for a field without an answer, outside of square brackets.
UNKNOWN = "Unknown"


@dataclass(frozen=True)
class FormatPart:
    """A stretch of a format.

    Attributes:
        pieces: what is said in turn, (text, is a field's name).
        optional: it stood in square brackets.
    """

    pieces: tuple[tuple[str, bool], ...]
    optional: bool

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of its fields."""
        return tuple(text for text, is_field in self.pieces if is_field)

    def filled(self, value_of: Callable[[str], str]) -> str:
        """The text with the fields' values.

        Args:
            value_of: a field's value by its name; an empty string where there is no answer.
        """
        values = {name: value_of(name) for name in self.fields}
        if self.optional and not all(values.values()):
            return ""
        return "".join((values[text] or UNKNOWN) if is_field else text for text, is_field in self.pieces)


@functools.lru_cache(maxsize=16)
def parse_format(text: str) -> tuple[FormatPart, ...]:
    """The parts of a format.

    Raises:
        ValueError: a bracket without its other half, brackets in brackets, a field without a name, no field at all;
            one line that says what and where.
    """
    parts: list[FormatPart] = []
    pieces: list[tuple[str, bool]] = []
    optional = False
    for token in _PART.finditer(text):
        piece, place = token[0], token.start() + 1
        if token["field"] is not None:
            name = " ".join(token["field"].split())
            if not re.fullmatch(r"\w[\w \-/']*", name):
                raise ValueError(f"{piece!r} at character {place} names no field; write e.g. {{country}}")
            pieces.append((name, True))
        elif piece in ("[", "]"):
            if optional != (piece == "]"):
                raise ValueError(f"{piece!r} at character {place} has no other half; [[ and ]] are brackets as such")
            parts.append(FormatPart(tuple(pieces), optional))
            if optional and not parts[-1].fields:
                raise ValueError(f"the part in brackets that ends at character {place} holds no field")
            pieces, optional = [], not optional
        elif piece in ("{", "}"):
            raise ValueError(f"{piece!r} at character {place} has no other half; {{{{ and }}}} are braces as such")
        else:
            pieces.append((piece[0] if piece in ("{{", "}}", "[[", "]]") else piece, False))
    if optional:
        raise ValueError("a '[' has no other half; [[ and ]] are brackets as such")
    parts.append(FormatPart(tuple(pieces), False))
    found = tuple(part for part in parts if part.pieces)
    if not any(part.fields for part in found):
        raise ValueError("it names no field; write e.g. {country}")
    return found


@functools.lru_cache(maxsize=16)
def format_fields(text: str) -> tuple[str, ...]:
    """Names of the fields in a format, each once, in the order they come (errors as in :func:`parse_format`)."""
    return tuple(dict.fromkeys(name for part in parse_format(text) for name in part.fields))
