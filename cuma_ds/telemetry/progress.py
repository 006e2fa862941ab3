"""Bars for work that is no optimizer step: one for each phase of a command."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from cuma_ds.telemetry.screen import console, say

# A bar is drawn ten times a second, and rows may be millions.
_SECONDS_BETWEEN = 0.05

_Item = TypeVar("_Item")
_Item_co = TypeVar("_Item_co", covariant=True)


class Counted(Protocol[_Item_co]):
    """Items whose number is known."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[_Item_co]: ...


class _Phase:
    """The phase that goes on now: tells its bar what is done. None where there is none."""

    tell: Callable[[str, int, int], None] | None = None


@contextmanager
def phase(what: str, visible: bool = True) -> Iterator[None]:
    """Inside, a part of a command goes on: on a terminal one bar, and at its end one line with its seconds.

    Elsewhere it is one plain line at its start.

    Args:
        what: e.g. ``loading the model``.
        visible: false for neither.
    """
    if not visible:
        yield
        return
    if not console().is_terminal:
        say(what)
        yield
        return
    began = time.monotonic()
    with one_bar(what) as tell:
        before, _Phase.tell = _Phase.tell, tell
        try:
            yield
        finally:
            _Phase.tell = before
    say(f"{what}: {time.monotonic() - began:.0f} s")


def shown(items: Counted[_Item], what: str, visible: bool) -> Generator[_Item, None, None]:
    """The items, counted by a bar as they are done: that of the phase that goes on, or one of their own.

    Args:
        items: what is worked on.
        what: stands before the bar.
        visible: false for no bar; there is none either where the output is not a terminal.
    """
    with bar(what, visible) as told:
        told(0, len(items))
        for done, item in enumerate(items, start=1):
            yield item
            told(done, len(items))


@contextmanager
def bar(what: str, visible: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar as long as the block lasts: that of the phase that goes on, or one of its own.

    Args:
        what, visible: as in :func:`shown`.

    Yields:
        A function that is told (done, in all).
    """
    if not (visible and console().is_terminal):
        yield lambda done, total: None
    elif (of_phase := _Phase.tell) is not None:
        yield lambda done, total: of_phase(what, done, total)
    else:
        with one_bar(what) as tell:
            yield lambda done, total: tell("", done, total)


def progress_of(what: str) -> Callable[[int, int], None] | None:
    """Tells the bar of the phase that goes on (how much is done, of how much); None where there is none."""
    tell = _Phase.tell
    return None if tell is None else lambda done, total: tell(what, done, total)


@contextmanager
def one_bar(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar that is gone afterwards, and none where the output is not a terminal.

    The call tells it which part of the work goes on, how much of that is done, and of how much (0: not known).
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"), TimeRemainingColumn())
    with Progress(*columns, console=console(), transient=True, disable=not console().is_terminal) as progress:
        task = progress.add_task(what, total=None, count="")
        shown_part, last = "", 0.0

        def tell(part: str, done: int, total: int) -> None:
            nonlocal task, shown_part, last
            if part != shown_part:  # a bar with a size cannot become one without
                progress.remove_task(task)
                task, shown_part = progress.add_task(f"{what}: {part}", total=total or None, count=""), part
            elif done < total and time.monotonic() < last + _SECONDS_BETWEEN:
                return
            last = time.monotonic()
            progress.update(task, completed=done, total=total or None, count=f"{done:,}/{total:,}" if total else "")

        yield tell
