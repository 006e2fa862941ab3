"""What the page shows, computed by the functions that every other door uses. Nothing here knows of a page."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from queue import SimpleQueue
from typing import NamedTuple

import torch

from cuma_ds.data.rendering import Message, ask
from cuma_ds.errors import ConfigError
from cuma_ds.inference.modeling import Profile
from cuma_ds.inference.sampling import Sampling
from cuma_ds.inference.talk import Talker, experts_of
from cuma_ds.playground.landscape import Landscape, Places, landscape, placed
from cuma_ds.playground.survey import Field, Own, Survey

# Groups on a map, those that are asked before others may ask, and maps of questions that are kept.
_MOST_GROUPS, _AT_ONCE, _KEPT_MAPS = 100, 8, 8
# Characters of one text that is sent to the model.
_LONGEST_TEXT = 20_000


class Choice(NamedTuple):
    """What one person is predicted to choose: the share of each option, and what such people answered themselves."""

    predicted: list[float]
    own: Own | None


class Playground:
    """A model that is asked as several people; one request at a time, others wait.

    Args:
        talker: asks the model.
        survey: of its data; None where there is none.

    Attributes:
        fields: that people are chosen by; none where a person is described by a sentence.
    """

    def __init__(self, talker: Talker, survey: Survey | None) -> None:
        self.talker, self.survey = talker, survey
        self._asking = threading.Lock()
        self._landscapes: dict[tuple[str, ...], Landscape | None] = {}
        reader = talker.opened.reader
        named = [] if reader is None else [Field(name) for name in reader.facts.get("fields") or ()]
        self.fields = named if survey is None else survey.fields

    @property
    def takes_people(self) -> bool:
        """Whether answers depend on who is asked."""
        return self.talker.takes_profiles

    def person(self, texts: Sequence[str]) -> Profile:
        """The profile that somebody describes.

        Args:
            texts: one for each of ``fields``, empty where nothing is said; a sentence where there are no fields.

        Raises:
            ConfigError: nothing is said, or a number that the field does not take; it is not repeated.
        """
        texts = [text.strip() for text in texts]
        if not any(texts):
            raise ConfigError("say something about this person first")
        if not self.fields:
            return texts[0]
        return {field.name: _value(field, text) for field, text in zip(self.fields, texts, strict=True) if text}

    def sentences(self, people: Sequence[Profile]) -> list[str]:
        """People as the sentences that the model reads."""
        return [self.talker.sentence(person) for person in people]

    def choose(self, question: str, options: Sequence[str], people: Sequence[Profile]) -> list[Choice]:
        """What each person is predicted to choose; one result for a model that takes no profiles.

        Raises:
            CumaError: the question cannot be asked.
        """
        _check("the question", question)
        _check("the options", *options)
        if len(options) < 2 or len(set(options)) < len(options):
            raise ConfigError("a question needs at least two options, each on a line of its own and no two alike")
        with self._asking:
            shares = self.talker.choose(question, options, people)
        who: list[dict[str, str] | None] = [
            None if isinstance(person, str) else {name: str(value) for name, value in person.items()}
            for person in people or [{}]
        ]
        told = self.survey
        return [
            Choice(predicted, told.own(question, options, fields, predicted) if told and fields is not None else None)
            for predicted, fields in zip(shares, who, strict=True)
        ]

    def replies(
        self, conversations: Sequence[Sequence[Message]], people: Sequence[Profile], sampling: Sampling
    ) -> Generator[list[str], None, None]:
        """What each person's answer has become so far, again and again while all are written; the last are whole.

        Closing the iterator stops the writing.

        Args:
            conversations: one with each person, or a single one for a model that takes no profiles.
            people: who is asked.
            sampling: how answers are written.

        Raises:
            CumaError: the conversation cannot be continued.
        """
        for conversation in conversations:
            _check("the message", *(turn["content"] for turn in conversation))
        pieces: SimpleQueue[tuple[int, str] | list[str] | BaseException] = SimpleQueue()
        closed = threading.Event()

        def write(row: int, piece: str) -> None:
            if closed.is_set():
                raise _ClosedError
            pieces.put((row, piece))

        def work() -> None:
            try:
                with self._asking:
                    pieces.put(self.talker.replies(conversations, people, write, sampling))
            except BaseException as error:
                pieces.put(error)

        thread = threading.Thread(target=work, name="writes answers", daemon=True)
        thread.start()
        texts = [""] * len(conversations)
        try:
            while True:
                told = pieces.get()
                if isinstance(told, BaseException):
                    raise told
                if isinstance(told, list):
                    yield told
                    return
                texts[told[0]] += told[1]
                if pieces.empty():
                    yield list(texts)
        finally:
            closed.set()
            thread.join()

    def experts(self, message: str, people: Sequence[Profile]) -> list[tuple[str, list[str]]]:
        """Where people are routed most differently, see :func:`.experts_of`; empty for a model without routers."""
        with self._asking:
            gates_BRE = self.talker.gates(_said(message), people)
        return [] if gates_BRE is None else experts_of(gates_BRE, self.talker.router_names)

    def has_map(self, question: str, options: Sequence[str]) -> bool:
        """Whether the map of a question was made already, so that people are placed on it at once."""
        return (question, *options) in self._landscapes

    def places(self, question: str, options: Sequence[str], people: Sequence[Profile]) -> Places | None:
        """People on the map of a question, or of a message where there are no options.

        Returns:
            None for a model without routers, or where fewer than three groups may be shown.
        """
        if not self.has_map(question, options):
            self._landscapes[question, *options] = self._made_landscape(question, options)
            for oldest in list(self._landscapes)[:-_KEPT_MAPS]:
                del self._landscapes[oldest]
        land = self._landscapes.get((question, *options))
        if land is None or not people:
            return None
        with self._asking:
            gates_BRE = self.talker.gates(self._asked(question, options), people)
        assert gates_BRE is not None  # there is a map
        return placed(land, gates_BRE.numpy())

    def _made_landscape(self, question: str, options: Sequence[str]) -> Landscape | None:
        field = None if self.survey is None else self.survey.map_field
        if field is None or not self.talker.router_names:
            return None
        names = field.values[:_MOST_GROUPS]
        asked, gates = self._asked(question, options), []
        for start in range(0, len(names), _AT_ONCE):
            with self._asking:
                gates_GRE = self.talker.gates(asked, [{field.name: name} for name in names[start : start + _AT_ONCE]])
            assert gates_GRE is not None
            gates.append(gates_GRE)
        return landscape(names, torch.cat(gates).numpy())

    def _asked(self, question: str, options: Sequence[str]) -> list[Message]:
        """A question as evaluation asks it, whose map this is."""
        if not options:
            return _said(question)
        renderer = self.talker.renderer
        return _said(ask(question, options, renderer.prompt_style, renderer.option_order))


class _ClosedError(Exception):
    """Nobody waits for the rest of an answer."""


def _value(field: Field, text: str) -> str:
    """What was written into a field, as the data would have it."""
    if field.range is None:
        return text
    low, high = field.range
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not low <= number <= high:
        raise ConfigError(f"{field.name} takes a number from {low:g} to {high:g}")
    return str(int(number)) if number.is_integer() else str(number)


def _said(message: str) -> list[Message]:
    return [{"role": "user", "content": message}]


def _check(what: str, *texts: str) -> None:
    """Refuse texts that are empty, too long, or no Unicode (half of a surrogate pair)."""
    for text in texts:
        if not text.strip():
            raise ConfigError(f"{what}: nothing is written there yet")
        if len(text) > _LONGEST_TEXT:
            raise ConfigError(f"{what}: {len(text):,} characters are too many; shorten it")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{what}: there are characters that are no Unicode text") from None
