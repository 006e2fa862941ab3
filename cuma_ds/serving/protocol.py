"""What the server reads and writes: the chat-completions format of OpenAI, with a ``profile`` beside the messages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from cuma_ds.data.rendering import Message


class ServingError(Exception):
    """A request that is refused; the client reads it in OpenAI's error format.

    Args:
        status: of HTTP.
        message: one line.
        param: the field of the request it is about.
        code: machine-readable reason.
        kind: OpenAI's error type.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, kind: str = "invalid_request_error"
    ) -> None:
        super().__init__(message)
        self.status = status
        self.content = error_content(message, kind, param, code)


def error_content(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Strict(BaseModel):
    # A parameter we would have to ignore changes the answer silently; it is refused instead.
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class TextPart(_Strict):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[TextPart]

    @field_validator("content", mode="before")
    @classmethod
    def _parts(cls, value: Any) -> Any:
        return [{"type": "text", "text": value}] if isinstance(value, str) else value

    def plain(self) -> Message:
        """Role and text as chat templates take them."""
        return {"role": "system" if self.role == "developer" else self.role, "content": "".join(part.text for part in self.content)}


class StreamOptions(_Strict):
    """What a stream carries besides the answer."""

    include_usage: bool = False


class ChatRequest(_Strict):
    """Body of ``POST /v1/chat/completions``."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    profile: str | dict[str, Any] | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    stop: list[str] | None = Field(None, max_length=4)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    # Taken because clients send them, at the only value that is done.
    n: Literal[1] = 1
    logprobs: Literal[False] | None = None
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    user: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("profile", mode="before")
    @classmethod
    def _profile(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, str | dict):
            raise ValueError('expected a sentence, or fields such as {"country": "Norway"}')
        return value


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts; the token that ends an answer counts."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def completion(identity: str, model: str, text: str, finish: str, used: dict[str, int], warnings: Sequence[str]) -> dict[str, Any]:
    """The answer in one piece."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": None, "finish_reason": finish}
    return _answer(identity, model, "chat.completion", [choice]) | {"usage": used} | ({"warnings": list(warnings)} if warnings else {})


def chunk(identity: str, model: str, delta: dict[str, str] | None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    """One piece of a streamed answer; without a delta it has no choice, only what ``more`` says."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
    return _answer(identity, model, "chat.completion.chunk", choices) | more


def _answer(identity: str, model: str, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": identity, "object": kind, "created": int(time.time()), "model": model, "choices": choices}
