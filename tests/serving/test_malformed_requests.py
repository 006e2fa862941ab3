"""Malformed requests beside innocent ones: each is refused in one way, and nobody else notices."""

from __future__ import annotations

import itertools
import json
import random
import socket
from pathlib import Path

import pytest
from asking import ask, served, until
from beside import Innocents, exchange
from malformed import complaint, every, good
from malformed import wire as request
from run_folder import make_run

from cuma_ds.inference.open import open_run
from cuma_ds.inference.sampling import Sampling
from cuma_ds.inference.talk import Talker
from cuma_ds.serving.patience import Patience


@pytest.fixture(scope="module")
def talker(tmp_path_factory, tiny_llama, tiny_encoder) -> Talker:
    folder: Path = make_run(tmp_path_factory.mktemp("runs") / "opinions", tiny_llama, tiny_encoder, {})[0]
    return Talker(open_run(folder), Sampling())


def test_malformed_requests_get_one_error_each_and_disturb_nobody(talker) -> None:
    with served(talker) as (client, scheduler):
        innocents = Innocents(client)
        with innocents.asking():
            answered = [
                (kind, request[:2000], exchange(client.base_url.port, request))
                for kind, request in every(random.Random(0))
            ]
        assert scheduler.alive
    wrong = [(kind, said, request) for kind, request, answer in answered if (said := complaint(answer))]
    assert not wrong
    assert innocents.answers > 8
    assert not innocents.different


def test_numbers_positive_in_double_and_zero_in_float32_are_answered_as_their_limit(talker) -> None:
    with served(talker) as (client, _):
        greedy = ask(client).choices[0].message.content
        for tiny in (1e-45, 1e-300, 5e-324):
            assert ask(client, temperature=tiny).choices[0].message.content == greedy
            assert ask(client, temperature=1, top_p=tiny, seed=3).choices[0].message.content == greedy


@pytest.mark.parametrize(
    "begun", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 999\r\nHost: x\r\n\r\n"]
)
def test_clients_that_drip_bytes_are_dropped(begun, talker, monkeypatch) -> None:
    monkeypatch.setattr(Patience, "seconds", 0.5)
    with served(talker) as (client, _), socket.create_connection(("127.0.0.1", client.base_url.port)) as wire:
        wire.settimeout(0.05)
        wire.sendall(begun)
        said = b""
        for byte in itertools.cycle(b"x"):
            try:
                wire.sendall(bytes([byte]))
                if not (piece := wire.recv(1000)):
                    break
                said += piece
            except TimeoutError:
                pass
            except ConnectionError:
                break
        assert said.startswith(b"HTTP/1.1 408 ")
        assert not complaint(said)
        assert ask(client).choices[0].finish_reason


def test_clients_that_do_not_read_their_answer_are_dropped(talker, monkeypatch) -> None:
    monkeypatch.setattr(Patience, "seconds", 0.5)
    body = {**good(), "max_tokens": 400, "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
    unread: list[int] = []
    end = Patience.connection_lost
    monkeypatch.setattr(Patience, "connection_lost", lambda self, exc: (unread.append(self._unread), end(self, exc)))
    with served(talker, ends=[], max_tokens=450, max_length=500, buffer=4096) as (client, scheduler):
        with socket.socket() as wire:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            wire.connect(("127.0.0.1", client.base_url.port))
            wire.sendall(request(json.dumps(body).encode()))
            until(lambda: bool(unread))
            until(lambda: scheduler.load() == (0, 0))
        assert unread[0] > 0, "it was closed because nobody read"
        assert ask(client).choices[0].finish_reason
