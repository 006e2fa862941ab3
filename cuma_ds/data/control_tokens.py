"""What people write stays text: a ``<|im_start|>`` in a message or profile never becomes the token of that name."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

# Private characters that stand for the names of control tokens while a chat template writes around them.
_FIRST, _LAST = 0xF0000, 0xFFFFD


class ControlTokens:
    """The special tokens of one tokenizer, kept apart from the same words in a text.

    Args:
        tokenizer: a fast ``transformers`` tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        special = {number: token for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._names = sorted({token.content for token in special.values() if token.content}, key=len, reverse=True)
        self._place = {name.lower(): place for place, name in reversed(list(enumerate(self._names)))}
        self._ids = set(special)
        self._letters = lru_cache(None)(self._written)
        private = f"[{chr(_FIRST)}-{chr(_LAST)}]"
        # A tokenizer may read the names of its tokens after it has normalised the text, e.g. in lower case.
        any_case = re.IGNORECASE if any(token.normalized for token in special.values()) else re.NOFLAG
        self._hidden = re.compile("|".join([*map(re.escape, self._names), private]), any_case)
        self._shown = re.compile(private)

    def hide(self, text: str) -> str:
        """The text with each name of a control token as one private character.

        A private character of the text's own, which means nothing to anybody else, becomes U+FFFD.
        """
        return self._hidden.sub(self._private, text)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, see :meth:`encode`."""
        if self._shown.search(text):
            return self.encode(text)[0]
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text, and the characters [first, end) of each.

        Args:
            text: what a template wrote around hidden texts. Names of control tokens that stand in it as they are become
                these tokens; hidden ones become tokens of their letters.
        """
        ids, offsets = [], []
        start = 0
        for found in self._shown.finditer(text):
            before, spans = self._plain(text[start : found.start()])
            letters = self._letters(self._names[ord(found[0]) - _FIRST])
            ids += [*before, *letters]
            offsets += [(start + first, start + end) for first, end in spans] + [found.span()] * len(letters)
            start = found.end()
        rest, spans = self._plain(text[start:])
        return [*ids, *rest], [*offsets, *((start + first, start + end) for first, end in spans)]

    def _private(self, found: re.Match[str]) -> str:
        place = self._place.get(found[0].lower())
        return "\ufffd" if place is None else chr(_FIRST + place)

    def _plain(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        if not text:
            return [], []
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def _written(self, name: str) -> list[int]:
        """Token ids of a control token's name as text. A letter that has no token of its own is left out."""
        for parts in ([name], list(name)):  # a vocabulary may hold the whole name as a word
            asked = {"add_special_tokens": False, "split_special_tokens": True}
            ids = [one for part in parts for one in self._tokenizer(part, **asked)["input_ids"]]
            if not self._ids.intersection(ids):
                return ids
        return [one for one in ids if one not in self._ids]
