"""From tokens to text while an answer is being written: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

# How tokens become text. Some tokenizer folders ask for "cleaned up" spaces.
# They would change whole answers and not streamed ones.
AS_WRITTEN = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


class TextStream:
    """The text of one answer, token by token.

    Args:
        tokenizer: a fast ``transformers`` tokenizer.
        stops: strings that end the answer; they are no part of it.

    Attributes:
        stopped: whether a stop string was written.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._decoded = ""  # all text the tokens gave so far
        self._sent = 0  # how much of it left
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain now; what may be the beginning of a stop string waits."""
        self._ids.append(token)
        self._decoded += self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
        return self._release(final=False)

    def finish(self) -> str:
        """What was still waiting."""
        whole = str(self._tokenizer.decode(self._ids, **AS_WRITTEN))
        if whole.startswith(self._decoded):  # bytes of a character that never became whole
            self._decoded = whole
        return self._release(final=True)

    def _release(self, final: bool) -> str:
        if self.stopped:
            return ""
        found = [place for place in (self._decoded.find(stop, self._sent) for stop in self._stops) if place >= 0]
        if found:
            self.stopped, end = True, min(found)
        else:
            end = len(self._decoded) - (0 if final else max((self._begun(stop) for stop in self._stops), default=0))
        piece = self._decoded[self._sent : end]
        self._sent = max(self._sent, end)
        return piece

    def _begun(self, stop: str) -> int:
        """Length of the longest end of the unsent text that begins ``stop``."""
        waiting = len(self._decoded) - self._sent
        return next(
            (size for size in range(min(len(stop) - 1, waiting), 0, -1) if self._decoded.endswith(stop[:size])), 0
        )
