"""What a row of prepared data asks a model that is to answer by itself."""

from __future__ import annotations

from collections.abc import Sequence

from cuma_ds.data.rendering import Message, Renderer, ask, worded
from cuma_ds.data.rows import Row


def conversation(row: Row, renderer: Renderer) -> Sequence[Message]:
    """The messages that are to be answered, the last one from the user.

    Args:
        row: of any kind: a choice question, a conversation up to its last answer, or the prompt of a pair.
        renderer: knows how questions are asked.
    """
    if "options" in row:
        question = worded(row["question"], row.get("label"), renderer.prompt_style)
        content = ask(question, row["options"], renderer.prompt_style, renderer.option_order)
        return [{"role": "user", "content": content}]
    if "prompt" in row:
        return row["prompt"]
    last = max(turn for turn, message in enumerate(row["messages"]) if message["role"] == "assistant")
    return row["messages"][:last]


def encode_asked(row: Row, renderer: Renderer, sentence: str, longest: int) -> list[int]:
    """Token ids of :func:`conversation`, without early turns where they do not fit.

    Args:
        row, renderer: as above.
        sentence: the profile sentence; used only with ``profile_in_prompt``.
        longest: most tokens.

    Raises:
        PromptTooLong: the question alone has more tokens.
    """
    return renderer.encode_prompt(conversation(row, renderer), sentence, longest)
