"""The page: people on top, then a question or a chat, then what was answered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.resources import files
from typing import NamedTuple

import gradio as gr
from fastapi import FastAPI
from jinja2 import Environment
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cuma_ds.errors import ConfigError, CumaError
from cuma_ds.inference.modeling import Profile
from cuma_ds.inference.sampling import Sampling
from cuma_ds.playground.answers import Playground
from cuma_ds.playground.drawing import drawn
from cuma_ds.playground.survey import Field

LETTERS = "ABCD"
# Fields of a person that are seen at once; the others are one press away.
_SEEN_FIELDS = 6
_MAP_COMES = "The map comes next; the first one of a question takes as long as asking every group."
# The page may load nothing from elsewhere. Gradio makes functions of text.
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
)

Talk = list[list[dict[str, str]]]
Input = gr.Textbox | gr.Dropdown | gr.Number


class Conversation(NamedTuple):
    """What was said with each of some people."""

    people: list[Profile]
    said: Talk


class MapOf(NamedTuple):
    """The question whose map is shown."""

    question: str
    options: tuple[str, ...]


@dataclass
class _Halt:
    """Whether somebody asked to stop what is being written for them. Each visitor has one."""

    asked: bool = False

    def ask(self) -> None:
        """Stop after the next piece."""
        self.asked = True


@dataclass
class _Card:
    """Where one person is chosen."""

    column: gr.Column
    inputs: list[Input]


def make_app(playground: Playground) -> FastAPI:
    """The application that serves the page."""
    page = Page(playground)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_OnlyFromHere)
    theme = gr.themes.Default(
        primary_hue="slate", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["monospace"]
    ).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        button_primary_background_fill="*primary_800",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
    )
    return gr.mount_gradio_app(
        app,
        page.blocks,
        path="/",
        footer_links=[],
        run_history=False,  # would keep profiles in the browser
        show_error=False,
        max_file_size=1,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        css=files(__package__).joinpath("page.css").read_text("utf-8"),
        js=_ANNOUNCE,
    )


# Screen readers are told of what is written into these places.
_ANNOUNCE = (
    """() => document.querySelectorAll(".announced").forEach(place => place.setAttribute("aria-live", "polite"))"""
)


class Page:
    """The page of one model.

    Attributes:
        blocks: for Gradio.
    """

    def __init__(self, playground: Playground) -> None:
        self.playground, self.survey = playground, playground.survey
        template = files(__package__).joinpath("parts.html").read_text("utf-8")
        self._parts = Environment(autoescape=True, trim_blocks=True).from_string(template).module
        self.blocks = self._built()

    def _built(self) -> gr.Blocks:
        opened = self.playground.talker.opened
        with gr.Blocks(title=f"{opened.name}: cuma-ds playground", analytics_enabled=False) as blocks:
            least = None if self.survey is None else self.survey.least
            gr.HTML(self._part("notice", opened.name, opened.checkpoint, least))
            count = gr.State(2)
            cards = self._people(count) if self.playground.takes_people else []
            people = [count, *(one for card in cards for one in card.inputs)]
            first = self.survey.questions[0] if self.survey is not None and self.survey.questions else None
            map_of = gr.State(None if first is None else MapOf(first.text, first.options))
            with gr.Tabs():
                with gr.Tab("A question with options"):
                    asked, ask = self._question()
                    answers = gr.HTML(elem_classes="announced", elem_id="answers")
                with gr.Tab("A free chat"):
                    typed, settings, send, stop, again = self._chat()
                    conversation = gr.HTML(elem_classes="announced", elem_id="conversation")
            the_map = gr.HTML(elem_id="map")
            asking = ask.click(
                self.ask,
                [*people, *asked],
                [answers, map_of],
                show_progress="hidden",
                concurrency_id="model",
                concurrency_limit=1,
                api_visibility="private",
            )
            said, halt = gr.State(None), gr.State(_Halt())
            outputs = [conversation, said, typed, map_of]
            inputs = [*people, typed, *settings, said, map_of, halt]
            sending = gr.on(
                [send.click, typed.submit],
                self.send,
                inputs,
                outputs,
                show_progress="hidden",
                concurrency_id="model",
                concurrency_limit=1,
                api_visibility="private",
            )
            for answered in (asking, sending):
                answered.then(
                    self.draw,
                    [*people, map_of],
                    the_map,
                    show_progress="hidden",
                    trigger_mode="always_last",
                    concurrency_id="map",
                    concurrency_limit=1,
                    api_visibility="private",
                )
            stop.click(_Halt.ask, halt, None, queue=False, api_visibility="private")
            again.click(lambda: ("", None), None, [conversation, said], queue=False, api_visibility="private")
        return blocks

    def _people(self, count: gr.State) -> list[_Card]:
        cards = []
        with gr.Row(equal_height=True):
            for row, letter in enumerate(LETTERS):
                with gr.Column(min_width=260, visible=row < 2, elem_classes=["person-card", f"who-{row}"]) as column:
                    gr.HTML(
                        f'<h3><span class="letter" aria-hidden="true">{letter}</span>Person {letter}</h3>',
                        padding=False,
                    )
                    inputs = self._fields(row)
                    reads = gr.HTML(self._reads(*(one.value for one in inputs)), padding=False)
                    gr.on([one.change for one in inputs], self._reads, inputs, reads, queue=False,
                          show_progress="hidden", api_visibility="private")  # fmt: skip
                cards.append(_Card(column, inputs))
        with gr.Row():
            more = gr.Button("Add a person", size="sm", scale=0, min_width=150)
            fewer = gr.Button("Remove the last", size="sm", scale=0, min_width=150)
        columns = [card.column for card in cards]
        for button, step in ((more, 1), (fewer, -1)):
            button.click(
                lambda shown, step=step: _shown(shown + step), count, [count, *columns], queue=False,
                show_progress="hidden", api_visibility="private",
            )  # fmt: skip
        return cards

    def _fields(self, row: int) -> list[Input]:
        fields, letter = self.playground.fields, LETTERS[row]
        if not fields:
            label = f"Person {letter} in one sentence"
            return [gr.Textbox(label=label, placeholder="A 55-year-old Buddhist living in Thailand.", max_lines=3)]
        start = None if self.survey is None else self.survey.map_field
        inputs = [_input(field, letter, row if field is start else None) for field in fields[:_SEEN_FIELDS]]
        if len(fields) > _SEEN_FIELDS:
            with gr.Accordion("More", open=False):
                rest = fields[_SEEN_FIELDS:]
                inputs += [_input(field, letter, row if field is start else None) for field in rest]
        return inputs

    def _question(self) -> tuple[list[Input], gr.Button]:
        known = self.survey.questions if self.survey is not None else []
        first = known[0] if known else None
        if known:
            choices = [(one.text, index) for index, one in enumerate(known)]
            picked = gr.Dropdown(choices, value=0, label="A question of the survey")
        with gr.Row():
            text, offered = (first.text, "\n".join(first.options)) if first else ("", "")
            question = gr.Textbox(text, label="Question", lines=4, min_width=260)
            options = gr.Textbox(offered, label="Options, one on each line", lines=4, min_width=260)
        if known:
            picked.input(
                lambda index: (known[index].text, "\n".join(known[index].options)), picked, [question, options],
                queue=False, show_progress="hidden", api_visibility="private",
            )  # fmt: skip
        with gr.Row():
            pressed = gr.Button("Ask", variant="primary", elem_id="ask", scale=0, min_width=180)
        return [question, options], pressed

    def _chat(self) -> tuple[gr.Textbox, list[Input], gr.Button, gr.Button, gr.Button]:
        usual = Sampling()
        typed = gr.Textbox(label="Your message", placeholder="What is a good life?", max_lines=6, elem_id="message")
        with gr.Row():
            send = gr.Button("Send", variant="primary", elem_id="send", scale=0, min_width=180)
            stop = gr.Button("Stop", scale=0, min_width=100)
            again = gr.Button("New conversation", scale=0, min_width=220)
        with gr.Accordion("How answers are written", open=False), gr.Row():
            settings: list[Input] = [
                gr.Number(usual.max_new_tokens, label="Longest answer, in tokens", precision=0),
                gr.Number(usual.temperature, label="Temperature (0: the most probable)", step=0.1),
                gr.Number(usual.top_p, label="Top-p", step=0.05),
                gr.Number(usual.seed, label="Seed", precision=0),
            ]
        return typed, settings, send, stop, again

    def ask(self, shown: int, *values: object) -> Iterator[tuple[object, object]]:
        """Answer a choice question: the bars, then the experts, and whose map to draw."""
        *fields, question, lines = values
        text = str(question or "").strip()
        options = [line.strip() for line in str(lines or "").splitlines() if line.strip()]
        try:
            people = self._chosen(shown, fields)
            yield self._part("waiting", "Asking …"), gr.skip()
            choices = self.playground.choose(text, options, people)
            bars = self._part("bars", text, options, choices, self._names(people), self._letters(people))
            yield bars, gr.skip()
            yield bars + self._experts(text, people), MapOf(text, tuple(options))
        except CumaError as error:
            yield self._part("alert", str(error)), gr.skip()

    def send(self, shown: int, *values: object) -> Iterator[tuple[object, ...]]:
        """Go on with a conversation; it starts anew where other people are chosen."""
        *fields, typed, tokens, temperature, top_p, seed, before, map_of, halt = values
        assert isinstance(halt, _Halt)
        halt.asked = False
        text = str(typed or "").strip()
        kept = gr.skip()
        try:
            people = self._chosen(shown, fields)
            sampling = _sampling(tokens, temperature, top_p, seed)
            names, letters = self._names(people), self._letters(people)
            so_far = before.said if isinstance(before, Conversation) and before.people == people else None
            said = [[*turns, {"role": "user", "content": text}] for turns in so_far or [[] for _ in people or [{}]]]
            with closing(self.playground.replies(said, people, sampling)) as writing:
                for texts in writing:
                    answers = [{"role": "assistant", "content": one} for one in texts]
                    told = [[*turns, answer] for turns, answer in zip(said, answers, strict=True)]
                    yield self._part("talk", told, names, letters, writing=True), kept, "", kept
                    if halt.asked:
                        break
            html = self._part("talk", told, names, letters, writing=False) + self._experts(text, people)
            drawn_of = map_of if isinstance(map_of, MapOf) else MapOf(text, ())
            yield html, Conversation(people, told), "", drawn_of
        except CumaError as error:
            yield self._part("alert", str(error)), kept, kept, kept

    def draw(self, shown: int, *values: object) -> Iterator[str]:
        """The map with the people on it. It has an event of its own, so that nobody waits for it to go on."""
        *fields, of = values
        try:
            people = self._chosen(shown, fields)
            if isinstance(of, MapOf):
                if not self.playground.has_map(of.question, of.options):
                    yield self._part("waiting", _MAP_COMES)
                places = self.playground.places(of.question, of.options, people)
                yield "" if places is None else self._part("map", drawn(places), LETTERS, of.question, places)
        except CumaError:
            yield ""  # the answers say why

    def _chosen(self, shown: int, values: Sequence[object]) -> list[Profile]:
        """The people that the inputs describe; none for a model that takes no profiles."""
        if not self.playground.takes_people:
            return []
        width, people = len(values) // len(LETTERS), []
        for row, letter in enumerate(LETTERS[:shown]):
            try:
                people.append(self.playground.person([str(value or "") for value in values[row * width :][:width]]))
            except CumaError as error:
                raise ConfigError(f"Person {letter}: {error}") from None
        return people

    def _reads(self, *values: object) -> str:
        """What the model reads of one person."""
        try:
            person = self.playground.person([str(value or "") for value in values])
            return self._part("reads", self.playground.sentences([person])[0], "")
        except CumaError as error:
            return self._part("reads", "", str(error))

    def _part(self, name: str, *values: object, **more: object) -> str:
        """One macro of parts.html, filled in."""
        return str(getattr(self._parts, name)(*values, **more))

    def _names(self, people: Sequence[Profile]) -> list[str]:
        return self.playground.sentences(people) if people else ["Everybody: this model takes no profile."]

    def _letters(self, people: Sequence[Profile]) -> str:
        return LETTERS[: len(people)]

    def _experts(self, text: str, people: Sequence[Profile]) -> str:
        return self._part("experts", self.playground.experts(text, people), LETTERS)


class _OnlyFromHere:
    """ASGI middleware: tells browsers to load nothing from elsewhere, and to tell nobody where they were."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(b"content-security-policy", _POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        await self.app(scope, receive, sealed if scope["type"] == "http" else send)


