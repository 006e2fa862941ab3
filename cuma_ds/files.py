"""Files that are written whole or not at all, names of places, errors in one line."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

_LEFTOVER = re.compile(r"\.(.+)\.[0-9a-f]{16}")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a crash, also of the machine, leaves the old file or the new one.

    Args:
        path: the file. Its folder is made where there is none.
        content: text is written as UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        _move(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder that becomes ``path`` when the block ends without an error, and is removed otherwise.

    Raises:
        FileExistsError: at the end, where ``path`` is a file or a folder that is not empty. It is left as it is.
    """
    beside = _beside(path)
    beside.mkdir(parents=True)
    try:
        yield beside
        move_folder(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def move_folder(folder: Path, path: Path) -> None:
    """Give a complete folder its place, after everything in it has reached the disk.

    Raises:
        FileExistsError: ``path`` is a file or a folder that is not empty.
    """
    for place in folder.rglob("*"):
        if not place.is_symlink():
            _sync(place)
    try:
        _move(folder, path)
    except OSError:
        if path.exists():
            raise FileExistsError(f"{path} exists already") from None
        raise


def remove_folder(folder: Path) -> None:
    """Remove a folder, which may be missing. A crash leaves none of it under its name."""
    if folder.exists():
        beside = _beside(folder)
        os.replace(folder, beside)
        _sync(folder.parent)
        shutil.rmtree(beside)


def remove_leftovers(folder: Path, of: str | None = None) -> None:
    """Remove what writers that were killed left in a folder. Nobody may be writing there.

    Args:
        of: remove only what was to become the file or folder of this name.
    """
    for place in folder.glob(".*"):
        if (found := _LEFTOVER.fullmatch(place.name)) is not None and of in (None, found[1]):
            remove = shutil.rmtree if place.is_dir() and not place.is_symlink() else os.unlink
            remove(place)


def _beside(path: Path) -> Path:
    """A name for what is not complete, or no longer."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def _move(place: Path, path: Path) -> None:
    _sync(place)
    os.replace(place, path)
    _sync(path.parent)


def _sync(place: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_plain_name(name: object) -> bool:
    """Whether a name that was read from a file is that of something in the same folder, as ``../x`` is not."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters; the name of its class where it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def is_hub_id(place: str, needs_owner: bool = True) -> bool:
    """Whether a name that is no folder here can be that of something on the Hugging Face hub (``owner/name``).

    Args:
        place: as the user wrote it.
        needs_owner: false for models, of which some old ones have a name alone (``gpt2``).
    """
    slashes = place.count("/")
    return (slashes == 1 or (slashes == 0 and not needs_owner)) and not place.startswith((".", "/", "~"))


def full_path(place: str) -> str:
    """A folder by its full path, so that it is found from anywhere; a hub id as it is."""
    folder = Path(place).expanduser()
    return str(folder.resolve()) if folder.is_dir() else place


def quiet_bitsandbytes() -> None:
    """Turn off what bitsandbytes, which PEFT imports, warns of as it is imported: a kernel that it did not download."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def quiet_transformers(bars_only: bool = False) -> ExitStack:
    """Turn transformers' warnings and progress bars off, at once.

    Args:
        bars_only: leave the warnings on.

    Returns:
        A context manager that turns them on again at the end of a ``with`` block. Without one they stay off.
    """
    from transformers.utils import logging

    restore = ExitStack()
    if logging.is_progress_bar_enabled():
        restore.callback(logging.enable_progress_bar)
        logging.disable_progress_bar()
    if not bars_only:
        restore.callback(logging.set_verbosity, logging.get_verbosity())
        logging.set_verbosity_error()
    return restore
