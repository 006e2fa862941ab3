"""From questions and conversations to token ids, by the tokenizer's own chat template."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from cuma_ds.config import DataSection
from cuma_ds.data.control_tokens import ControlTokens
from cuma_ds.errors import DataError, ModelError
from cuma_ds.files import first_line

if TYPE_CHECKING:
    from cuma_ds.data.shots import Shots

logger = logging.getLogger(__name__)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Message = Mapping[str, str]
# Keys of the section ``data`` that decide how prompts are written.
PROMPT_KEYS = ("max_length", "profile_in_prompt", "profile_prompt", "system_prompt", "prompt_style", "option_order")
PromptStyle = Literal["letters", "metadata", "codebook"]
OptionOrder = Literal["fixed", "reversed", "average"]

# What WorldValuesBench puts before all its questions: it asks for a number, where the options have letters.
_NUMBER_SCALE = re.compile(
    r"^On a scale of (-?\d+) to (-?\d+), \1 meaning '.+?' and \2 meaning '.+?', (?=\S)", re.DOTALL
)
# Put before every template: those that print today's date would train on other tokens each day.
_NO_CLOCK = "{% macro strftime_now(format) %}2024-07-26{% endmacro %}"
# Answers that a renderer remembers the tokens of.
_REMEMBERED = 1024
# Stands in for an answer, to find where a template puts it.
_MARK = "Qx7Zv"

_PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


class PromptTooLong(DataError):
    """A prompt that does not fit; nothing that could be cut is left.

    Attributes:
        tokens: how many it has.
    """

    def __init__(self, tokens: int, limit: int, what: str) -> None:
        super().__init__(
            f"{what} has {tokens} tokens, but only {limit} can be read, and nothing is cut; shorten it, "
            "or allow more tokens"
        )
        self.tokens = tokens


def ask(question: str, options: Sequence[str], style: PromptStyle, order: OptionOrder) -> str:
    """A choice question as the user's message: the question, a line per option, what to answer with.

    Args:
        question: the question as asked; with ``codebook`` its label, see :func:`worded`.
        options: answers in order, shown as A, B, C, ... (from the last one on with ``reversed``).
        style: ``letters`` leaves out the number scale that a question of WorldValuesBench starts with; ``codebook``
            has all options on one line and ends as the authors' prompt does.
        order: of the options.
    """
    if style == "letters":
        asked = _NUMBER_SCALE.sub("", question)
        question = question if asked == question else asked[0].upper() + asked[1:]
    shown = options[::-1] if order == "reversed" else options
    lettered = [f"{letter}. {option}" for letter, option in zip(LETTERS, shown, strict=False)]
    if style == "codebook":
        return f"{question}\n{' '.join(lettered)}\nYou can only choose one option."
    lines = [question, *lettered]
    last = LETTERS[len(options) - 1]
    return "\n".join([*lines, f"Answer with one letter, A{' or ' if len(options) == 2 else ' to '}{last}."])


def worded(question: str, label: str | None, style: PromptStyle) -> str:
    """The words in which :func:`ask` asks a question: with ``codebook`` its short label, where it has one."""
    return label if style == "codebook" and label else question


class Renderer:
    """Renders for one tokenizer; every token id of training and evaluation comes from here.

    Args:
        tokenizer: a fast ``transformers`` tokenizer; without a chat template, plain ``User: ... Assistant:`` text is
            used.
        max_length: tokens of a prompt with its answer. Conversations lose early turns to fit; nothing else is ever cut.
        profile_in_prompt: put the profile sentence into the system prompt as well.
        profile_prompt: how; ``{profile}`` stands for the sentence.
        system_prompt: for conversations without one; None leaves it to the template.
        prompt_style: ``letters`` leaves out the number scale that a question of WorldValuesBench starts with;
            ``metadata`` asks it as the benchmark words it; ``codebook`` is as :func:`ask` says.
        option_order: ``reversed`` shows the last option as A. ``average`` is for who asks twice; here it is as
            ``fixed``.

    Raises:
        ModelError: the tokenizer cannot map text to tokens (not a fast one) or its template cannot be rendered.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        profile_in_prompt: bool = False,
        profile_prompt: str = "You are answering for this person: {profile}",
        system_prompt: str | None = None,
        prompt_style: PromptStyle = "metadata",
        option_order: OptionOrder = "fixed",
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"the tokenizer {tokenizer.name_or_path!r} is a slow one; a folder with tokenizer.json is needed"
            )
        self.tokenizer = tokenizer
        self._control = ControlTokens(tokenizer)
        self.max_length = max_length
        self.profile_in_prompt = profile_in_prompt
        self.profile_prompt = profile_prompt
        self.system_prompt = system_prompt
        self.prompt_style = prompt_style
        self.option_order = option_order
        self.shots: Shots | None = None
        self._template = _NO_CLOCK + (
            _PLAIN_TEMPLATE if tokenizer.chat_template is None else tokenizer.get_chat_template()
        )
        if tokenizer.chat_template is None:
            logger.warning(
                "the tokenizer has no chat template; conversations are written as plain 'User: ... Assistant: ...' text"
            )
        probe = [{"role": "system", "content": "Qx7"}, {"role": "user", "content": "Hi"}]
        try:
            self._takes_system = "Qx7" in self._apply(probe)
        except ModelError:
            self._takes_system = False
        self._letters: dict[int, list[int]] = {}
        # A survey question has few answers, and many people who gave them.
        self._answer_ids = lru_cache(_REMEMBERED)(self._encode_answer)

    @classmethod
    def of(cls, tokenizer: Any, data: DataSection) -> Renderer:
        """The renderer that the section ``data`` of a recipe asks for."""
        return cls(tokenizer, **{key: getattr(data, key) for key in PROMPT_KEYS})

    def with_shots(self, shots: Shots) -> Renderer:
        """The same, with examples of :class:`~cuma_ds.data.shots.Shots` before each choice question."""
        other = copy.copy(self)
        other.shots = shots
        return other

    def with_options_reversed(self) -> Renderer:
        """The same, with options shown the other way round."""
        other = copy.copy(self)
        other.option_order = "fixed" if self.option_order == "reversed" else "reversed"
        return other

    def encode_choice(self, question: str, options: Sequence[str], sentence: str) -> list[int]:
        """Token ids of the prompt; the token that follows the last one is the answer's letter.

        Args:
            question: the question as asked, see :func:`worded`.
            options: answers in order, shown as A, B, C, ... (from the last one on with ``option_order: reversed``).
            sentence: the profile sentence; used only with ``profile_in_prompt`` and for examples.

        Raises:
            PromptTooLong: the prompt has more than ``max_length`` tokens.
        """
        messages = [] if self.shots is None else self._examples(self.shots, sentence, question)
        asked = ask(question, options, self.prompt_style, self.option_order)
        ids = self.encode_prompt([*messages, {"role": "user", "content": asked}], sentence)
        if len(ids) > self.max_length:
            raise PromptTooLong(len(ids), self.max_length, "a prompt")
        return ids

    def _examples(self, shots: Shots, sentence: str, question: str) -> list[Message]:
        """Questions that others were asked, each with its answer's letter."""
        messages: list[Message] = []
        for shot in shots(sentence, question):
            asked = ask(shot.question, shot.options, self.prompt_style, self.option_order)
            shown = len(shot.options) - 1 - shot.chosen if self.option_order == "reversed" else shot.chosen
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": LETTERS[shown]}]
        return messages

    def encode_prompt(self, messages: Sequence[Message], sentence: str, longest: int | None = None) -> list[int]:
        """Token ids of a conversation that the assistant is to continue.

        Args:
            longest: whole early turns are left out to stay within this number of tokens; None leaves out nothing.

        Raises:
            PromptTooLong: the last question has more than ``longest`` tokens.
        """
        left: Sequence[Message] | None = messages
        while left is not None:
            ids = self._ids(self._apply(self._with_profile(left, sentence), answer_next=True))
            if longest is None or len(ids) <= longest:
                return ids
            left = _without_first_turn(left)
        assert longest is not None
        raise PromptTooLong(len(ids), longest, "the last question of a conversation")

    def letter_ids(self, count: int) -> list[int]:
        """The token of each of ``count`` options, as it would follow :meth:`encode_choice`.

        Raises:
            DataError: more options than letters, or a letter that is not one distinct token after the prompt.
        """
        if not 2 <= count <= len(LETTERS):
            raise DataError(f"a question has {count} options; allowed: 2 to {len(LETTERS)}")
        if count not in self._letters:
            ids = []
            for letter in LETTERS[:count]:
                prompt, answer, _ = self._asked(
                    [{"role": "user", "content": "?"}, {"role": "assistant", "content": letter}]
                )
                tokens = self._continuation(prompt, answer)
                if len(tokens) != 1 or tokens[0] in ids:
                    raise DataError(
                        f"the letter {letter!r} is not a token of its own after the prompt of "
                        f"{self.tokenizer.name_or_path!r}"
                    )
                ids += tokens
            self._letters[count] = ids
        ids = self._letters[count]
        return ids[::-1] if self.option_order == "reversed" else ids

    def encode_chat(
        self, messages: Sequence[Message], sentence: str, last_only: bool = False
    ) -> tuple[list[int], list[int]]:
        """Token ids of a conversation and the positions whose logits predict an assistant token.

        Only what the assistant says is a target (its end-of-turn marker included): position p predicts ``ids[p + 1]``.
        The last answer follows exactly the tokens of :meth:`encode_prompt`. Earlier answers are learned as the
        template shows them there. A conversation longer than ``max_length`` loses whole early turns, but never its
        system message.

        Args:
            messages: a conversation; what follows the assistant's last answer is left out.
            sentence: the profile sentence; used only with ``profile_in_prompt``.
            last_only: only the assistant's last answer is a target.

        Raises:
            PromptTooLong: the last question with its answer has more than ``max_length`` tokens.
            DataError: no assistant message, or a template that does not show each answer as it is.
        """
        answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise DataError("a conversation has no assistant message to learn from; at least one is needed")
        left: Sequence[Message] | None = messages[: answers[-1] + 1]
        while left is not None:
            ids, positions = self._encode_turns(self._with_profile(left, sentence), last_only)
            if len(ids) <= self.max_length:
                return ids, positions
            left = _without_first_turn(left)
        raise PromptTooLong(len(ids), self.max_length, "the last question of a conversation with its answer")

    def encode_answers(
        self, messages: Sequence[Message], answers: Sequence[str], sentence: str
    ) -> list[tuple[list[int], list[int]]]:
        """Several answers to one conversation: for each, token ids and the positions whose logits predict its tokens.

        All have the same prompt, of the same turns: early turns are left out until the longest answer fits
        ``max_length``, but never the system message or the last question. Only the answer is a target (its end-of-turn
        marker included); it has the tokens that :meth:`encode_chat` gives the last answer of a conversation.

        Args:
            messages: the conversation so far; the user speaks last.
            answers: what the assistant may say next.
            sentence: the profile sentence; used only with ``profile_in_prompt``.

        Raises:
            PromptTooLong: the last question with its longest answer has more than ``max_length`` tokens.
        """
        left: Sequence[Message] | None = messages
        while left is not None:
            said = tuple((message["role"], message["content"]) for message in left)
            told = [self._answer_ids(said, answer, sentence if self.profile_in_prompt else "") for answer in answers]
            longest = max(len(prompt) + len(ids) for prompt, ids in told)
            if longest <= self.max_length:
                return [
                    (prompt + ids, list(range(len(prompt) - 1, len(prompt) - 1 + len(ids)))) for prompt, ids in told
                ]
            left = _without_first_turn(left)
        raise PromptTooLong(longest, self.max_length, "the last question of a conversation with its longest answer")

    def _encode_answer(
        self, said: Sequence[tuple[str, str]], answer: str, sentence: str
    ) -> tuple[list[int], list[int]]:
        """Token ids of a prompt of (role, content), and of an answer to it with its end-of-turn marker."""
        before = self._with_profile([{"role": role, "content": content} for role, content in said], sentence)
        prompt, told, marker = self._asked([*before, {"role": "assistant", "content": answer}])
        return self._ids(prompt), self._continuation(prompt, told + marker)

    def _encode_turns(self, conversation: Sequence[Message], last_only: bool) -> tuple[list[int], list[int]]:
        """Ids and positions of a conversation that ends with an answer."""
        prompt, answer, marker = self._asked(conversation)
        ids, offsets = self._control.encode(prompt)
        positions = []
        for turn, message in enumerate(conversation[:-1]):
            if message["role"] == "assistant" and not last_only:
                first, end = _token_span(offsets, *self._earlier(conversation[:-1], turn, prompt, marker))
                positions += [token - 1 for token in range(first, end)]
        answered = self._continuation(prompt, answer + marker)
        positions += range(len(ids) - 1, len(ids) + len(answered) - 1)
        return ids + answered, positions

    def _asked(self, conversation: Sequence[Message]) -> tuple[str, str, str]:
        """The prompt for the conversation's last answer, that answer as the template writes it, and its end-of-turn
        marker.
        """
        *before, last = conversation
        prompt = self._apply(before, answer_next=True)
        whole = self._apply(conversation)
        header, suffix = self._around([*before, {**last, "content": _MARK}])
        # Where the prompt has more than the template writes before an answer (a thought, a blank), the answer follows
        # the prompt.
        start = len(prompt) if header.startswith(prompt) else len(header)
        return prompt, whole[start : len(whole) - len(suffix)], suffix.rstrip()

    def _earlier(self, before: Sequence[Message], turn: int, prompt: str, marker: str) -> tuple[int, int]:
        """Where an earlier answer stands in the prompt, its end-of-turn marker included."""
        header, suffix = self._around(
            [*before[:turn], {**before[turn], "content": _MARK}, *before[turn + 1 :]], answer_next=True
        )
        asked = self._apply(before[:turn], answer_next=True)
        start, end = len(asked) if header.startswith(asked) else len(header), len(prompt) - len(suffix)
        return start, end + _common(marker, prompt[end:])

    def _around(self, conversation: Sequence[Message], answer_next: bool = False) -> tuple[str, str]:
        """What the template writes before and after the one message that is ``_MARK``."""
        before, mark, after = self._apply(conversation, answer_next).rpartition(_MARK)
        if not mark:
            raise DataError(
                f"the chat template of {self.tokenizer.name_or_path!r} does not show each answer of a conversation "
                "as it is"
            )
        return before, after

    def _continuation(self, prompt: str, text: str) -> list[int]:
        """Token ids of what is written after a prompt whose own tokens stand already."""
        # Where the prompt's last token would join the text's first (a blank does), the text is read as after a line
        # break.
        for lead in (prompt, "\n"):
            ids, whole = self._ids(lead), self._ids(lead + text)
            if whole[: len(ids)] == ids:
                return whole[len(ids) :]
        return self._ids(text)

    def _with_profile(self, messages: Sequence[Message], sentence: str) -> list[dict[str, str]]:
        conversation = [{"role": message["role"], "content": message["content"]} for message in messages]
        if self.system_prompt is not None and conversation[0]["role"] != "system":
            conversation.insert(0, {"role": "system", "content": self.system_prompt})
        if self.profile_in_prompt:
            about = self.profile_prompt.replace("{profile}", sentence)
            if conversation[0]["role"] == "system":
                conversation[0]["content"] = f"{about}\n\n{conversation[0]['content']}".rstrip()
            else:
                conversation.insert(0, {"role": "system", "content": about})
        if not self._takes_system and conversation[0]["role"] == "system" and len(conversation) > 1:
            system = conversation.pop(0)
            conversation[0]["content"] = f"{system['content']}\n\n{conversation[0]['content']}".lstrip()
        return conversation

    def _apply(self, messages: Sequence[Message], answer_next: bool = False) -> str:
        """What the template writes, with names of control tokens that stand in messages hidden."""
        said = [{**message, "content": self._control.hide(message["content"])} for message in messages]
        try:
            return self.tokenizer.apply_chat_template(
                said,
                tokenize=False,
                add_generation_prompt=answer_next,
                chat_template=self._template,
                # Read by templates of reasoning models, and by those that print a date; ignored by all others.
                enable_thinking=False,
                date_string="26 Jul 2024",
            )
        except Exception as error:  # a template is a program, and fails as one
            raise ModelError(
                f"the chat template of {self.tokenizer.name_or_path!r} refuses a conversation: {first_line(error)}"
            ) from None

    def _ids(self, text: str) -> list[int]:
        return self._control.ids(text)


def _without_first_turn(messages: Sequence[Message]) -> Sequence[Message] | None:
    """The conversation from its second question on, behind its system message; None where that is the only one."""
    system = [message for message in messages[:1] if message["role"] == "system"]
    questions = [turn for turn, message in enumerate(messages) if message["role"] == "user"]
    return [*system, *messages[questions[1] :]] if len(questions) > 1 else None


def _common(first: str, second: str) -> int:
    """Length of the longest common beginning."""
    return next(
        (index for index, (left, right) in enumerate(zip(first, second, strict=False)) if left != right),
        min(len(first), len(second)),
    )


def _token_span(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """The half-open range of tokens that touch the characters [start, end)."""
    touching = [
        index for index, (left, right) in enumerate(offsets) if left < end and (right > start or left == right >= start)
    ]
    return touching[0], touching[-1] + 1
