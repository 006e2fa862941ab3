"""Starting the playground: what is refused, in one line and before a model is loaded."""

from __future__ import annotations

import importlib.util
import socket

import pytest


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "playground takes one of --run (a run folder) and --export (an exported folder)"),
        (["--run", "a", "--export", "b"], "playground takes one of --run"),
        (["--run", "a", "--data", "b"], "--data belongs to --export; a run has its own"),
        (["--export", "a", "--step", "3"], "--step belongs to --run"),
        (["--run", "a", "--host", "no.such.host.invalid"], "cannot listen on --host no.such.host.invalid"),
        (["--run", "a", "--port", "99999"], "cannot listen on --host 127.0.0.1 --port 99999"),
        (["--run", "no/such/run", "--port", "0"], "no/such/run is no run folder"),
    ],
)
def test_mistakes_are_one_line(arguments, said, launch) -> None:
    done = launch("playground", *arguments)
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert said in done.err
    assert done.err.count("\n") == 1


def test_a_port_in_use_is_one_line(launch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = launch("playground", "--run", "a", "--port", str(taken.getsockname()[1]))
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "Address already in use" in done.err


def test_without_gradio_its_extra_is_named(launch, monkeypatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gradio" else found(name))
    done = launch("playground", "--run", "a")
    assert (done.code, done.err) == (2, "error: the playground needs gradio: pip install 'cuma-ds[playground]'\n")


def test_several_ranks_are_refused(launch, monkeypatch) -> None:
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))
    done = launch("playground", "--run", "a")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "the playground is for one process" in done.err


def test_it_cannot_be_shared(launch) -> None:
    done = launch("playground", "--run", "a", "--share")
    assert done.code == 2
    assert "unrecognized arguments: --share" in done.err
