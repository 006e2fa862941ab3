"""A first map of a survey's file, as prepare_data.py survey --suggest writes it, and what to check about it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cuma_ds.data.sources.survey_suggest import Part, Suggestion

_LONGEST_TEXT = 40


def suggest_map(source: Path, place: Path, progress: Callable[[int, int], None]) -> None:
    """Write the map, and print what it says.

    Raises:
        DataError: the survey cannot be read, or there is something at ``place`` already.
    """
    from cuma_ds.data.sources.survey_file import SurveyFile
    from cuma_ds.data.sources.survey_suggest import suggest
    from cuma_ds.errors import DataError
    from cuma_ds.files import write_atomically

    if place.exists():
        raise DataError(f"{place} exists; a map that somebody may have changed is not overwritten, so name another")
    found = suggest(SurveyFile.open(source), progress)
    try:
        write_atomically(place, found.yaml())
    except OSError as error:
        raise DataError(f"cannot write {place}: {error.strerror or error}") from None
    _report(found, place)


def _report(found: Suggestion, place: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    say = partial(console.print, highlight=False, soft_wrap=True)
    table = Table(
        title=f"{found.file.path.name}: {found.people:,} people, {len(found.file.columns):,} columns",
        title_justify="left",
    )
    for name in ("what", "column", "text"):
        table.add_column(name)
    for name in ("answers", "no answer"):
        table.add_column(name, justify="right")
    for part in found.who:
        table.add_row(part.name, part.column, _short(part.text), f"{part.values:,}", f"{part.missing:.0%}")
    table.add_section()
    for part in found.questions:
        answers = f"{part.values:,} {part.scale}"
        table.add_row("question", part.column, _short(part.text), answers, f"{part.missing:.0%}")
    console.print(table)
    for part in [*found.who, *found.questions]:
        if part.unlabelled:
            console.print(
                f"to decide: {part.column} has codes without a label: {_codes(part)}", highlight=False, soft_wrap=True
            )
    roles = {"ids of people": found.person, "weights": found.weight, "waves": found.wave}
    console.print(
        ", ".join(f"{what}: {column or 'none found'}" for what, column in roles.items()),
        highlight=False,
        soft_wrap=True,
    )
    for reason, columns in found.left_out.items():
        shown = ", ".join(columns[:8]) + (f" and {len(columns) - 8} more" if len(columns) > 8 else "")
        say(f"left out, {reason}: {shown}")
    console.print(
        f"written: {place}. Look through it, then prepare with --out FOLDER.", highlight=False, soft_wrap=True
    )


def _codes(part: Part) -> str:
    codes = [f"{code} ({people:,} people)" for code, people in part.unlabelled.items()]
    return ", ".join(codes[:4]) + (f" and {len(codes) - 4} more" if len(codes) > 4 else "")


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 3] + "..."
