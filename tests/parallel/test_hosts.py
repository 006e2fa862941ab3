"""Hostfiles and hosts are checked before a run, and each mistake is one line."""

from __future__ import annotations

import platform
from pathlib import Path

import deepspeed
import pytest
import torch

HOSTFILES = {
    "zero-slots": ("node-1 slots=2\nnode-2 slots=0\n", ":2: host node-2 has slots=0"),
    "twice": (
        "# two machines\nnode-1 slots=2\n\nnode-1 slots=4\n",
        ":4: host node-1 stands here a second time (first in line 2)",
    ),
    "no-slots": ("node-1\n", ":1: 'node-1' is no host; expected NAME slots=N"),
    "words": ("node-1 slots=two\n", ":1: 'node-1 slots=two' is no host"),
    "mark": ("\ufeffnode-1 slots=2\n", ":1: the file begins with a byte order mark"),
    "max-slots-first": ("node-1 max_slots=4 slots=2\n", ":1: 'node-1 max_slots=4 slots=2' is no host"),
    "more-than-max": ("node-1 slots=8 max_slots=4\n", ":1: host node-1 has slots=8, more than its max_slots=4"),
    "mpi": ("node-1:8\n", ":1: 'node-1:8' is no host"),
    "empty": ("# nothing yet\n", "names no host"),
}


@pytest.mark.parametrize("mistake", HOSTFILES)
def test_a_mistake_in_a_hostfile_is_one_line_with_its_place(mistake, tmp_path, launch) -> None:
    text, part = HOSTFILES[mistake]
    (tmp_path / "hosts").write_text(text)
    done = launch("check_hosts", "--hostfile", str(tmp_path / "hosts"))
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert f"{tmp_path / 'hosts'}{part if part.startswith(':') else ' ' + part}" in done.err


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    from cuma_ds.parallel.hosts import read_hostfile

    lines = (
        "# two machines",
        "node-1 slots=8 max_slots=8",
        "",
        "  10.0.0.2\tslots=4  max-slots=16 # smaller",
        "#node-3 slots=1",
    )
    (tmp_path / "hosts").write_bytes("".join(f"{line}\r\n" for line in lines).encode())
    assert (
        read_hostfile(tmp_path / "hosts")
        == dict(fetch_hostfile(str(tmp_path / "hosts")))
        == {"node-1": 8, "10.0.0.2": 4}
    )


def test_a_missing_hostfile_is_a_mistake(tmp_path, launch) -> None:
    done = launch("check_hosts", "--hostfile", str(tmp_path / "hosts"))
    assert done.code == 2
    assert "No such file" in done.err
    assert "this machine alone" in done.err


@pytest.fixture
def fake_ssh(tmp_path, monkeypatch) -> Path:
    """An ssh that knows five hosts, and notes what it was asked."""
    versions = f"cuma-ds {platform.python_version()} {torch.__version__} {deepspeed.__version__}"
    ssh = tmp_path / "ssh"
    ssh.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ncase "$*" in\n'
        f'*" good-1 "*|*" good-2 "*) echo "Welcome"; echo "{versions}";;\n'
        '*" dead "*) echo "ssh: connect to host dead port 22: No route to host" >&2; exit 255;;\n'
        '*" bare "*) echo "ModuleNotFoundError: No module named \'torch\'" >&2; exit 1;;\n'
        '*" old "*) echo "cuma-ds 3.11.7 2.1.0 0.19.8";;\nesac\n'
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path


def test_hosts_that_answer_with_the_same_versions_are_fine(fake_ssh, launch) -> None:
    (fake_ssh / "hosts").write_text("good-1 slots=8\ngood-2 slots=4  # smaller\n")
    done = launch("check_hosts", "--hostfile", str(fake_ssh / "hosts"), "--timeout", "3", "--ssh_port", "2222")
    assert done.code == 0, done.err
    assert "2 hosts with 12 ranks in all: good-1, good-2" in done.out
    asked = sorted((fake_ssh / "asked").read_text().splitlines())
    assert len(asked) == 2
    assert all(
        "-p 2222" in line and "BatchMode=yes" in line and "ConnectTimeout=3" in line and str(Path.cwd()) in line
        for line in asked
    )


@pytest.mark.parametrize(
    ("host", "part"),
    [
        (
            "dead",
            "host dead cannot be reached by ssh without a password: "
            "ssh: connect to host dead port 22: No route to host",
        ),
        ("bare", "host bare cannot start cuma-ds with"),
        (
            "old",
            "host old has Python 3.11.7, torch 2.1.0, deepspeed 0.19.8; "
            f"this machine has Python {platform.python_version()}",
        ),
    ],
)
def test_a_host_that_cannot_take_part_is_named_with_the_reason(host, part, fake_ssh, launch) -> None:
    (fake_ssh / "hosts").write_text(f"good-1 slots=8\n{host} slots=8\n")
    done = launch("check_hosts", "--hostfile", str(fake_ssh / "hosts"))
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert part in done.err
