"""Connections of slow clients are closed, so that they do not pile up; what is no HTTP is refused in JSON."""

from __future__ import annotations

import asyncio
import json
from typing import cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from cuma_ds.serving.protocol import error_content


class Patience(H11Protocol):
    """HTTP as uvicorn speaks it, with an end to waiting.

    Attributes:
        seconds: within which a request must be complete, from its first byte; the first request from connecting. A
            client that reads nothing of its answer for so long, or less than is written, is dropped, too.
    """

    seconds = 30.0
    _deadline: asyncio.TimerHandle | None = None
    _look: asyncio.TimerHandle | None = None
    _unread = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for the first request."""
        super().connection_made(cast("asyncio.Transport", transport))
        self._deadline = self.loop.call_later(self.seconds, self._give_up)
        self._look = self.loop.call_later(self.seconds, self._drop_unread)

    def data_received(self, data: bytes) -> None:
        """Take bytes; wait no more once the request is complete."""
        if self._deadline is None and self.conn.their_state is h11.IDLE:
            self._deadline = self.loop.call_later(self.seconds, self._give_up)
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._wait_no_more()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._wait_no_more()
        if self._look is not None:
            self._look.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, in the format of all other errors."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse("400 Bad Request", "this is no valid HTTP request")
        self.transport.close()

    def _wait_no_more(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _drop_unread(self) -> None:
        unread = self.transport.get_write_buffer_size()
        if 0 < self._unread <= unread:
            self.transport.abort()
            return
        self._unread = unread
        self._look = self.loop.call_later(self.seconds, self._drop_unread)

    def _give_up(self) -> None:
        self._deadline = None
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # no answer has begun
            self._refuse("408 Request Timeout", f"the request was not complete within {self.seconds:g} seconds")
        self.transport.close()

    def _refuse(self, status: str, message: str) -> None:
        body = json.dumps(error_content(message, "invalid_request_error")).encode()
        head = f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: application/json\r\n"
        self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
