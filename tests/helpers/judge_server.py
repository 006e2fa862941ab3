"""A judge of answers over real HTTP whose every reply a test decides."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

GOOD, BAD = "a good answer", "a bad answer"
Reply = tuple[int, dict[str, str], bytes]


def verdict(text: Any) -> Reply:
    """A chat completion that says ``text``."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()


def fault(status: int) -> Reply:
    # The client honours this header, so that tests wait for nothing.
    return status, {"Content-Type": "application/json", "retry-after-ms": "1"}, b'{"error": {"message": "no"}}'


def prefers_good(prompt: str, _: int) -> Reply:
    return verdict("A" if prompt.index(GOOD) < prompt.index(BAD) else "B")


@contextmanager
def judge_server() -> Iterator[SimpleNamespace]:
    """A server on a free port whose ``script(prompt, number of the call)`` decides each reply."""
    state = SimpleNamespace(script=prefers_good, calls=[], active=0, most=0, lock=threading.Lock(), headers=[])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.calls.append(request)
                state.headers.append(self.headers)
                state.active += 1
                state.most = max(state.most, state.active)
                number = len(state.calls)
            try:
                status, headers, body = state.script(request["messages"][-1]["content"], number)
            finally:
                with state.lock:
                    state.active -= 1
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except OSError:
                pass  # the client gave up waiting

        def log_message(self, *_: Any) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{listener.server_address[1]}/v1"
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield state
    listener.shutdown()
    listener.server_close()
