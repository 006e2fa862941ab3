"""Run a study of methods and compare them, or compare evaluated runs: paired, over the same people."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from _cli import run_main, warn_in_one_line

from cuma_ds.errors import ConfigError, CumaError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

    from cuma_ds.studies.report.model import Compared
    from cuma_ds.studies.study import Task
    from cuma_ds.studies.work import Part, Progress, Work

_EXAMPLES = """\
examples
  a study that comes with the package, minutes on two idle CPU cores; docs/studies.md says how to write one:
    python launchers/compare.py --study studies/quick
  what it would run, and about how long that takes:
    python launchers/compare.py --study studies/quick --dry-run
  a slice of a long one, for as long as half an hour; the same command later goes on:
    python launchers/compare.py --study studies/mean_collapse --recipes immigration --seeds 0 --minutes 30
  the report of what is there so far, without running anything:
    python launchers/compare.py --study studies/mean_collapse --report-only
  any evaluated runs or reports, pair by pair:
    python launchers/compare.py --runs runs/quickstart runs/mine --out reports/compared

A study lives in output_dir/name: runs/, valid/ (reports on the people for choosing settings), logs/, journal.jsonl (all
commands) and report/ (report.html, report.md, comparison.json, pictures). What is there is not done again. A run that
fails does not stop the others; the report names it, and the next start tries it again.
"""
_SLICES = ("recipes", "methods", "budgets", "seeds")


def main() -> None:
    """Parse, then run a study or compare runs."""
    arguments = _parser().parse_args()
    warn_in_one_line()
    _check(arguments)
    if arguments.runs is not None:
        _compare_runs(arguments)
        return
    from cuma_ds.studies.processes import Processes
    from cuma_ds.studies.study import load_study
    from cuma_ds.studies.work import Work, part_of

    study = load_study(arguments.study)
    part = part_of(study, **{name: getattr(arguments, name) for name in _SLICES})
    processes = Processes(study.folder)
    if arguments.dry_run:
        _show_plan(Work(study, processes), part)
        return
    seconds = None if arguments.minutes is None else 60 * arguments.minutes
    if not arguments.report_only:
        with processes.alone(), _ended_politely(), _shown() as progress:
            work = Work(study, processes, progress, seconds)
            work.run(part)
    else:
        work = Work(study, processes)
    _write_study(work, part, arguments.bootstrap)


def _check(arguments: argparse.Namespace) -> None:
    if (arguments.study is None) == (arguments.runs is None):
        raise ConfigError("compare takes one of --study (a STUDY.yaml) and --runs (two or more evaluated runs)")
    if arguments.runs is not None:
        if len(arguments.runs) < 2:
            raise ConfigError("--runs compares at least two runs; one was given")
        for name in (*_SLICES, "minutes", "dry_run", "report_only"):
            if getattr(arguments, name):
                raise ConfigError(f"--{name.replace('_', '-')} belongs to --study")
    elif arguments.out is not None:
        raise ConfigError("--out belongs to --runs; the report of a study is in its own folder")


def _compare_runs(arguments: argparse.Namespace) -> None:
    from cuma_ds.evaluation.report.html import write_pages
    from cuma_ds.studies.assemble import runs_report
    from cuma_ds.studies.report.markdown import runs_markdown
    from cuma_ds.studies.report.model import write_comparison
    from cuma_ds.studies.report.pictures import runs_pictures

    report = runs_report(arguments.runs, arguments.bootstrap)
    _show(report.splits)
    if arguments.out is None:
        return
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    report.pictures = runs_pictures(folder, report)
    file = write_comparison(folder, report)
    for page in write_pages(folder, runs_markdown(report)):
        print(page)
    print(file)


def _write_study(work: Work, part: Part, replicates: int | None) -> None:
    from cuma_ds.evaluation.report.html import write_pages
    from cuma_ds.studies.assemble import study_report
    from cuma_ds.studies.report.markdown import study_markdown
    from cuma_ds.studies.report.model import write_comparison
    from cuma_ds.studies.report.pictures import study_pictures

    command = shlex.join(["python", "-m", "cuma_ds", "compare", *sys.argv[1:]])
    report = study_report(work, part, command, 1000 if replicates is None else replicates)
    folder = work.study.folder / "report"
    folder.mkdir(parents=True, exist_ok=True)
    report.pictures = study_pictures(folder, report)
    write_comparison(folder, report)
    pages = write_pages(folder, study_markdown(report))
    for table in report.tables:
        _show({f"{table.recipe}, {table.steps:,} steps: {name}": split for name, split in table.splits.items()})
    for line in report.failed:
        print(f"failed: {line}")
    if report.missing:
        print(f"{len(report.missing)} runs are missing; the same command goes on")
    for page in pages:
        print(page)
    if report.failed and not any(table.splits for table in report.tables):
        raise CumaError(f"no run of the study {report.name} could be finished; the first: {report.failed[0]}")


def _show(splits: dict[str, Compared]) -> None:
    """One table a split, for a terminal."""
    from rich.console import Console
    from rich.table import Table

    from cuma_ds.evaluation.report.model import SPLITS
    from cuma_ds.studies.report.markdown import columns, estimate, size

    console = Console()
    for name, split in splits.items():
        caption = size(split).replace("**", "")
        if not split.examples:
            console.print(f"{name}: the runs share no example. {caption}", highlight=False)
            continue
        shown = dict(list(columns(split).items())[:3])
        table = Table(title=SPLITS.get(name, name), caption=caption, title_justify="left", caption_justify="left")
        table.add_column("")
        for head, _ in shown.values():
            table.add_column(head, justify="right")
        for method, row in split.methods.items():
            table.add_row(method, *(estimate(row.scores.get(score), form) for score, (_, form) in shown.items()))
        for pair in split.differences:
            signed = {score: form.replace(":", ":+") for score, (_, form) in shown.items()}
            clear = pair.scores[next(iter(shown))].clear
            cells = (estimate(pair.scores.get(score), form) for score, form in signed.items())
            table.add_row(f"{pair.first} − {pair.second}", *cells, style="bold" if clear else "dim")
        console.print(table)


def _show_plan(work: Work, part: Part) -> None:
    """What would be run, with estimated times."""
    from rich.console import Console
    from rich.table import Table

    from cuma_ds.studies.plan import plan

    planned = plan(work, part)
    table = Table(title=f"study {work.study.name}: {work.study.folder}", title_justify="left")
    for head in ("run", "", "about"):
        table.add_column(head, overflow="fold")
    for row in planned.rows:
        table.add_row(row.name, row.status, "" if row.seconds is None else f"{row.seconds / 60:,.1f} min")
    console = Console()
    console.print(table)
    for line in planned.notes:
        console.print(line, highlight=False, soft_wrap=True)


@contextmanager
def _ended_politely() -> Iterator[None]:
    """A request to end (SIGTERM) ends the running command too, as Ctrl-C does."""

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _shown() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield _Bar(console, bar)


class _Bar:
    """Shows the command that runs, and a line for each that has ended.

    Args:
        console: gets the lines.
        bar: shows the steps of the run in progress.
    """

    def __init__(self, console: Console, bar: RichProgress) -> None:
        self._console, self._bar = console, bar
        self._row = bar.add_task("", total=None)

    def begin(self, task: Task, what: str) -> None:
        """A command starts."""
        total = task.steps if what == "train" else None
        self._bar.reset(self._row, description=f"{task.name}: {what}", total=total, completed=0)

    def step(self, done: int) -> None:
        """Optimizer steps of the training in progress."""
        self._bar.update(self._row, completed=done)

    def end(self, line: str) -> None:
        """A command has ended."""
        self._console.print(line, highlight=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--study", metavar="STUDY", help="YAML file of a study, or the name of one that comes with the package"
    )
    parser.add_argument(
        "--runs", nargs="+", metavar="FOLDER",
        help="evaluated runs, or folders that launchers/evaluate.py wrote (of exports, adapters, plain models)",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="FOLDER", help="with --runs: also write report.html, report.md, comparison.json, pictures"
    )
    parser.add_argument(
        "--bootstrap", type=int, metavar="N", help="bootstrap samples of people (default 1000, or those of the runs)"
    )
    some = parser.add_argument_group("with --study")
    some.add_argument("--dry-run", action="store_true", help="show what would be run and about how long it takes")
    some.add_argument("--report-only", action="store_true", help="run nothing; report what is there")
    some.add_argument("--minutes", type=float, metavar="N", help="start nothing more after so many minutes")
    for name in _SLICES:
        some.add_argument(f"--{name}", nargs="+", metavar="NAME", help=f"only these {name} of the study")
    return parser


if __name__ == "__main__":
    run_main(main)
