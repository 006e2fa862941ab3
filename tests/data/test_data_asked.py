"""What a row asks a model that answers by itself: the prompt of its evaluation, without the recorded answer."""

from __future__ import annotations

import pytest
from conftest import character_tokenizer

from cuma_ds.data.asked import conversation, encode_asked
from cuma_ds.data.rendering import PromptTooLong, Renderer

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi, I have a long story to tell you."},
    {"role": "assistant", "content": "Go on."},
    {"role": "user", "content": "Who am I?"},
    {"role": "assistant", "content": "A friend."},
]


@pytest.fixture
def renderer() -> Renderer:
    return Renderer(character_tokenizer(), 300)


def test_a_choice_row_asks_its_question(renderer) -> None:
    row = {"profile": 0, "question": "Is it so?", "options": ["Yes", "No"]}
    assert encode_asked(row, renderer, "", 300) == renderer.encode_choice("Is it so?", ["Yes", "No"], "")
    with pytest.raises(PromptTooLong):
        encode_asked(row, renderer, "", 20)
    for order in (renderer, renderer.with_options_reversed()):
        (message,) = conversation(row, order)
        lines = message["content"].splitlines()
        assert lines[1] == ("A. Yes" if order is renderer else "A. No")


def test_a_conversation_is_asked_up_to_its_last_answer_and_loses_early_turns_to_fit(renderer) -> None:
    row = {"profile": 0, "messages": [*CHAT, {"role": "user", "content": "Thanks."}]}
    assert conversation(row, renderer) == CHAT[:-1]
    whole = renderer.encode_prompt(CHAT[:-1], "")
    assert encode_asked(row, renderer, "", 300) == whole
    shorter = encode_asked(row, renderer, "", len(whole) - 1)
    assert shorter == renderer.encode_prompt([CHAT[0], CHAT[3]], "")
    with pytest.raises(PromptTooLong):
        encode_asked(row, renderer, "", len(shorter) - 1)


def test_a_preference_asks_its_prompt(renderer) -> None:
    row = {"profile": 0, "prompt": CHAT[:-1], "chosen": "A friend.", "rejected": "Nobody."}
    assert conversation(row, renderer) == CHAT[:-1]
    assert encode_asked(row, renderer, "", 300) == renderer.encode_prompt(CHAT[:-1], "")
