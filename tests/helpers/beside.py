"""Streams of people who do nothing wrong, read from a server while others trouble it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import openai
from asking import PEOPLE, ask

QUESTIONS = ["Can people be trusted?", "What is a good life?", "Hi", "How important is religion in your life?"]


def exchange(port: int, request: bytes, seconds: float = 60) -> bytes:
    """All that the server answers to some bytes until it closes the connection."""
    said = b""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        with contextlib.suppress(ConnectionError):  # it may refuse before it has read everything
            connection.sendall(request)
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(65_536):
                said += piece
    return said


class Innocents:
    """Eight people who ask the same again and again, each by a stream; half of them sample with a seed.

    Args:
        client: of the server.

    Attributes:
        answers: how many came while they were disturbed.
        different: those that were not what they were before.
    """

    def __init__(self, client: openai.OpenAI) -> None:
        self._client, self._stop = client, threading.Event()
        self.answers, self.different = 0, 0
        self._quiet = [self.answer(number) for number in range(8)]

    def answer(self, number: int) -> tuple[str, str]:
        """One answer and how it ended."""
        options: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "seed": number} if number % 2 else {}
        who, text = PEOPLE[number % len(PEOPLE)], QUESTIONS[number % len(QUESTIONS)]
        stream = ask(self._client, text, who, stream=True, max_tokens=24, **options)
        chunks = [chunk.choices[0] for chunk in stream]
        return "".join(chunk.delta.content or "" for chunk in chunks), str(chunks[-1].finish_reason)

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Inside, all eight ask without a pause."""
        threads = [threading.Thread(target=self._go, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _go(self, number: int) -> None:
        while not self._stop.is_set():
            try:
                same = self.answer(number) == self._quiet[number]
            except openai.OpenAIError:
                same = False
            self.answers += 1
            self.different += not same
