"""Agree on errors before going on, so that no rank waits for one that stopped."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

from cuma_ds.errors import CumaError
from cuma_ds.incident import alive, now_doing, unexpected
from cuma_ds.parallel.watch import stop_requested, stopped

T = TypeVar("T")
_SECONDS = 5.0


@contextlib.contextmanager
def agreement(error: CumaError | None = None) -> Iterator[None]:
    """Run a block without collectives. Afterwards all ranks go on, or all raise the error of the first that has one.

    An error that nobody expected becomes one line, too, see :func:`~cuma_ds.incident.unexpected`.

    Args:
        error: what went wrong on this rank before it had joined the others.

    Raises:
        CumaError: the same one line on every rank.
    """
    try:
        yield
    except Exception as raised:
        error = error or (raised if isinstance(raised, CumaError) else unexpected(raised))
    said = _of_all_ranks(None if error is None else (type(error), str(error)))
    wrong = [(rank, *one) for rank, one in enumerate(said) if one is not None]
    if wrong:
        rank, kind, message = wrong[0]
        everywhere = len(wrong) == len(said)
        agreed = kind(message if everywhere or rank == 0 else f"rank {rank}: {message}")
        agreed.printed_by_main = True
        raise agreed from None


def together(work: Callable[[], T]) -> T:
    """Do work without collectives that may last longer on one rank than the others would wait for it.

    It runs in a thread. Every few seconds the ranks tell each other whether they are done, so that none takes a busy
    one for lost. Nothing limits how long the work takes.

    Args:
        work: called once, with this rank's CUDA device as the current one.

    Returns:
        Its result on this rank.

    Raises:
        CumaError: the same one line on every rank, as in :func:`agreement`.
        Stopped: a rank was told to stop; work that is not done is given up.
    """
    task = _Task(work)
    task.start()
    done = [(False, False)]
    while not all(is_done for is_done, _ in done):
        task.join(_SECONDS)
        alive()
        done = _of_all_ranks((not task.is_alive(), stop_requested()))
        if any(stops for _, stops in done):
            raise stopped(f"during {now_doing()}")
    with agreement():
        if task.error is not None:
            raise task.error
    return task.result[0]


def _of_all_ranks(mine: T) -> list[T]:
    """What each rank says. A process that has not joined others is alone."""
    if not dist.is_initialized():
        return [mine]
    said = [mine] * dist.get_world_size()
    dist.all_gather_object(said, mine)
    return said


class _Task(threading.Thread, Generic[T]):
    """A call in a thread that does not keep the process from ending."""

    def __init__(self, work: Callable[[], T]) -> None:
        super().__init__(daemon=True)
        self.work = work
        self.device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self.result: list[T] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        if self.device is not None:
            torch.cuda.set_device(self.device)  # each thread has its own
        try:
            self.result.append(self.work())
        except BaseException as error:
            self.error = error
