"""A progress bar for work that is no optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_Item = TypeVar("_Item")


def shown(items: Sequence[_Item], what: str, visible: bool) -> Iterator[_Item]:
    """The items, with a bar that counts those that are done.

    Args:
        items: what is worked on.
        what: stands before the bar.
        visible: false for no bar; there is none either where the output is not a terminal.
    """
    console = Console()
    columns = (TextColumn(what), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (visible and console.is_terminal)) as bar:
        task = bar.add_task(what, total=len(items))
        for item in items:
            yield item
            bar.advance(task)
