"""Calls of a judge behind an OpenAI-compatible endpoint: several at a time, with a cache of its verdicts."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cuma_ds.errors import ConfigError, CumaError
from cuma_ds.incident import alive
from cuma_ds.profiles.embedding import default_cache_dir

if TYPE_CHECKING:
    import openai

_READABLE = re.compile(r"^(?:answer\s+)?(a|b|tie)$", re.IGNORECASE)
_BRACKETED = re.compile(r"\[\[(a|b|c|tie)\]\]", re.IGNORECASE)
_THOUGHTS = re.compile(r"^.*</think>", re.DOTALL)
_VERDICTS = ("A", "B", "tie")
# What is done about an argument that a judge does not take.
_WITHOUT = {
    "max_tokens": "max_completion_tokens is sent in its place",
    "temperature": "it answers at its own temperature, so that its verdicts may differ from run to run",
}


@dataclass(frozen=True)
class JudgeSettings:
    """The judge, and the limits of its calls.

    Attributes:
        url: base address, e.g. ``http://localhost:8000/v1``.
        model: its name there.
        key_variable: environment variable that holds the key; servers without keys need none.
        concurrency: most calls at a time.
        timeout: seconds of one call.
        retries: of a call that timed out, was refused for its rate, or met a failing server; waits grow exponentially.
        max_tokens: longest verdict; raise it for judges that think aloud first.
        cache_dir: where verdicts are kept, those of each url and model apart; default: the user's cache folder.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 5
    max_tokens: int = 256
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"--judge-url {self.url!r} is no address; expected e.g. http://localhost:8000/v1")
        if self.concurrency < 1 or self.timeout <= 0 or self.retries < 0 or self.max_tokens < 1:
            raise ConfigError(
                "a judge needs a concurrency and max tokens of at least 1, a positive timeout and no negative retries"
            )


class JudgeDown(CumaError):
    """A judge that does not answer: connections fail, time out, or end in a server's error, also when tried again."""


@dataclass
class Asked:
    """What became of a list of requests.

    Attributes:
        verdicts: of each request: ``A``, ``B``, ``tie``, ``unreadable`` or ``failed``.
        failures: kind of failure -> calls.
        cached: verdicts that were known already.
        calls: calls that have ended, each with its retries.
        unanswered: those that the judge did not answer (see :class:`JudgeDown`), and of these the last ones in a row.
    """

    verdicts: list[str]
    failures: Counter[str] = field(default_factory=Counter)
    cached: int = 0
    calls: int = 0
    unanswered: int = 0
    in_a_row: int = 0

    def count(self, reply: _Reply) -> None:
        """Count a call that has ended."""
        self.calls += 1
        self.unanswered += reply.unanswered
        self.in_a_row = self.in_a_row + 1 if reply.unanswered else 0
        if reply.failure:
            self.failures[reply.failure] += 1


class _Reply(NamedTuple):
    verdict: str
    failure: str = ""
    unanswered: bool = False


