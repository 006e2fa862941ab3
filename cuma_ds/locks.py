"""A lock on a folder, so that two processes on any machines never write into it at once.

Two things hold it. The kernel locks the file ``.lock`` (``flock``, which NFS passes on to its server where it can) and
frees it when the process ends, however it ends. Beside that, the holder touches the file every few seconds. Where two
machines do not see each other's locks, the file still says who holds it, and whether that one is alive.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cuma_ds.errors import CheckpointError

LOCK_FILE = ".lock"
# The holder touches the file this often. One on another machine that has not done so for much longer is dead.
_BEAT_SECONDS, _SILENCE_SECONDS = 5.0, 20.0
# What file systems without locks answer.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class Holder(NamedTuple):
    """Who holds a lock.

    host, pid: of the process.  boot: changes when the machine starts again.  since: local time, as people read it.
    """

    host: str
    pid: int
    boot: str
    since: str

    @classmethod
    def here(cls) -> Holder:
        """This process, from now on."""
        return cls(socket.gethostname(), os.getpid(), _boot(), time.strftime("%Y-%m-%d %H:%M:%S"))

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host} (since {self.since})"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, nobody else is inside a block of the same folder. The folder is made where there is none.

    A lock that its holder left behind is taken over: at once where the kernel or this machine knows that the holder
    is gone; after 20 seconds without a sign of life where it ran on another machine whose locks are not seen here.

    Raises:
        CheckpointError: another process holds it; names host, process and time. Or the folder cannot be written.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    file, done = folder / LOCK_FILE, threading.Event()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _acquire(file)
    except OSError as error:
        raise CheckpointError(f"cannot write the folder {folder}: {error.strerror}") from None
    beats = threading.Thread(target=_beat, args=(handle, done), name="lock", daemon=True)
    try:
        beats.start()
        yield
    finally:
        done.set()
        beats.join()
        with contextlib.suppress(OSError):
            file.unlink()
        os.close(handle)
        with contextlib.suppress(OSError):  # what was refused leaves no folder
            for place in made:
                place.rmdir()


def holder_of(folder: Path) -> Holder | None:
    """Who holds the lock of a folder, or held it when it was killed; None where nobody does."""
    try:
        return _read((folder / LOCK_FILE).read_bytes())
    except OSError:
        return None


def is_alive(folder: Path) -> bool:
    """Whether the holder of a folder's lock is at work, which may take 20 seconds to see."""
    holder, file = holder_of(folder), folder / LOCK_FILE
    if holder is None:
        return False
    if (holder.host, holder.boot) == (socket.gethostname(), _boot()):
        return _exists(holder.pid)
    with contextlib.suppress(OSError):
        return _lives(holder, file, has_locks=True)
    return False


def _acquire(file: Path) -> int:
    """An open, locked file that names this process."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            granted = _lock(handle)
            if granted is not False and not _is(file, handle):  # its holder removed it meanwhile
                os.close(handle)
                continue
            holder = _read(os.pread(handle, 4096, 0))
            if granted is False or (holder is not None and _lives(holder, file, granted is not None)):
                time.sleep(0.2 if holder is None else 0)  # it is writing its name
                holder = holder or _read(os.pread(handle, 4096, 0))
                who = "another process" if holder is None else str(holder)
                raise CheckpointError(f"{file.parent} is in use by {who}; wait until it has ended")
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(Holder.here()._asdict()).encode(), 0)
            os.fsync(handle)
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(handle)
            raise
        return handle


def _lock(handle: int) -> bool | None:
    """Whether the kernel grants the lock; None where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _is(file: Path, handle: int) -> bool:
    """Whether the file still is what was opened."""
    try:
        return os.path.samestat(file.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _lives(holder: Holder, file: Path, has_locks: bool) -> bool:
    """Whether the process that the file names is alive, although the kernel did not refuse the lock.

    Times of the file are compared with each other, never with a clock of this machine.
    """
    if (holder.host, holder.boot) == (socket.gethostname(), _boot()):
        return not has_locks and _exists(holder.pid)
    before, until = _touched(file), time.monotonic() + _SILENCE_SECONDS
    while time.monotonic() < until:
        time.sleep(min(1.0, _SILENCE_SECONDS))
        if _touched(file) != before:
            return True
    return False


def _touched(file: Path) -> int:
    handle = os.open(file, os.O_RDONLY)  # opening it makes NFS ask the server
    try:
        return os.fstat(handle).st_mtime_ns
    finally:
        os.close(handle)


def _beat(handle: int, done: threading.Event) -> None:
    while not done.wait(_BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(handle)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _read(content: bytes) -> Holder | None:
    try:
        return Holder(**json.loads(content))
    except (ValueError, TypeError):
        return None


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
