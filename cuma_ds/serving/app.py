"""The HTTP side: ``/v1/chat/completions``, ``/v1/models``, ``/health``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from cuma_ds.errors import CumaError
from cuma_ds.files import first_line
from cuma_ds.inference.modeling import unknown_fields
from cuma_ds.inference.sampling import Sampling
from cuma_ds.inference.talk import Talker
from cuma_ds.inference.text import TextStream
from cuma_ds.serving.guard import Guard
from cuma_ds.serving.protocol import ChatRequest, ServingError, chunk, completion, error_content, usage
from cuma_ds.serving.scheduler import Job, Piece, QueueFullError, Scheduler

# Characters of a parameter's name that are repeated in an error.
_LONGEST_NAME = 60


class Settings(NamedTuple):
    """How the server is reached and what it allows.

    name: what clients call the model.  max_tokens: of an answer; also the length where a request names none.
    max_length: tokens of prompt and answer together.  max_body: bytes of a request.  api_key: what clients must send,
    None asks for none.
    """

    name: str
    max_tokens: int
    max_length: int
    max_body: int
    api_key: str | None = None


def make_app(talker: Talker, scheduler: Scheduler, settings: Settings) -> FastAPI:
    """The application. It starts and stops the scheduler.

    Args:
        talker: model, tokenizer and how prompts are written.
        scheduler: of the same model, not yet started.
        settings: of the server.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        try:
            yield
        finally:
            scheduler.stop()
            desk.reading.shutdown(cancel_futures=True)

    desk = Desk(talker, scheduler, settings)
    app = FastAPI(
        title="cuma-ds", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.add_middleware(Guard, api_key=settings.api_key, max_body=settings.max_body)
    for mistake in (ServingError, HTTPException, RequestValidationError):
        app.add_exception_handler(mistake, _refuse)

    @app.get("/health")
    async def health() -> Response:
        running, waiting = scheduler.load()
        status = "ok" if scheduler.alive else "stopped"
        return JSONResponse({"status": status, "running": running, "waiting": waiting}, 200 if scheduler.alive else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [desk.model_card()]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, object]:
        desk.check_model(model)
        return desk.model_card()

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await desk.answer(body, request)

    return app


class Desk:
    """Turns requests into jobs and their pieces into responses (arguments as in :func:`make_app`).

    Attributes:
        reading: the thread that makes tokens of texts, one request after another. A long text holds nobody's answer up.
    """

    def __init__(self, talker: Talker, scheduler: Scheduler, settings: Settings) -> None:
        self.talker, self.scheduler, self.settings = talker, scheduler, settings
        self.name, self._created = settings.name, int(time.time())
        self.reading = ThreadPoolExecutor(1, "reading")

    def model_card(self) -> dict[str, object]:
        """The model as ``/v1/models`` shows it."""
        card = {"id": self.name, "object": "model", "created": self._created, "owned_by": "cuma-ds"}
        return card | {"max_model_len": self.settings.max_length, "takes_profiles": self.talker.takes_profiles}

    def check_model(self, name: str) -> None:
        """Refuse every other name."""
        if name != self.name:
            raise ServingError(
                404, f"there is no model of that name; this server has {self.name!r}", "model", "model_not_found"
            )

    async def answer(self, body: ChatRequest, request: Request) -> Response:
        """Queue the request and answer it, as a stream or in one piece."""
        self.check_model(body.model)
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece]()
        prompt, sentence, warnings = await loop.run_in_executor(self.reading, self._read, body)
        seed = secrets.randbits(63) if body.seed is None else body.seed
        sampling = Sampling(self._longest_answer(body, len(prompt)), body.temperature, body.top_p, seed)
        job = Job(
            prompt,
            sentence,
            sampling,
            TextStream(self.talker.tokenizer, [_text(stop, "stop") for stop in body.stop or [] if stop]),
            lambda piece: _hand_over(loop, pieces, piece),
        )
        try:
            self.scheduler.submit(job)
        except QueueFullError:
            raise ServingError(
                429,
                f"{self.scheduler.limits.max_queue} requests are waiting already; try again later",
                None,
                "queue_full",
                "rate_limit_error",
            ) from None
        request.state.job = job  # the guard cancels it at the end of the request
        identity = request.state.id
        if body.stream:
            stream = self._stream(
                identity, job, pieces, bool(body.stream_options and body.stream_options.include_usage), warnings
            )
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        whole = asyncio.ensure_future(_whole(pieces))
        gone = asyncio.ensure_future(_disconnected(request))
        await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not whole.done():
            whole.cancel()
            return Response(status_code=499)  # the client is gone
        text, finish = whole.result()
        return JSONResponse(
            completion(identity, self.name, text, finish, usage(len(prompt), len(job.tokens)), warnings)
        )

    def _read(self, body: ChatRequest) -> tuple[list[int], str | None, list[str]]:
        """Token ids of the prompt, the profile's sentence and warnings for the client."""
        sentence, warnings = self._profile(body)
        return self._prompt(body, sentence or ""), sentence, warnings

    def _profile(self, body: ChatRequest) -> tuple[str | None, list[str]]:
        """The profile's sentence (None without a profile), and warnings for the client."""
        if body.profile is None:
            if self.talker.takes_profiles:
                example = 'give a "profile": a sentence, or fields such as {"country": "Norway"}'
                message = f"this model answers by who is asking; {example}"
                raise ServingError(400, message, "profile", "profile_missing")
            return None, []
        if not self.talker.takes_profiles:
            raise ServingError(400, "a profile was given, but this model takes none", "profile", "profile_unknown")
        reader = self.talker.opened.reader
        known = () if reader is None else reader.facts.get("fields") or ()
        try:
            sentence, warnings = self.talker.sentence(body.profile), unknown_fields(body.profile, known)
        except CumaError as error:
            raise ServingError(400, first_line(error), "profile", "profile_empty") from None
        for text in (sentence, *warnings):
            _text(text, "profile")
        return sentence, warnings

    def _prompt(self, body: ChatRequest, sentence: str) -> list[int]:
        messages = [message.plain() for message in body.messages]
        for turn in messages:
            _text(turn["content"], "messages")
        try:
            prompt = self.talker.encode(messages, sentence)
        except CumaError as error:
            raise ServingError(400, first_line(error), "messages") from None
        if len(prompt) >= self.settings.max_length:
            message = (
                f"the messages have {len(prompt)} tokens; this server takes {self.settings.max_length} with the answer"
            )
            raise ServingError(400, message, "messages", "context_length_exceeded")
        return prompt

    def _longest_answer(self, body: ChatRequest, prompt_tokens: int) -> int:
        asked = body.max_completion_tokens or body.max_tokens
        room = self.settings.max_length - prompt_tokens
        if asked is None:
            return min(self.settings.max_tokens, room)
        param = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
        if asked > self.settings.max_tokens:
            raise ServingError(
                400,
                f"{param} is {asked}; this server allows up to {self.settings.max_tokens}",
                param,
                "max_tokens_exceeded",
            )
        if asked > room:
            given = f"{param} is {asked} and the messages have {prompt_tokens} tokens"
            message = f"{given}; this server takes {self.settings.max_length} together"
            raise ServingError(400, message, param, "context_length_exceeded")
        return asked

    async def _stream(
        self, identity: str, job: Job, pieces: asyncio.Queue[Piece], include_usage: bool, warnings: list[str]
    ) -> AsyncIterator[str]:
        more: dict[str, object] = {"usage": None} if include_usage else {}
        first = more | ({"warnings": warnings} if warnings else {})
        yield _event(chunk(identity, self.name, {"role": "assistant", "content": ""}, more=first))
        while True:
            piece = await pieces.get()
            if piece.error is not None:
                yield _event(
                    error_content("the server failed to answer this request", "server_error", code="internal_error")
                )
                return
            if piece.text:
                yield _event(chunk(identity, self.name, {"content": piece.text}, more=more))
            if piece.finish:
                break
        yield _event(chunk(identity, self.name, {}, piece.finish, more))
        if include_usage:
            yield _event(chunk(identity, self.name, None, more={"usage": usage(len(job.prompt), len(job.tokens))}))
        yield "data: [DONE]\n\n"