class Judge:
    """A judge that is asked time and again.

    Args:
        settings: which, and how.

    Attributes:
        refused: arguments that it turned out not to take, of ``max_tokens`` and ``temperature``.

    Raises:
        ConfigError: the ``openai`` package is missing.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        if find_spec("openai") is None:
            raise ConfigError(
                "a judge is asked through the package openai, which is not installed; pip install 'cuma-ds[judge]'"
            )
        self.settings = settings
        self.refused: set[str] = set()
        self._cache = _Cache(settings.cache_dir or default_cache_dir().parent / "judge")

    def __str__(self) -> str:
        return f"the judge {self.settings.model} at {self.settings.url}"

    def ask(
        self,
        requests: Sequence[list[dict[str, str]]],
        progress: Callable[[int, int], None] | None = None,
        must_answer: bool = False,
        fresh: bool = False,
    ) -> Asked:
        """Ask every request that the cache does not hold; equal ones are asked once.

        Args:
            requests: messages each.
            progress: called with (calls that have ended, in all).
            must_answer: give up on a judge that is down instead of counting failures: once as many calls in a row
                went unanswered as are made at a time, or more than half of all did.
            fresh: neither read the cache nor add to it.

        Raises:
            ConfigError: the judge refuses the key or does not know the model.
            JudgeDown: with ``must_answer``.
        """
        keys = [_key(self.settings, messages) for messages in requests]
        cache = None if fresh else self._cache
        known = {} if cache is None else {key: cache.verdicts[key] for key in keys if key in cache.verdicts}
        wanted = {key: messages for key, messages in zip(keys, requests, strict=True) if key not in known}
        asked = Asked([], cached=sum(key in known for key in keys))

        def take(key: str, reply: _Reply) -> None:
            known[key] = reply.verdict
            asked.count(reply)
            if must_answer and asked.in_a_row >= max(self.settings.concurrency, 3):
                raise self._down(asked)
            if cache is not None and reply.verdict in _VERDICTS:
                cache.add(key, reply.verdict)
            if progress is not None:
                progress(asked.calls, len(wanted))

        if wanted:
            asyncio.run(self._ask_all(wanted, take))
        if must_answer and 2 * asked.unanswered > asked.calls:
            raise self._down(asked)
        asked.verdicts = [known[key] for key in keys]
        return asked

    async def _ask_all(self, requests: Mapping[str, list[dict[str, str]]], take: Callable[[str, _Reply], None]) -> None:
        """Ask several requests at a time, and hand over each reply as it comes."""
        import openai

        settings, limit = self.settings, asyncio.Semaphore(self.settings.concurrency)

        async def ask(key: str, messages: list[dict[str, str]]) -> None:
            async with limit:
                reply = await self._call(client, messages)
            take(key, reply)

        secret = os.environ.get(settings.key_variable) or "none"
        stop: Exception | None = None
        async with openai.AsyncOpenAI(
            base_url=settings.url, api_key=secret, timeout=settings.timeout, max_retries=settings.retries
        ) as client:
            waiting = asyncio.create_task(_say_alive())
            try:
                async with asyncio.TaskGroup() as group:
                    for key, messages in requests.items():
                        group.create_task(ask(key, messages))
            except* CumaError as errors:
                stop = errors.exceptions[0]
            finally:
                waiting.cancel()
        if stop is not None:  # raised inside except*, it would be wrapped in a group
            raise stop from None

    def _down(self, asked: Asked) -> JudgeDown:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in asked.failures.most_common())
        return JudgeDown(
            f"{self} does not answer: {asked.unanswered} of {asked.calls} calls went unanswered with "
            f"{self.settings.retries} retries each ({kinds})"
        )

    async def _call(self, client: openai.AsyncOpenAI, messages: list[dict[str, str]]) -> _Reply:
        """A verdict, or why there is none. The arguments that the judge refuses now are remembered, and the call is
        made again without them.
        """
        import openai

        settings, known = self.settings, frozenset(self.refused)
        create: Any = client.chat.completions.create  # its overloads know no plain dictionaries
        try:
            answer = await create(messages=messages, **_arguments(settings, known))
            text = answer.choices[0].message.content
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise ConfigError(
                f"the judge at {settings.url} refuses the key in {settings.key_variable} (status {error.status_code})"
            ) from None
        except openai.NotFoundError:
            raise ConfigError(
                f"the judge at {settings.url} knows no model {settings.model!r}, or the address is wrong (status 404)"
            ) from None
        except openai.APIStatusError as error:
            more = _named_in(error) - known
            if not more:
                down = error.status_code == 429 or error.status_code >= 500
                return _Reply("failed", f"status {error.status_code}", unanswered=down)
            for name in sorted(more - self.refused):
                warnings.warn(f"{self} refuses {name}; {_WITHOUT[name]}", UserWarning, stacklevel=2)
            self.refused |= more
            return await self._call(client, messages)
        except openai.OpenAIError as error:
            return _Reply("failed", type(error).__name__, unanswered=isinstance(error, openai.APIConnectionError))
        except (AttributeError, IndexError, TypeError, ValueError):
            # An answer that is no chat completion.
            return _Reply("failed", "no chat completion")
        return _Reply(read_verdict(text)) if isinstance(text, str) else _Reply("failed", "no chat completion")


def read_verdict(text: str) -> str:
    """``A``, ``B``, ``tie``, or ``unreadable`` for anything that does not say exactly one of them."""
    text = _THOUGHTS.sub("", text).strip()
    bracketed = {found.lower() for found in _BRACKETED.findall(text)}
    if len(bracketed) == 1:
        said = bracketed.pop()
        return "tie" if said in ("c", "tie") else said.upper()
    plain = _READABLE.match(text.strip(" \t\n.!*_\"'`"))
    if plain is None or bracketed:
        return "unreadable"
    return "tie" if plain[1].lower() == "tie" else plain[1].upper()


async def _say_alive() -> None:
    """Calls have limits of their own: waiting for them is no hang."""
    while True:
        alive()
        await asyncio.sleep(5)


def _arguments(settings: JudgeSettings, refused: Collection[str]) -> dict[str, object]:
    limit = "max_completion_tokens" if "max_tokens" in refused else "max_tokens"
    temperature = {} if "temperature" in refused else {"temperature": 0.0}
    return {"model": settings.model, limit: settings.max_tokens, **temperature}


def _named_in(error: openai.APIStatusError) -> frozenset[str]:
    """The arguments that a bad request (status 400 or 422) is about, by its ``param`` or its words."""
    if error.status_code not in (400, 422):
        return frozenset()
    return frozenset(name for name in _WITHOUT if name in f"{error.param} {error.message}")


def _key(settings: JudgeSettings, messages: list[dict[str, str]]) -> str:
    content = json.dumps([settings.url.rstrip("/"), settings.model, settings.max_tokens, messages], ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


class _Cache:
    """Verdicts by hash of who was asked what, one JSON line each; no text of a profile, prompt or answer is kept."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "verdicts-2.jsonl"
        self.verdicts: dict[str, str] = {}
        before = folder / "verdicts.jsonl"
        if before.is_file() and not self.file.is_file():
            warnings.warn(
                f"verdicts in {before} are not used: they do not say at which address the judge was; "
                "delete the file if you like",
                UserWarning,
                stacklevel=2,
            )
        if self.file.is_file():
            for line in self.file.read_text(encoding="utf-8").splitlines():
                try:
                    key, verdict = json.loads(line)
                except (ValueError, TypeError):
                    continue  # A line cut off by a stop only costs asking again.
                if isinstance(key, str) and isinstance(verdict, str) and verdict in _VERDICTS:
                    self.verdicts[key] = verdict

    def add(self, key: str, verdict: str) -> None:
        """Remember a verdict at once, so that a stopped run has lost nothing."""
        self.verdicts[key] = verdict
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps([key, verdict]) + "\n")
