"""What a policy wrote after one prompt."""

from __future__ import annotations

from dataclasses import dataclass

from cuma_ds.data.rows import Row


@dataclass(frozen=True)
class Answers:
    """The completions of one prompt, which are compared with each other.

    Attributes:
        number: of the row in the training split.
        row: that row.
        texts: each completion as text, without special tokens and surrounding blanks.
        lengths: tokens of each completion, with the token that ended it.
        truncated: whether each was cut at ``rollout.max_new_tokens``.
    """

    number: int
    row: Row
    texts: tuple[str, ...]
    lengths: tuple[int, ...]
    truncated: tuple[bool, ...]