def _hand_over(loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue[Piece], piece: Piece) -> None:
    loop.call_soon_threadsafe(pieces.put_nowait, piece)


async def _whole(pieces: asyncio.Queue[Piece]) -> tuple[str, str]:
    text = ""
    while True:
        piece = await pieces.get()
        if piece.error is not None:
            raise piece.error
        text += piece.text
        if piece.finish:
            return text, piece.finish


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(content: dict[str, object]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _shown(name: str) -> str:
    """The name of a parameter as it may be repeated to the client, who may have sent anything."""
    name = " ".join(name.encode(errors="replace").decode().split())
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."


def _text(text: str, param: str) -> str:
    """``text`` if it can be written as UTF-8. JSON can hold half of a surrogate pair, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ServingError(400, f"{param} holds characters that are no Unicode text", param) from None
    return text


async def _refuse(_: Request, error: Exception) -> Response:
    """Every error in OpenAI's format."""
    if isinstance(error, ServingError):
        return JSONResponse(error.content, error.status, {"Retry-After": "1"} if error.status == 429 else None)
    if isinstance(error, RequestValidationError):
        problem = error.errors()[0]
        param = _shown(".".join(str(part) for part in problem["loc"] if part != "body")) or None
        what = (
            "is no parameter of this server"
            if problem["type"] == "extra_forbidden"
            else problem["msg"].removeprefix("Value error, ")
        )
        message = f"{param}: {what}" if param else what
        return JSONResponse(error_content(message, "invalid_request_error", param), 400)
    assert isinstance(error, HTTPException)
    return JSONResponse(error_content(str(error.detail), "invalid_request_error"), error.status_code, error.headers)
