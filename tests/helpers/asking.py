"""A server in the test's own process and requests to it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import uvicorn
from ranks import free_port

from cuma_ds.inference.talk import Talker
from cuma_ds.serving.app import Settings, make_app
from cuma_ds.serving.patience import Patience
from cuma_ds.serving.scheduler import Limits, Scheduler, scheduler_of

COUNTRIES = ["Norway", "Ghana", "Japan", "Peru", "Jordan", "Chile", "Kenya", "Nepal"]


PEOPLE: list[Any] = [{"country": country, "age": 20 + 5 * index} for index, country in enumerate(COUNTRIES)]


def until(condition: Callable[[], bool]) -> None:
    """Wait for what must happen soon."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


@contextlib.contextmanager
def served(
    talker: Talker, limits: Limits | None = None, ends: list[int] | None = None, **options: Any
) -> Iterator[tuple[openai.OpenAI, Scheduler]]:
    """The application behind a real socket, and a client that does not try again.

    Args:
        options: settings of the server; ``buffer`` is what the system keeps of what a client has not read, in bytes.
    """
    buffer = options.pop("buffer", None)
    scheduler = scheduler_of(talker, limits or Limits(), ends)
    sizes = {"max_tokens": 100, "max_length": 200, "max_body": 20_000}
    app = make_app(talker, scheduler, Settings("opinions", **{**sizes, **options}))
    with socket.create_server(("127.0.0.1", free_port())) as listener:
        if buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        server = uvicorn.Server(
            uvicorn.Config(app, http=Patience, log_config=None, access_log=False, timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: server.started)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            with openai.OpenAI(base_url=url, api_key=options.get("api_key") or "none", max_retries=0) as client:
                yield client, scheduler
        finally:
            server.should_exit = True
            thread.join()


def ask(client: openai.OpenAI, text: str = "Hi", profile: Any = PEOPLE[0], **options: Any) -> Any:
    body = {} if profile is None else {"profile": profile}
    extra = options.pop("extra_body", {})
    messages = options.pop("messages", [{"role": "user", "content": text}])
    defaults = {"model": "opinions", "temperature": 0, "max_tokens": 12}
    return client.chat.completions.create(messages=messages, extra_body=body | extra, **{**defaults, **options})
