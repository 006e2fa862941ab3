"""A progress bar for work that is no optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_Item = TypeVar("_Item")
_Item_co = TypeVar("_Item_co", covariant=True)


class Counted(Protocol[_Item_co]):
    """Items whose number is known."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[_Item_co]: ...


def shown(items: Counted[_Item], what: str, visible: bool) -> Generator[_Item, None, None]:
    """The items, with a bar that counts those that are done.

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
    """A progress bar, as long as the block lasts.

    Args:
        what, visible: as in :func:`shown`.

    Yields:
        A function that is told (done, in all).
    """
    console = Console()
    columns = (TextColumn(what), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (visible and console.is_terminal)) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
