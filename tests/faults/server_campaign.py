"""Many malformed requests and slow clients beside eight innocent streams; prints what docs/reliability.md shows.

    python tests/faults/server_campaign.py --number 1000

The server is launchers/serve.py in a process of its own, with a tiny random model. Requests are drawn with a seed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HELPERS = Path(__file__).parents[1] / "helpers"
sys.path[:0] = [str(HELPERS), str(HELPERS.parent), str(HELPERS.parents[1])]

import openai  # noqa: E402
import psutil  # noqa: E402
from beside import Innocents, exchange  # noqa: E402
from campaign import Models  # noqa: E402
from malformed import complaint, draw, good, wire  # noqa: E402
from ranks import ROOT, environment  # noqa: E402
from run_folder import make_run  # noqa: E402

SLOW = ("says nothing", "stops in its head", "stops in its body", "drips bytes", "reads nothing")


class SlowClient(threading.Thread):
    """One that holds a connection for as long as it can.

    Attributes:
        seconds: after which the server ended it; None while it has not.
    """

    def __init__(self, port: int, how: str) -> None:
        super().__init__(daemon=True)
        self.port, self.how = port, how
        self.seconds: float | None = None

    def run(self) -> None:
        begun = time.monotonic()
        with socket.socket() as connection, contextlib.suppress(ConnectionError):
            if self.how == "reads nothing":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect(("127.0.0.1", self.port))
            body = {**good(), "stream": True, "max_tokens": 100}
            whole = wire(json.dumps(body).encode(), Connection="keep-alive")
            first = {"says nothing": b"", "stops in its head": whole[:40], "stops in its body": whole[:-20]}
            connection.sendall(first.get(self.how, b"POST /v1/chat/completions HTTP/1.1\r\n"))
            if self.how == "reads nothing":
                self._ask_and_ask(connection, whole)
            connection.settimeout(0.2)
            while True:
                with contextlib.suppress(TimeoutError):
                    if self.how == "drips bytes":
                        connection.sendall(b"x")
                    if not connection.recv(4096 if self.how != "reads nothing" else 1):
                        break
        self.seconds = time.monotonic() - begun

    def _ask_and_ask(self, connection: socket.socket, whole: bytes) -> None:
        """Ask again and again, and wait until the connection breaks."""
        connection.sendall(b"Host: x\r\n\r\n")
        while True:
            connection.sendall(whole)
            time.sleep(0.05)


def campaign(number: int, seed: int, folder: Path) -> None:
    """Serve, trouble, and look at what the others got."""
    models, generator = Models(folder), random.Random(seed)
    run = make_run(folder / "opinions", models.llama, models.encoder, {})[0]
    command = [sys.executable, "launchers/serve.py", "--run", str(run), "--port", "0", "--max-length", "200"]
    command += ["--max-tokens", "100", "--max-body", "20000"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    address = process.stdout.readline().split()[-1]
    try:
        with openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=300) as client:
            trouble(client, psutil.Process(process.pid), number, generator)
    finally:
        process.terminate()
        process.wait(60)


def trouble(client: openai.OpenAI, server: psutil.Process, number: int, generator: random.Random) -> None:
    """Send malformed requests beside innocent streams and slow clients."""
    port, innocents = client.base_url.port, Innocents(client)
    assert port is not None
    for _ in range(number // 4):  # what a server needs once, it has by now
        exchange(port, draw(generator)[1])
    before, connections = server.memory_info().rss, len(server.net_connections())
    slow = [SlowClient(port, how) for how in SLOW * 4]
    counts: collections.Counter[str] = collections.Counter()
    wrong = 0
    with innocents.asking():
        for client_ in slow:
            client_.start()
        for case in range(number):
            kind, request = draw(generator)
            counts[kind] += 1
            if said := complaint(exchange(port, request)):
                wrong += 1
                print(f"{case}: {kind}: {said}: {request[:300]!r}", flush=True)
        for client_ in slow:
            client_.join(120)
    dropped = [client_.seconds for client_ in slow if client_.seconds is not None]
    after = server.memory_info().rss
    open_now = len(server.net_connections()) - connections
    print(json.dumps({"malformed": number, "not_one_error_with_4xx": wrong, "innocent_answers": innocents.answers,
                      "innocent_different": innocents.different, "memory_growth": round(after / before - 1, 4),
                      "memory_MiB": round(after / 2**20), "slow_clients": len(slow), "dropped": len(dropped),
                      "longest_seconds": round(max(dropped, default=0)), "connections_left": open_now}))  # fmt: skip
    print(json.dumps(dict(counts)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        campaign(arguments.number, arguments.seed, Path(folder))


if __name__ == "__main__":
    main()
