"""What the user sees of a run: our own lines and bars. What libraries print can be kept in a file instead.

Libraries print to the file descriptors 1 and 2, from Python and from C++. :func:`set_libraries_aside` turns both into a
file and keeps copies of what they were, which is where :func:`say`, :func:`say_error` and :func:`console` go.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import BinaryIO, TextIO

from rich.console import Console


class _Streams:
    """out, err: copies of the streams that libraries no longer have; None while they have them.  spool: what they have
    printed before there is a file.  console: of ``out``.  heard: whether their lines go anywhere.
    """

    out: TextIO | None = None
    err: TextIO | None = None
    spool: BinaryIO | None = None
    console: Console | None = None
    heard = False


def console() -> Console:
    """The console of the user; always the same one, as a bar and lines above it need."""
    if _Streams.console is None:
        _Streams.console = Console(file=_Streams.out)
    return _Streams.console


def say(line: str) -> None:
    """Print a line, above the bar if there is one."""
    console().print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)


def say_error(line: str) -> None:
    """Print a line to stderr, above the bar if both are one terminal."""
    stream = _Streams.err or sys.stderr
    if console().is_terminal and stream.isatty():
        say(line)
    else:
        print(line, file=stream, flush=True)


class _OwnLines(logging.Handler):
    """Shows what the package itself logs."""

    def emit(self, record: logging.LogRecord) -> None:
        say_error(self.format(record))


def set_libraries_aside() -> None:
    """Keep what libraries print from the user, from now on and for good."""
    if _Streams.out is not None:
        return
    logging.getLogger("cuma_ds").addHandler(_OwnLines(logging.WARNING))
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    _Streams.out, _Streams.err = (_copy(number, stream) for number, stream in ((1, sys.stdout), (2, sys.stderr)))
    _Streams.console, _Streams.heard = None, True
    _Streams.spool = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
    _send_to(_Streams.spool.fileno())


def let_libraries_speak() -> None:
    """Let libraries print everything to the user."""
    _Streams.heard = True


def libraries_are_heard() -> bool:
    """Whether what libraries print has a place: a file, or the screen of a user who asked for it."""
    return _Streams.heard


def libraries_go_to(file: Path) -> None:
    """Write what libraries print, and have printed, to the end of a file; nothing unless they were set aside.

    The file is readable by its owner alone, as such lines may repeat data.
    """
    if _Streams.spool is None:
        return
    with contextlib.suppress(OSError):  # a run does not end because its log cannot be written
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(handle, "ab") as log, _Streams.spool as spool:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            spool.seek(0)
            log.write(f"--- started {time.strftime('%Y-%m-%d %H:%M:%S')}, process {os.getpid()}\n".encode())
            shutil.copyfileobj(spool, log)
            log.flush()
            _send_to(log.fileno())
        _Streams.spool = None


def _copy(number: int, stream: TextIO) -> TextIO:
    return open(os.dup(number), "w", buffering=1, encoding=stream.encoding, errors="replace")


def _send_to(handle: int) -> None:
    os.dup2(handle, 1)
    os.dup2(handle, 2)
