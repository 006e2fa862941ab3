"""Agree on errors before going on, so that no rank waits for one that stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from cuma_ds.errors import CumaError


@contextlib.contextmanager
def agreement(error: CumaError | None = None) -> Iterator[None]:
    """Run a block without collectives. Afterwards all ranks go on, or all raise the error of the first that has one.

    Args:
        error: what went wrong on this rank before it had joined the others.

    Raises:
        CumaError: the same one line on every rank.
    """
    try:
        yield
    except CumaError as raised:
        error = error or raised
    said: list[tuple[type[CumaError], str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, None if error is None else (type(error), str(error)))
    wrong = [(rank, *one) for rank, one in enumerate(said) if one is not None]
    if wrong:
        rank, kind, message = wrong[0]
        everywhere = len(wrong) == len(said)
        agreed = kind(message if everywhere or rank == 0 else f"rank {rank}: {message}")
        agreed.printed_by_main = True
        raise agreed from None
