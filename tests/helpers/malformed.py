"""Requests that no server can answer, as bytes on the wire. Every one is to be refused in one way."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

PATH = "/v1/chat/completions"
HALF = "\ud83d"


def good() -> dict[str, Any]:
    """A body that is answered."""
    return {"model": "opinions", "profile": {"country": "Norway"}, "max_tokens": 4, "temperature": 0,
            "messages": [{"role": "user", "content": "Hi"}]}  # fmt: skip


def wire(body: bytes, *more: str, method: str = "POST", path: str = PATH, **plain: str | None) -> bytes:
    """One request as it is sent; the connection is closed after it.

    Args:
        more: lines of its head.
        plain: headers by name; None leaves one out.
    """
    headers: dict[str, str | None] = {"Host": "x", "Content-Type": "application/json", "Connection": "close"}
    headers |= {"Content-Length": str(len(body))} | plain
    given = [f"{name}: {value}" for name, value in headers.items() if value is not None]
    lines = [f"{method} {path} HTTP/1.1", *given, *more]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def changed(**fields: Any) -> bytes:
    return wire(json.dumps({**good(), **fields}).encode())


def without(field: str) -> bytes:
    body = good()
    del body[field]
    return wire(json.dumps(body).encode())


def text(body: str) -> bytes:
    return wire(body.encode())


def nested(what: str, depth: int) -> bytes:
    """A body with one value of many lists within one another."""
    deep = "[" * depth + "]" * depth
    if what == "profile field":
        return text(json.dumps(good()).replace('"Norway"', deep))
    if what == "fields within fields":
        return text(json.dumps(good()).replace('"Norway"', '{"a": ' * depth + "1" + "}" * depth))
    return text(json.dumps({**good(), what: "HERE"}).replace('"HERE"', deep))


def number(field: str, written: str) -> bytes:
    return text(json.dumps({**good(), field: "HERE"}).replace('"HERE"', written))


def chunked(body: bytes) -> bytes:
    return wire(b"", "Transfer-Encoding: chunked", **{"Content-Length": None}) + body


def cut(generator: random.Random) -> bytes:
    body = json.dumps(good()).encode()
    return wire(body[: generator.randrange(1, len(body))])


def flipped(generator: random.Random) -> bytes:
    """A good body of which one structural byte is another one."""
    body = bytearray(json.dumps(good()).encode())
    place = generator.choice([index for index, byte in enumerate(body) if byte in b"{}[]:,"])
    body[place] = generator.choice(b"\x00!)x")
    return wire(bytes(body))


WRONG = ["x", "", "1", True, False, [], [1], {}, {"a": 1}, -1, 1.5, 10**400, [[]], "null"]
NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 400, "9" * 5000, "-1", "0x10", "01", "1e", "true",
           '"1"', '"1e-45"', "[1]", "{}"]  # fmt: skip


def _values(field: str, values: list[Any]) -> list[Callable[[random.Random], bytes]]:
    return [lambda _, value=value: changed(**{field: value}) for value in values]  # type: ignore[misc]


def _sent(*requests: bytes) -> list[Callable[[random.Random], bytes]]:
    return [lambda _, request=request: request for request in requests]  # type: ignore[misc]


def _messages(*messages: Any) -> list[Callable[[random.Random], bytes]]:
    return _values("messages", list(messages))


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


KINDS: dict[str, list[Callable[[random.Random], bytes]]] = {
    "broken JSON": [cut, flipped, *_sent(wire(b""), wire(b"\x00"), text("{"), text("null"), text("[]"), text('"x"'),
                    text("{'a': 1}"), text("{} {}"), text("[" * 15_000), text("{" * 9_000), text('{"model"'))],
    "other encodings": _sent(*(wire(json.dumps(good()).encode(code)) for code in ("cp037", "cp500")),
                             wire(json.dumps(good(), ensure_ascii=False).replace("Hi", "H\xef").encode("latin-1")),
                             wire(b"\xff\xfe"), wire(b"\x1f\x8b\x08\x00", **{"Content-Encoding": "gzip"})),
    "half characters": _sent(changed(messages=user(f"a {HALF}")), changed(profile=f"a {HALF}"),
                             changed(profile={"country": HALF}), changed(profile={HALF: "x"}),
                             changed(profile={"country": "Norway", HALF: "x"}), changed(**{HALF: 1}),
                             changed(model=HALF), changed(stop=[HALF])),
    "wrong types": [*_values("messages", [value for value in WRONG if value != []] + [[1], [[]], ["x"], [{}]]),
                    *_values("model", [value for value in WRONG if value != "opinions"]),
                    *_values("temperature", ["x", "", "1", True, [], {}]),
                    *_values("stream", ["x", "true", 1, 0, [], {}]), *_values("stream_options", ["x", 1, [1]]),
                    *_values("max_tokens", ["x", "5", True, 1.5, [], {}]), *_values("seed", ["x", "5", True, 1.5, {}]),
                    *_values("stop", [1, True, {}, [1], [[]], [None]]), *_values("n", [2, "1", [], 0]),
                    *_values("logit_bias", [[], {"1": 1}, "x"]), *_values("tools", [[1], {}, "x"])],
    "numbers": [*(lambda _, value=value, field=field: number(field, value)  # type: ignore[misc]
                  for value in NUMBERS for field in ("temperature", "top_p", "max_tokens", "seed")
                  if (field, value) != ("seed", "-1")),
                *_values("temperature", [-1e-45, 2.0000001, 3]), *_values("top_p", [0, -1e-45, 1.0000001]),
                *_values("max_tokens", [0, 101, 2**31, 2**63]), *_values("seed", [2**63, -(2**63) - 1])],
    "deep nesting": [lambda _, what=what, depth=depth: nested(what, depth)  # type: ignore[misc]
                     for what in ("profile", "profile field", "fields within fields", "messages", "stop", "tools",
                                  "seed", "metadata_", "temperature") for depth in (40, 400, 900, 5_000)],
    "profiles": _values("profile", [None, "", " ", [], [1], 1, True, {}, {"country": ""}, {"country": None}, "{", "{}",
                                    {"country": {"a": {"b": 1}}}, {"country": [[1]]}, {"country": True},
                                    {f"field {number}": 1 for number in range(101)},
                                    '{"country": "a", "country": "b"}', '{"country": [[1]]}', {"": ""}, {"a": "n/a"}]),
    "messages": _messages([], [{}], [{"role": "user"}], [{"content": "x"}], [{"role": "tool", "content": "x"}],
                          [{"role": "<|im_start|>", "content": "x"}], user(None), user([]), user([{"type": "image"}]),
                          user([{"type": "text"}]), user([1]), user({"text": "x"}),
                          [{"role": "user", "content": "x", "tool_calls": [1]}],
                          [{"role": "user", "content": "x", "x": 1}]),
    "too long": _sent(changed(messages=user("x" * 300)), changed(messages=user("<|im_start|>" * 40)),
                      changed(messages=user("x") * 80), changed(messages=user("x" * 30_000)),
                      changed(profile={"country": "x" * 30_000}), changed(stop=["x"] * 5),
                      wire(b"x" * 30_000), chunked(b"7000\r\n" + b"x" * 0x7000 + b"\r\n0\r\n\r\n")),
    "unknown": [*_values("best_of", [1]), *_values("x" * 5_000, [1]), *_values("response_format", [{"type": "json"}]),
                *_values("presence_penalty", [0.5, float("nan")]), *_values("model", ["gpt-4", "../x", "x" * 9_000])],
    "missing": [*(lambda _, field=field: without(field) for field in ("model", "messages", "profile"))],  # type: ignore[misc]
    "methods and paths": _sent(*(wire(b"", method=method) for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS",
                               "TRACE", "ZZZ")), *(wire(b"", method="GET", path=path) for path in
                               ("/v1/models/../x", "/v1/models/%00", "/v1/models/%ff%fe", "/%2e%2e/etc", "//", "/v1/",
                                "/v1/chat/completions/", "/v1/models/x%0d%0aX:y", "/" + "x" * 9_000)),
                               wire(b"{}", path="/v1/completions"), wire(b"{}", path="/v1/chat/completions/")),
    "headers": _sent(wire(json.dumps(good()).encode(), **{"Content-Type": "text/plain"}),
                     wire(json.dumps(good()).encode(), **{"Content-Type": "multipart/form-data"}),
                     wire(json.dumps(good()).encode(), **{"Content-Type": "\xff"}),
                     wire(b"{}", **{"Content-Length": "-1"}), wire(b"{}", **{"Content-Length": "x"}),
                     wire(b"{}", "Content-Length: 3"), wire(b"{}", "Bad Header"), wire(b"{}", "X: a\x00b"),
                     wire(b"{}", "X: " + "y" * 70_000), b"POST\r\n\r\n", b"\x16\x03\x01\x02\x00\r\n\r\n",
                     b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/chat/completions HTTP/1.1\r\n\r\n",
                     b"\x00" * 100 + b"\r\n\r\n"),
    "chunks": _sent(chunked(b"zz\r\n"), chunked(b"-5\r\nhello\r\n"), chunked(b"5\r\nhelloworld\r\n0\r\n\r\n"),
                    chunked(b"fffffffffffffffff\r\n"), chunked(b"0\r\n\r\n"), chunked(b"2\r\n{}\r\n0\r\n\r\n"),
                    wire(b"2\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: gzip, chunked"),
                    wire(b"{}", "Transfer-Encoding: identity")),
}  # fmt: skip


def draw(generator: random.Random) -> tuple[str, bytes]:
    """A kind and a request of it."""
    kind = generator.choice(list(KINDS))
    return kind, generator.choice(KINDS[kind])(generator)


def every(generator: random.Random) -> list[tuple[str, bytes]]:
    """Each request once."""
    return [(kind, make(generator)) for kind, makers in KINDS.items() for make in makers]


def complaint(answer: bytes) -> str:
    """What is wrong with the answer to a malformed request; empty where it is one error of OpenAI's format."""
    head, _, body = answer.partition(b"\r\n\r\n")
    first = head.split(b"\r\n")[0].split()
    if len(first) < 2 or not first[1].startswith(b"4"):
        return f"status {head[:60]!r} {body[:200]!r}"
    if answer.count(b"HTTP/1.1 ") != 1:
        return "more than one answer"
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return f"no JSON error: {body[:100]!r}"
    if set(error) != {"message", "type", "param", "code"} or not isinstance(error["message"], str):
        return f"not OpenAI's format: {error}"
    if not error["message"] or "\n" in error["message"] or len(error["message"]) > 600:
        return f"no clear line: {error['message'][:200]!r}"
    return ""