def _shown(people: int) -> list[object]:
    """How many people there are now, at least two, and which cards are seen."""
    people = min(max(people, 2), len(LETTERS))
    return [people, *(gr.update(visible=row < people) for row in range(len(LETTERS)))]


def _input(field: Field, letter: str, start: int | None) -> Input:
    """Where a field is chosen. ``start`` says which of its largest values stands there first."""
    name = field.name.replace("_", " ")
    label = f"{name[:1].upper()}{name[1:]} of {letter}"
    if field.range is not None:
        return gr.Textbox(label=f"{label}, {field.range[0]:g} to {field.range[1]:g}", placeholder="not said")
    if not field.values:
        return gr.Textbox(label=label)
    first = field.largest[start % len(field.largest)] if start is not None else ""
    return gr.Dropdown([("not said", ""), *((value, value) for value in field.values)], value=first, label=label)


def _sampling(tokens: object, temperature: object, top_p: object, seed: object) -> Sampling:
    """The settings; one that was emptied is as usual."""
    usual = Sampling()

    def number(value: object, otherwise: float) -> float:
        return float(value) if isinstance(value, int | float) else otherwise

    return Sampling(
        int(number(tokens, usual.max_new_tokens)),
        number(temperature, usual.temperature),
        number(top_p, usual.top_p),
        int(number(seed, usual.seed)),
    )
