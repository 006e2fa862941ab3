"""One writer at a time: who holds a folder is said, and what dead holders left is taken over."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cuma_ds import locks
from cuma_ds.errors import CheckpointError
from cuma_ds.locks import Holder, holder_of, locked

HOLD = """
import sys, time
from pathlib import Path
from cuma_ds.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_told_who_holds_the_folder_and_a_killed_one_is_followed_at_once(tmp_path) -> None:
    process = hold(tmp_path)
    try:
        with pytest.raises(CheckpointError, match="is in use by process") as error, locked(tmp_path):
            pass
        holder = holder_of(tmp_path)
        assert holder is not None
        assert holder.pid == process.pid
        assert str(holder) in str(error.value)
        assert "\n" not in str(error.value)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert holder_of(tmp_path) == holder  # it is still named
    began = time.monotonic()
    with locked(tmp_path):
        assert holder_of(tmp_path).pid == os.getpid()
    assert time.monotonic() - began < 5
    assert list(tmp_path.iterdir()) == []


def test_one_process_cannot_hold_a_folder_twice(tmp_path) -> None:
    with locked(tmp_path):
        with pytest.raises(CheckpointError, match=f"process {os.getpid()}"), locked(tmp_path):
            pass
        assert holder_of(tmp_path) is not None


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path) -> None:
    with locked(tmp_path / "runs" / "a"):
        pass
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "runs" / "a"):
        (tmp_path / "runs" / "a" / "file").touch()
    assert [path.name for path in (tmp_path / "runs" / "a").iterdir()] == ["file"]


@pytest.fixture
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(locks, "_SILENCE_SECONDS", 2.0)


def test_a_holder_on_a_machine_whose_locks_are_not_seen_is_known_by_its_beats(tmp_path, impatient) -> None:
    file = tmp_path / locks.LOCK_FILE
    file.write_text(json.dumps(Holder("elsewhere", 4711, "another boot", "yesterday")._asdict()))
    toucher = subprocess.Popen(
        [sys.executable, "-c", "import os, sys, time\nwhile True: os.utime(sys.argv[1]); time.sleep(0.3)", str(file)]
    )
    try:
        time.sleep(0.5)
        with (
            pytest.raises(CheckpointError, match=r"process 4711 on host elsewhere \(since yesterday\)"),
            locked(tmp_path),
        ):
            pass
    finally:
        toucher.kill()
        toucher.wait()
    with locked(tmp_path):
        assert holder_of(tmp_path).pid == os.getpid()


def test_without_locks_of_the_file_system_the_process_itself_is_looked_for(tmp_path, monkeypatch) -> None:
    process = hold(tmp_path)

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    try:
        with pytest.raises(CheckpointError, match=f"process {process.pid} "), locked(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()
    with locked(tmp_path):
        assert holder_of(tmp_path).pid == os.getpid()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write the folder"), locked(tmp_path / "file"):
        pass
