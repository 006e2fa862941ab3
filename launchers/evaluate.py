"""Evaluate a run: option probabilities against people's answers, before and after training, in one report."""

from __future__ import annotations

import argparse

from _cli import run_main

_EXAMPLES = """\
examples
  the newest checkpoint of a run:
    python launchers/evaluate.py --run runs/quickstart
  an earlier one, naming only groups of at least 100 people:
    python launchers/evaluate.py --run runs/quickstart --step 50 --set evaluation.min_answers=100"""


def main() -> None:
    """Parse, evaluate, show the table and where the report is."""
    arguments = _parser().parse_args()

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from cuma_ds.evaluation.run import evaluate_run

    overrides = list(arguments.set)
    if arguments.batch_size is not None:
        overrides.append(f"evaluation.batch_size={arguments.batch_size}")
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)
            if done == total and not console.is_terminal:
                console.print(f"{what}: {total} examples", highlight=False)

        report = evaluate_run(arguments.run, arguments.step, overrides, progress)
    for table in report.tables():
        console.print(table)
    for name in ("report.md", "report.json", *report.pictures):
        console.print(str(report.folder / name), highlight=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, metavar="FOLDER", help="run folder, output_dir/name of its recipe")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to evaluate; default: the newest complete one")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="section.key=value", help="override keys of the run's recipe"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="prompts per forward, same as --set evaluation.batch_size=N")
    return parser


if __name__ == "__main__":
    run_main(main)
