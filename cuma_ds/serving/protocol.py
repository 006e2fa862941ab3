"""What the server reads and writes: the chat-completions format of OpenAI, with a ``profile`` beside the messages."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from cuma_ds.data.rendering import Message

# Fields of a profile.
_MOST_FIELDS = 100


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
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.content = error_content(message, kind, param, code)


def error_content(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, object]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Strict(BaseModel):
    # A parameter we would have to ignore changes the answer silently; it is refused instead.
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, values: object) -> object:
        """What is null is not given; clients write out every optional field so, and send back the messages they got."""
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None}


def _only(*allowed: object) -> AfterValidator:
    """Takes the values of a parameter that change nothing here, and refuses all others."""

    def check(value: object) -> object:
        if value not in allowed:
            shown = " or ".join(json.dumps(one) for one in allowed)
            raise ValueError(f"this server does nothing with it; allowed: {shown}, or leave it out")
        return value

    return AfterValidator(check)


def _number(value: object) -> object:
    if isinstance(value, bool | str):
        raise ValueError("expected a number")
    return value


def _switch(value: object) -> object:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


Whole = Annotated[int, BeforeValidator(_number)]
Decimal = Annotated[float, BeforeValidator(_number)]
Switch = Annotated[bool, BeforeValidator(_switch)]


class TextPart(_Strict):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[TextPart] = Field(min_length=1)
    name: str | None = None  # chat templates know roles only
    # What an answer of this or another server carries beside its text.
    annotations: Annotated[object, _only([])] = None
    tool_calls: Annotated[object, _only([])] = None

    @field_validator("content", mode="before")
    @classmethod
    def _parts(cls, value: object) -> object:
        return [{"type": "text", "text": value}] if isinstance(value, str) else value

    def plain(self) -> Message:
        """Role and text as chat templates take them."""
        return {
            "role": "system" if self.role == "developer" else self.role,
            "content": "".join(part.text for part in self.content),
        }


class StreamOptions(_Strict):
    """What a stream carries besides the answer."""

    include_usage: Switch = False
    include_obfuscation: Annotated[object, _only(False)] = None


class ChatRequest(_Strict):
    """Body of ``POST /v1/chat/completions``."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    profile: str | dict[str, object] | None = None
    max_tokens: Whole | None = Field(None, ge=1)
    max_completion_tokens: Whole | None = Field(None, ge=1)
    temperature: Decimal = Field(1.0, ge=0, le=2)
    top_p: Decimal = Field(1.0, gt=0, le=1)
    stop: list[str] | None = Field(None, max_length=4)
    seed: Whole | None = Field(None, ge=-(2**63), lt=2**63)
    stream: Switch = False
    stream_options: StreamOptions | None = None
    # Clients send these. None of them changes the answer at the values allowed here.
    n: Annotated[object, _only(1)] = None
    logprobs: Annotated[object, _only(False)] = None
    top_logprobs: Annotated[object, _only(0)] = None
    frequency_penalty: Annotated[object, _only(0)] = None
    presence_penalty: Annotated[object, _only(0)] = None
    logit_bias: Annotated[object, _only({})] = None
    response_format: Annotated[object, _only({"type": "text"})] = None
    modalities: Annotated[object, _only(["text"])] = None
    tools: Annotated[object, _only([])] = None
    tool_choice: Annotated[object, _only("none", "auto")] = None
    functions: Annotated[object, _only([])] = None
    function_call: Annotated[object, _only("none", "auto")] = None
    parallel_tool_calls: Annotated[object, _only(True, False)] = None
    service_tier: Annotated[object, _only("auto", "default")] = None
    store: Annotated[object, _only(False)] = None
    # For a server's own records. This one keeps none.
    user: object = None
    metadata: object = None
    safety_identifier: object = None
    prompt_cache_key: object = None
    prompt_cache_retention: object = None

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("profile", mode="before")
    @classmethod
    def _profile(cls, value: object) -> object:
        if value is not None and not isinstance(value, str | dict):
            raise ValueError('expected a sentence, or fields such as {"country": "Norway"}')
        if isinstance(value, dict) and len(value) > _MOST_FIELDS:
            raise ValueError(f"it has {len(value)} fields; this server reads up to {_MOST_FIELDS}")
        return value


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts; the token that ends an answer counts."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def completion(
    identity: str, model: str, text: str, finish: str, used: dict[str, int], warnings: Sequence[str]
) -> dict[str, object]:
    """The answer in one piece."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": None, "finish_reason": finish}
    return (
        _answer(identity, model, "chat.completion", [choice])
        | {"usage": used}
        | ({"warnings": list(warnings)} if warnings else {})
    )


def chunk(
    identity: str,
    model: str,
    delta: dict[str, str] | None,
    finish: str | None = None,
    more: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """One piece of a streamed answer; without a delta it has no choice, only what ``more`` says."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
    return _answer(identity, model, "chat.completion.chunk", choices) | dict(more or {})


def _answer(identity: str, model: str, kind: str, choices: list[dict[str, object]]) -> dict[str, object]:
    return {"id": identity, "object": kind, "created": int(time.time()), "model": model, "choices": choices}
