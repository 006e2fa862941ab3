"""From questions and conversations to token ids, by the tokenizer's own chat template."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from cuma_ds.errors import DataError, ModelError

logger = logging.getLogger(__name__)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Message = Mapping[str, str]

_PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


class Renderer:
    """Renders for one tokenizer; every token id of training and evaluation comes from here.

    Args:
        tokenizer: a fast ``transformers`` tokenizer; without a chat template, plain ``User: ... Assistant:`` text is used.
        max_length: tokens; what is longer loses its front, never the answer.
        profile_in_prompt: put the profile sentence into the system prompt as well.
        system_prompt: for conversations without one; None leaves it to the template.

    Raises:
        ModelError: the tokenizer cannot map text to tokens (not a fast one) or its template cannot be rendered.
    """

    def __init__(self, tokenizer: Any, max_length: int, profile_in_prompt: bool = False, system_prompt: str | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(f"the tokenizer {tokenizer.name_or_path!r} is a slow one; a folder with tokenizer.json is needed")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.profile_in_prompt = profile_in_prompt
        self.system_prompt = system_prompt
        self._template: str | None = None
        if tokenizer.chat_template is None:
            self._template = _PLAIN_TEMPLATE
            logger.warning("the tokenizer has no chat template; conversations are written as plain 'User: ... Assistant: ...' text")
        self._marks_answers = "{% generation" in str(self._template or tokenizer.chat_template).replace("{%-", "{%")
        probe = [{"role": "system", "content": "Qx7"}, {"role": "user", "content": "Hi"}]
        try:
            self._takes_system = "Qx7" in self._apply(probe)
        except ModelError:
            self._takes_system = False
        self._letters: dict[int, list[int]] = {}

    def encode_choice(self, question: str, options: Sequence[str], sentence: str) -> list[int]:
        """Token ids of the prompt; the token that follows the last one is the answer's letter.

        Args:
            question: the question as asked.
            options: answers in order, shown as A, B, C, ...
            sentence: who is asking; used only with ``profile_in_prompt``.
        """
        lines = [question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))]
        last = LETTERS[len(options) - 1]
        lines.append(f"Answer with one letter, A{' or ' if len(options) == 2 else ' to '}{last}.")
        text = self._text([{"role": "user", "content": "\n".join(lines)}], sentence, answer_next=True)
        return self._ids(text)[-self.max_length :]

    def encode_prompt(self, messages: Sequence[Message], sentence: str) -> list[int]:
        """Token ids of a conversation that the assistant is to continue, uncut."""
        return self._ids(self._text(messages, sentence, answer_next=True))

    def letter_ids(self, count: int) -> list[int]:
        """The token of each of the first ``count`` letters, as it would follow :meth:`encode_choice`.

        Raises:
            DataError: more options than letters, or a letter that is not one distinct token after the prompt.
        """
        if not 2 <= count <= len(LETTERS):
            raise DataError(f"a question has {count} options; allowed: 2 to {len(LETTERS)}")
        if count not in self._letters:
            question = [{"role": "user", "content": "?"}]
            prompt = self._ids(self._apply(question, answer_next=True))
            ids = []
            for letter in LETTERS[:count]:
                conversation = [*question, {"role": "assistant", "content": letter}]
                text = self._apply(conversation)
                start, _ = self._answer_spans(conversation, text)[0]
                tokens = self._ids(text[: text.index(letter, start) + 1])
                if tokens[:-1] != prompt or tokens[-1] in ids:
                    raise DataError(f"the letter {letter!r} is not a token of its own after the prompt of {self.tokenizer.name_or_path!r}")
                ids.append(tokens[-1])
            self._letters[count] = ids
        return self._letters[count]

    def encode_chat(self, messages: Sequence[Message], sentence: str) -> tuple[list[int], list[int]]:
        """Token ids of a conversation and the positions whose logits predict an assistant token.

        Only what the assistant says is a target (its end-of-turn marker included): position p predicts ``ids[p + 1]``.
        A conversation longer than ``max_length`` loses its front; an earlier answer that is cut is no target.

        Raises:
            DataError: no assistant message, a last answer that does not fit ``max_length``, or a template whose turns
                cannot be told apart.
        """
        conversation = self._with_profile(messages, sentence)
        if not any(message["role"] == "assistant" for message in conversation):
            raise DataError("a conversation has no assistant message to learn from; at least one is needed")
        if self._marks_answers:
            ids, spans = self._marked(conversation)
        else:
            text = self._apply(conversation)
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids = encoded["input_ids"]
            spans = [_token_span(encoded["offset_mapping"], *span) for span in self._answer_spans(conversation, text)]
        first, end = spans[-1]
        if end - first >= self.max_length:
            raise DataError(f"an answer of {end - first} tokens does not fit data.max_length {self.max_length}; raise it above the answer")
        # What follows the last answer (a line break of the template) is never predicted and need not be computed.
        ids, cut = ids[:end][-self.max_length :], max(0, end - self.max_length)
        positions = [token - 1 - cut for first, end in spans if first > cut for token in range(first, end)]
        return ids, positions

    def _marked(self, conversation: Sequence[Message]) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self.tokenizer.apply_chat_template(
            conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, enable_thinking=False
        )
        mask = [0, *encoded["assistant_masks"], 0]
        starts = [index for index in range(1, len(mask)) if mask[index] and not mask[index - 1]]
        ends = [index for index in range(1, len(mask)) if mask[index - 1] and not mask[index]]
        if not starts:
            raise DataError("the tokenizer's chat template marks no assistant token of a conversation as generated")
        return encoded["input_ids"], [(start - 1, end - 1) for start, end in zip(starts, ends, strict=True)]

    def _answer_spans(self, conversation: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Where each assistant message stands in ``text``, from after its header to its end-of-turn marker."""
        spans = []
        for turn, message in enumerate(conversation):
            if message["role"] != "assistant":
                continue
            content = message["content"].strip()
            until_header = self._apply(conversation[:turn], answer_next=True)
            start = _common(until_header, text)
            found = text.find(content, start)
            alone = self._apply(conversation[: turn + 1])
            if found < 0 or text[start:found].strip():
                raise DataError("the turns of the tokenizer's chat template cannot be told apart; mark answers with {% generation %}")
            marker = alone[alone.rindex(content) + len(content) :].rstrip()
            end = found + len(content)
            spans.append((start, end + _common(marker, text[end:])))
        return spans

    def _text(self, messages: Sequence[Message], sentence: str, answer_next: bool = False) -> str:
        return self._apply(self._with_profile(messages, sentence), answer_next)

    def _with_profile(self, messages: Sequence[Message], sentence: str) -> list[dict[str, str]]:
        conversation = [{"role": message["role"], "content": message["content"]} for message in messages]
        if self.system_prompt is not None and conversation[0]["role"] != "system":
            conversation.insert(0, {"role": "system", "content": self.system_prompt})
        if self.profile_in_prompt:
            about = f"You are answering for this person: {sentence}"
            if conversation[0]["role"] == "system":
                conversation[0]["content"] = f"{about}\n\n{conversation[0]['content']}".rstrip()
            else:
                conversation.insert(0, {"role": "system", "content": about})
        if not self._takes_system and conversation[0]["role"] == "system" and len(conversation) > 1:
            system = conversation.pop(0)
            conversation[0]["content"] = f"{system['content']}\n\n{conversation[0]['content']}".lstrip()
        return conversation

    def _apply(self, messages: Sequence[Message], answer_next: bool = False) -> str:
        try:
            # enable_thinking is read by templates of reasoning models and ignored by all others.
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=answer_next, chat_template=self._template, enable_thinking=False
            )
        except TemplateError as error:
            reason = (str(error).splitlines() or ["unknown reason"])[0]
            raise ModelError(f"the chat template of {self.tokenizer.name_or_path!r} refuses a conversation: {reason}") from None

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _common(first: str, second: str) -> int:
    """Length of the longest common beginning."""
    return next(
        (index for index, (left, right) in enumerate(zip(first, second, strict=False)) if left != right), min(len(first), len(second))
    )


def _token_span(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """The half-open range of tokens that touch the characters [start, end)."""
    touching = [index for index, (left, right) in enumerate(offsets) if left < end and (right > start or left == right >= start)]
    return touching[0], touching[-1] + 1
