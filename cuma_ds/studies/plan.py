"""What a study still has to do, and about how long that takes."""

from __future__ import annotations

from typing import NamedTuple

from cuma_ds.errors import CumaError
from cuma_ds.studies.study import Task
from cuma_ds.studies.work import Cell, Part, Work, cells


class Row(NamedTuple):
    """One run.

    Attributes:
        name: of the run; the learning rate is missing from it where it is not known yet.
        status: to do, done, or what stands in the way.
        seconds: estimated; None where nothing is to do or nothing tells.
    """

    name: str
    status: str
    seconds: float | None


class Plan(NamedTuple):
    """All runs of a part of a study, and what there is to say of them."""

    rows: list[Row]
    notes: list[str]


def plan(work: Work, part: Part) -> Plan:
    """The runs of a part of a study, trials of learning rates first."""
    rows: dict[str, Row] = {}
    open_trials = 0
    for cell in cells(part):
        trials, rate, more = _trials(work, cell)
        open_trials += more
        for task in trials:
            rows.setdefault(task.name, _row(work, task, "trial"))
        chosen = rate is not None or not work.study.grids()[cell.method]
        for seed in part.seeds:
            task = Task(*cell, seed, rate)
            if chosen:
                rows[task.name] = _row(work, task, "run")
            elif seed != work.study.seeds[0] or trials[0].steps != cell.steps:
                seconds = work.expected_seconds(task)
                rows.setdefault(task.name, Row(task.name, "run, once the learning rate is chosen", seconds))
    return Plan(list(rows.values()), _notes(work, list(rows.values()), open_trials))


def _trials(work: Work, cell: Cell) -> tuple[list[Task], float | None, int]:
    """The trials of a cell's grid, its rate if it is known, and how many trials may come on top."""
    grid, tried = work.study.grids()[cell.method], work.known(cell)
    if work.next(cell, {}) is None:
        return [], work.rate(cell, tried), 0
    rates = sorted({*grid, *tried})
    rate = work.rate(cell, tried)
    extend = 0 if work.study.tuning is None else work.study.tuning.extend
    more = 0 if rate is not None else max(0, extend - (len(rates) - len(grid)))
    return [work.trial(cell, one) for one in rates], rate, more


def _row(work: Work, task: Task, what: str) -> Row:
    try:
        done = work.is_trained(task)
    except CumaError as error:
        return Row(task.name, str(error), None)
    if done:
        return Row(task.name, f"{what}, trained", None)
    failed = f" again (failed: {work.failed[task.name]})" if task.name in work.failed else ""
    return Row(task.name, f"{what}{failed}", work.expected_seconds(task))


def _notes(work: Work, rows: list[Row], open_trials: int) -> list[str]:
    known = [row.seconds for row in rows if row.seconds is not None]
    left = [row for row in rows if row.seconds is not None or "trained" not in row.status]
    notes = []
    if left and known:
        expected = work.study.expected
        source = "steps measured in this study where there are any"
        if expected.seconds_per_step is not None:
            source += f", else {expected.seconds_per_step:g} s a step as the study says (on {expected.machine})"
        notes.append(f"{len(left)} runs to do, about {sum(known) / 60:,.0f} minutes: {source}.")
    elif left:
        notes.append(
            f"{len(left)} runs to do; how long they take is known once one is done (expected.seconds_per_step)."
        )
    else:
        notes.append("everything is trained.")
    if open_trials:
        notes.append(f"Up to {open_trials} trials more, where the best learning rate is at an edge of its grid.")
    return notes
