"""What this process is doing, and errors that nobody expected as one line with a traceback file."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
import traceback
from pathlib import Path

from cuma_ds.errors import CumaError
from cuma_ds.files import first_line, write_atomically

# Messages of other errors (KeyError, ValueError, ...) may repeat what stands in the data, profiles included.
_QUOTABLE = (OSError, RuntimeError, MemoryError, ImportError, AssertionError, NotImplementedError)


class _Now:
    """doing: in words, e.g. ``step 7``.  signs: grows whenever something got done.  folder: of traceback files.
    outcome: the file that says how a run ended.
    """

    doing = "the start"
    signs = 0
    folder: Path | None = None
    outcome: Path | None = None


def doing(what: str) -> None:
    """Say what begins now. It stands in the message of an error that nobody expected."""
    _Now.doing = what
    alive()


def now_doing() -> str:
    """What was said last."""
    return _Now.doing


def alive() -> None:
    """Say that work goes on; long work that waits for somebody else calls it now and then."""
    _Now.signs += 1


def signs_of_life() -> int:
    """A number that grows with each call of :func:`alive`."""
    return _Now.signs


def tracebacks_go_to(folder: Path | None) -> None:
    """Choose the folder of traceback files, which is made when it is needed; None is the one of temporary files."""
    _Now.folder = folder


def outcome_goes_to(file: Path | None) -> None:
    """Choose the file that :func:`ended` writes, and remove it; None for ranks that write none."""
    _Now.outcome = file
    if file is not None:
        file.unlink(missing_ok=True)


def ended(said: str) -> None:
    """Write down how the work ended, once; what cannot be written is left out."""
    file, _Now.outcome = _Now.outcome, None
    if file is not None and file.parent.is_dir():
        with contextlib.suppress(OSError):
            content = {"said": said, "time": time.strftime("%Y-%m-%d %H:%M:%S")}
            write_atomically(file, json.dumps(content, ensure_ascii=False) + "\n")


def unexpected(error: BaseException) -> CumaError:
    """An error that nobody expected as one line: its kind, what was being done, and the file with the traceback.

    The file has kinds of errors and places in the code, and repeats no data either. Its owner alone can read it.
    """
    rank, place = os.environ.get("RANK", "0"), "could not be written"
    text = _places(error)
    name = f"error-{time.strftime('%Y%m%d-%H%M%S')}-rank{rank}-{os.getpid()}.txt"
    for folder in (_Now.folder, Path(tempfile.gettempdir())):
        if folder is None:
            continue
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
                file.write(text)
            place = str(folder / name)
            break
    what = f": {first_line(error)}" if _is_quotable(error) else ""
    return CumaError(f"{type(error).__name__} in {_Now.doing}{what} (traceback: {place})")


def _is_quotable(error: BaseException) -> bool:
    return isinstance(error, _QUOTABLE) and bool(str(error))


def _places(error: BaseException | None) -> str:
    """The tracebacks of an error and of those that led to it, the first of them first."""
    told: list[str] = []
    while error is not None:
        what = f": {error}" if _is_quotable(error) else ""
        places = "".join(traceback.format_tb(error.__traceback__))
        told.append(f"Traceback (most recent call last):\n{places}{type(error).__name__}{what}\n")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\nwhich led to\n\n".join(reversed(told))
