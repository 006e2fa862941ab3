"""One thread beside the work of each rank: signals, errors of other ranks, and hangs.

The main thread may be inside a collective that never returns. This thread goes on, and talks with the other ranks over
the store by which they met.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType
from typing import NoReturn

import torch.distributed as dist

from cuma_ds.errors import CumaError, Stopped, TopologyError
from cuma_ds.incident import ended, now_doing, signs_of_life, unexpected
from cuma_ds.parallel.topology import Topology
from cuma_ds.telemetry.screen import say_error

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A launcher passes on what the terminal has sent to its ranks already. That is no second SIGINT.
_AGAIN_SECONDS = 3.0
# A collective that fails by itself, after the same time, says more.
_MORE_SECONDS = 5.0
# Seconds between two looks; with very many ranks less often, as all of them ask one store.
_BEAT_SECONDS, _RANKS_PER_SECOND = 1.0, 64
# Processor time of the main thread, or share of a core of all threads, that counts as work.
_WORK_SECONDS, _WORK_SHARE = 0.1, 0.5


@contextlib.contextmanager
def watched(topology: Topology, seconds: float) -> Iterator[None]:
    """Inside, no rank waits for one that failed, hangs or was told to stop.

    - SIGTERM, SIGINT or SIGUSR1 on any rank stops all: at the end of the step inside :func:`finishing_steps`, at once
      elsewhere, with the exit code of :class:`Stopped`. A second SIGINT, some seconds later, ends the process.
    - An error of one rank becomes the error of all.
    - Where no rank has shown a sign of life for ``seconds``, or a stop takes longer than that, all exit with code 2.

    Args:
        topology: of this rank.
        seconds: ``parallel.timeout_seconds``.

    Raises:
        CumaError: whatever was raised inside, in one line.
        TopologyError: a collective failed because another rank died, or did not answer in time.
    """
    global _active
    watch = _Watch(topology, seconds)
    before, _active = _active, watch
    watch.start()
    try:
        yield
    except Exception as error:
        explained = watch.explained(error)
        ended(str(explained))
        raise explained from error
    finally:
        _active = before
        watch.close()


@contextlib.contextmanager
def finishing_steps() -> Iterator[None]:
    """Inside, a signal does not end the process. The caller asks :func:`stop_requested` after each step."""
    watch = _active
    if watch is None:
        yield
        return
    watch.finishes = True
    try:
        yield
    finally:
        watch.finishes = False


def stop_requested() -> bool:
    """Whether a rank was told to stop, as far as this one knows; ranks learn of it at different times."""
    return _active is not None and _active.stop is not None


def stopped(where: str) -> Stopped:
    """The error to raise on all ranks once they agree to stop.

    Args:
        where: what was done and what happens next, e.g. ``after step 7; the same command goes on from there``.
    """
    why = _active.stop if _active is not None and _active.stop else "a signal on another rank"
    error = Stopped(f"stopped by {why} {where}")
    error.printed_by_main = True
    return error


_active: _Watch | None = None
_watches = 0


class _Watch(threading.Thread):
    """The thread.

    Attributes:
        stop: why all ranks are to stop; None while they are not.
        finishes: the main thread looks at ``stop`` by itself.
    """

    def __init__(self, topology: Topology, seconds: float) -> None:
        global _watches
        super().__init__(name="watch", daemon=True)
        self.stop: str | None = None
        self.finishes = False
        self._topology, self._seconds = topology, seconds
        self._beat = max(_BEAT_SECONDS, topology.world / _RANKS_PER_SECOND)
        _watches += 1  # equally many on every rank
        self._store = None if topology.world == 1 else dist.PrefixStore(f"watch/{_watches}", _own_connection())
        self._told_stop = self._failing = self._lost = self._done = False
        self._stopped_at = self._alive_at = time.monotonic()
        self._interrupted_at = math.inf
        self._lives = self._lives_seen = 0
        self._life = _Life()
        self._read, self._write = os.pipe()
        for end in (self._read, self._write):
            os.set_blocking(end, False)
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            self._handlers = {sign: signal.signal(sign, _note) for sign in _SIGNALS}
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    def close(self) -> None:
        """End the thread and give signals back."""
        if self._handlers:
            signal.set_wakeup_fd(self._wakeup)
            for sign, handler in self._handlers.items():
                signal.signal(sign, handler)
        self._done = True
        os.write(self._write, b"\0")
        self.join()
        os.close(self._read)
        os.close(self._write)

    def explained(self, error: Exception) -> CumaError:
        """What this rank raises for an error, after the other ranks have been told of it."""
        if isinstance(error, CumaError) and error.printed_by_main:
            return error
        lost = None if isinstance(error, CumaError) else _lost_peer(error, self._topology, self._seconds)
        if lost is not None:
            self._lost = True
            time.sleep(3 * self._beat)  # that rank may have said why; then this thread ends the process
            return lost
        self._failing = True
        mine = error if isinstance(error, CumaError) else unexpected(error)
        mine.printed_by_main = self._tell(mine) and not self._topology.is_main
        return mine

    def run(self) -> None:
        """Look at everything once a beat."""
        looked = time.monotonic()
        while not self._done:
            ready, _, _ = select.select([self._read], [], [], self._beat)
            if ready:
                self._heard(os.read(self._read, 64))
            now = time.monotonic()
            if now - looked > self._beat + 10:
                self._alive_at = now  # this process did not run itself
            looked = now
            if not self._done:
                self._look(now)

    def _heard(self, signs: bytes) -> None:
        for sign in signs:
            if sign in _SIGNALS:
                now = time.monotonic()
                if sign == signal.SIGINT:
                    self._interrupted_at = min(now, self._interrupted_at)
                    if now > self._interrupted_at + _AGAIN_SECONDS:
                        self._leave(130, "stopped at once by a second SIGINT")
                self._request_stop(f"{signal.Signals(sign).name} on rank {self._topology.rank}")

    def _look(self, now: float) -> None:
        if self._life.goes_on():
            self._alive_at = now
            self._lives += 1
        try:
            self._exchange(now)
        except RuntimeError:  # rank 0 has ended, and the store with it
            self._store = None
        if self.stop is not None and not self.finishes and not self._failing:
            self._wait_until_told()
            self._leave(Stopped.exit_code, f"stopped by {self.stop} during {now_doing()}; nothing was lost")
        if self.stop is not None and now - self._stopped_at > self._seconds:
            self._leave(2, f"error: was to stop by {self.stop}, but {now_doing()} took longer than {self._limit}")
        if not self._lost and now - self._alive_at > self._seconds + _MORE_SECONDS:
            self._leave(
                2,
                f"error: rank {self._topology.rank} of {self._topology.world} stops: no rank has done anything for "
                f"{self._limit}; this one hangs in {now_doing()}; the same command goes on from the last checkpoint",
                everywhere=True,
            )

    def _exchange(self, now: float) -> None:
        """Tell the other ranks what is new here, and hear what is new there."""
        if self._store is None or self._failing:
            return
        if self.stop is not None and not self._told_stop:
            self._store.set("stop", self.stop)
            self._told_stop = True
        elif self.stop is None and self._store.check(["stop"]):
            self._request_stop(self._store.get("stop").decode())
            self._store.add("told", 1)
        if self._store.check(["error"]):
            said = json.loads(self._store.get("error"))
            if said["rank"] != self._topology.rank:
                self._store.add("read", 1)
                time.sleep(0.5)  # that rank asks the store, which may be here
                self._leave(int(said["code"]), f"error: rank {said['rank']}: {said['message']}")
        lives = self._store.add("lives", self._lives)
        if lives != self._lives_seen:
            self._lives_seen, self._alive_at = lives, now
        self._lives = 0

    def _wait_until_told(self) -> None:
        """Rank 0 has the store, and stays until the others know that all stop."""
        until = time.monotonic() + 5 * self._beat
        with contextlib.suppress(RuntimeError):
            while self._store is not None and self._topology.is_main and time.monotonic() < until:
                if self._store.add("told", 0) >= self._topology.world - 1:
                    return
                time.sleep(0.1)

    def _tell(self, error: CumaError) -> bool:
        """Tell all ranks of an error, and wait until they know; false where they cannot be told."""
        store = self._store
        if store is None:
            return False
        said = {"rank": self._topology.rank, "message": str(error), "code": error.exit_code}
        try:
            if store.add("errors", 1) > 1:
                return False  # another rank failed before this one
            store.set("error", json.dumps(said))
            until = time.monotonic() + 5 * self._beat
            while store.add("read", 0) < self._topology.world - 1 and time.monotonic() < until:
                time.sleep(0.1)
            return store.add("read", 0) > 0
        except RuntimeError:
            return False

    def _request_stop(self, why: str) -> None:
        if self.stop is None:
            self.stop, self._stopped_at = why, time.monotonic()

    def _leave(self, code: int, line: str, everywhere: bool = False) -> NoReturn:
        """End this process, and what it started, from this thread."""
        ended(line.removeprefix("error: "))
        if self._topology.is_main or everywhere:
            with contextlib.suppress(OSError):
                say_error(line)
        end_now(code)

    @property
    def _limit(self) -> str:
        return f"{self._seconds:.0f} s (parallel.timeout_seconds)"


def end_now(code: int) -> NoReturn:
    """End this process and its children without waiting for the main thread."""
    import psutil

    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            child.kill()
    os._exit(code)


class _Life:
    """Whether the main thread works: it says so, moves, reads or writes files, or computes.

    A rank that waits for others in a collective does none of this, and neither does one that hangs.
    """

    def __init__(self) -> None:
        self._main = threading.main_thread()
        self._seen: tuple[object, ...] = ()
        self._cpu, self._all, self._at = 0.0, 0.0, time.monotonic()

    def goes_on(self) -> bool:
        """Since the last call."""
        seen = (signs_of_life(), self._place(), _bytes_moved())
        now, cpu, everything = time.monotonic(), self._main_seconds(), time.process_time() - time.thread_time()
        works = cpu - self._cpu > _WORK_SECONDS or everything - self._all > _WORK_SHARE * (now - self._at)
        goes_on = seen != self._seen or works
        if goes_on:
            self._seen, self._cpu = seen, cpu
        self._all, self._at = everything, now
        return goes_on

    def _place(self) -> tuple[tuple[int, int], ...]:
        frame, place = sys._current_frames().get(self._main.ident or 0), []
        while frame is not None:
            place.append((id(frame.f_code), frame.f_lasti))
            frame = frame.f_back
        return tuple(place)

    def _main_seconds(self) -> float:
        return time.clock_gettime(time.pthread_getcpuclockid(self._main.ident or 0))


def _bytes_moved() -> int:
    """Bytes this process has read from and written to disks."""
    try:
        with open("/proc/self/io", encoding="ascii") as file:
            return sum(int(line.split()[1]) for line in file if line.startswith(("read_bytes", "write_bytes")))
    except (OSError, ValueError):
        return 0


def _lost_peer(error: Exception, topology: Topology, seconds: float) -> TopologyError | None:
    """The one line about an error of a collective; None for other errors."""
    reason = str(error).lower()
    if not isinstance(error, RuntimeError):
        return None
    if "timed out" in reason or "timeout" in reason:
        why = f"another rank did not answer within {seconds:.0f} s (parallel.timeout_seconds)"
    elif any(sign in reason for sign in ("connection closed", "connection reset", "broken pipe", "nccl")):
        why = "another rank is gone"
    else:
        return None
    return TopologyError(f"rank {topology.rank} of {topology.world} stops: {why}; the same command resumes the run")


def _own_connection() -> dist.Store:
    """A connection of this thread's own to the store by which the ranks met."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=10),
        wait_for_workers=False,
    )


def _note(sign: int, frame: FrameType | None) -> None:
    """The thread has heard of the signal already."""
