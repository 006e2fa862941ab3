"""What a study still has to do, and doing it: trials of learning rates, runs, evaluations."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from cuma_ds.errors import CheckpointError, ConfigError, CumaError
from cuma_ds.evaluation.report.model import ChatSplit, ChoiceSplit, Report, read_report
from cuma_ds.learned_settings import first_difference
from cuma_ds.parallel.stored import stored_steps
from cuma_ds.runs import Run
from cuma_ds.studies.processes import CommandFailed, Processes
from cuma_ds.studies.study import Study, Task, run_arguments, run_config
from cuma_ds.studies.tuning import Tried, best_rate, next_rate

VALID = "valid"
# Bytes at the end of a file of metrics that hold its last row.
_TAIL = 20_000


class Part(NamedTuple):
    """The part of a study that is worked on."""

    recipes: Sequence[str]
    methods: Sequence[str]
    budgets: Sequence[int]
    seeds: Sequence[int]


class Cell(NamedTuple):
    """A recipe with a method at one budget: what the learning rate is chosen for."""

    recipe: str
    method: str
    steps: int


class Progress(Protocol):
    """Told what is being done."""

    def begin(self, task: Task, what: str) -> None:
        """A command starts."""

    def step(self, done: int) -> None:
        """Optimizer steps that the training in progress has done."""

    def end(self, line: str) -> None:
        """A command has ended."""


class _Silent:
    def begin(self, task: Task, what: str) -> None: ...

    def step(self, done: int) -> None: ...

    def end(self, line: str) -> None: ...


def part_of(study: Study, **chosen: Sequence[str] | None) -> Part:
    """The part of a study that was asked for.

    Args:
        study: the whole.
        chosen: ``recipes``, ``methods``, ``budgets`` and ``seeds`` as text; None takes all.

    Raises:
        ConfigError: something is not in the study.
    """
    found: dict[str, list] = {}
    for what, names in chosen.items():
        every = list(getattr(study, what))
        by_text = {str(one): one for one in every}
        for name in names or ():
            if name not in by_text:
                raise ConfigError(f"--{what} {name}: the study {study.name} has {', '.join(by_text)}")
        found[what] = every if names is None else [by_text[name] for name in by_text if name in names]
    return Part(**found)


class Work:
    """A study's runs on the disk, and the commands that make them.

    Args:
        study: what to do.
        processes: starts commands.
        progress: told what is being done.
        seconds: no command is started after so many; None for no limit.

    Attributes:
        failed: name of a run -> why its last command failed. It is tried again at the next start.
    """

    def __init__(
        self, study: Study, processes: Processes, progress: Progress | None = None, seconds: float | None = None
    ) -> None:
        self.study = study
        self.processes = processes
        self.progress: Progress = progress or _Silent()
        last = {record.run: record for record in processes.journal.records}
        self.failed = {name: record.message for name, record in last.items() if record.message is not None}
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def out_of_time(self) -> bool:
        """Whether no command may be started any more."""
        return self._end is not None and time.monotonic() >= self._end

    def run(self, part: Part) -> None:
        """Do what is missing of a part, one command at a time. What fails is kept in ``failed``; the rest goes on."""
        for cell in cells(part):
            tried = self.tune(cell)
            rate = self.rate(cell, tried)
            if rate is None and self.study.grids()[cell.method]:
                continue  # every trial failed, or there is no time left
            for seed in part.seeds:
                task = Task(*cell, seed, rate)
                try:
                    self._train(task)
                    for steps in self._curve(task):
                        self._evaluate(task, steps)
                    self._report(task)
                except OutOfTime:
                    break
                except CumaError as error:
                    self._fail(task, error)

    def tune(self, cell: Cell) -> Tried:
        """Try learning rates until the best is not at an edge of those that were tried, and return all results."""
        tried: dict[float, float | None] = {}
        while (rate := self.next(cell, tried)) is not None and not self.out_of_time:
            task = self.trial(cell, rate)
            try:
                self._train(task)
                self._evaluate(task, self._last(task))
                tried[rate] = self.result(task)
            except OutOfTime:
                break
            except CumaError as error:
                self._fail(task, error)
                tried[rate] = None
        return tried

    def known(self, cell: Cell) -> Tried:
        """Results of the trials that are on the disk."""
        tried: dict[float, float | None] = {}
        while (rate := self.next(cell, tried)) is not None:
            task = self.trial(cell, rate)
            if task.name in self.failed:
                tried[rate] = None
            elif (result := self.result(task)) is not None:
                tried[rate] = result
            else:
                break
        return tried

    def next(self, cell: Cell, tried: Tried) -> float | None:
        """The next learning rate to try."""
        tuning, grid = self.study.tuning, self.study.grids()[cell.method]
        if tuning is None or (len(grid) <= 1 and not tuning.extend):
            return None
        return next_rate(grid, tried, tuning.extend) if grid else None

    def rate(self, cell: Cell, tried: Tried) -> float | None:
        """The learning rate of a cell's runs; None where it is not known (yet), or not chosen by the study."""
        grid = self.study.grids()[cell.method]
        if len(grid) == 1 and not tried:
            return grid[0]
        return best_rate(tried) if self.next(cell, tried) is None else None

    def trial(self, cell: Cell, rate: float) -> Task:
        """The run that tries a learning rate. It has the first seed, so that the best one is a run of the study."""
        tuning = self.study.tuning
        steps = cell.steps if tuning is None or tuning.steps is None else tuning.steps
        return Task(cell.recipe, cell.method, steps, self.study.seeds[0], rate)

    def folder(self, task: Task) -> Run:
        """The run of a task, which need not exist."""
        return Run(self.study.folder / "runs" / task.name)

    def is_trained(self, task: Task) -> bool:
        """Whether the run is there to its last step.

        Raises:
            ConfigError: the folder holds a run of another configuration, or something else.
        """
        run, config = self.folder(task), run_config(self.study, task)
        if not run.recipe.is_file():
            if run.folder.is_dir() and any(run.folder.iterdir()):
                raise CheckpointError(f"{run.folder} exists and is no run folder; move it away")
            return False
        changed = None if config.model.init_from else first_difference(run.config(), run.as_started(config))
        if changed is not None:
            raise ConfigError(
                f"{run.folder} holds a run with {changed.key}: {changed.started}, but the study says {changed.now}; "
                "give the study another name, or move the run away"
            )
        steps = stored_steps(run.checkpoints)
        return bool(steps) and steps[-1] in (0, task.steps)

    def points(self, task: Task) -> Iterator[int]:
        """Steps of the checkpoints that are there, the last among them."""
        yield from stored_steps(self.folder(task).checkpoints)

    def valid_folder(self, task: Task, step: int) -> Path:
        """The report on ``valid`` of one checkpoint."""
        return self.study.folder / VALID / task.name / f"step-{step}"

    def result(self, task: Task, step: int | None = None) -> float | None:
        """What a run reached on ``valid`` after ``step`` steps (its last by default); lower is better.

        Returns:
            The distance; the loss of conversations; less the accuracy of preferences. None where it is not known.
        """
        steps = list(self.points(task))
        if step is None and not steps:
            return None
        report = read_report(self.valid_folder(task, steps[-1] if step is None else step))
        return None if report is None else judged(report)

    def expected_seconds(self, task: Task) -> float | None:
        """How long a run and its evaluations take; None where neither a run nor the study tells."""
        expected = self.study.expected
        per_step = self._seconds_per_step(task) or expected.seconds_per_step
        if per_step is None:
            return None
        return task.steps * per_step + 3 * expected.seconds_per_start

    def _seconds_per_step(self, task: Task) -> float | None:
        """Measured in other runs of the same recipe and method, else of the same recipe."""
        times: dict[bool, list[float]] = {}
        for record in self.processes.journal.records:
            recipe, method, *_ = record.run.split(".")
            if record.what == "train" and record.code == 0 and recipe == task.recipe:
                rows = step_seconds(Run(self.study.folder / "runs" / record.run).metrics)
                times.setdefault(method == task.method, []).extend(rows)
        rows = times.get(True) or times.get(False) or []
        return sum(rows) / len(rows) if rows else None

    def _train(self, task: Task) -> None:
        if not self.is_trained(task):
            arguments = run_arguments(self.study, task)
            self._do(task, "train", self.processes.command("train", arguments, self.study.ranks))

    def _last(self, task: Task) -> list[int]:
        return list(self.points(task))[-1:]

    def _curve(self, task: Task) -> list[list[int]]:
        """Checkpoints by the command that evaluates them: the last as a trial's, the others in one process."""
        *before, last = self.points(task)
        if self.study.evaluation.ranks > 1:
            return [[step] for step in (*before, last)]
        return [steps for steps in (before, [last]) if steps]

    def _evaluate(self, task: Task, steps: Sequence[int]) -> None:
        """Evaluate checkpoints on the people for choosing settings, where the study chooses or draws a curve."""
        if self.study.tuning is None and self.study.evaluation.checkpoints == 1:
            return
        folders, named = [self.valid_folder(task, step) for step in steps], [str(step) for step in steps]
        out = folders[0] if len(steps) == 1 else folders[0].parent
        arguments = ["--run", str(self.folder(task).folder), "--step", *named, "--splits", VALID, "--brief"]
        words = self.processes.command(
            "evaluate", [*arguments, "--out", str(out), *self._settings()], self.study.evaluation.ranks
        )
        what = "-".join([VALID, *named])
        if not self._is_done(task, what, words, folders):
            self._do(task, what, words)

    def _report(self, task: Task) -> None:
        """Evaluate the finished run on the people that nothing was chosen on, with all that the study measures."""
        evaluation, run = self.study.evaluation, self.folder(task)
        arguments = ["--run", str(run.folder)]
        if evaluation.gradients and run.config().adapters.has_router and evaluation.ranks == 1:
            arguments.append("--gradients")
        if evaluation.generate is not None:
            arguments += ["--generate", str(evaluation.generate), "--max-new-tokens", str(evaluation.max_new_tokens)]
        words = self.processes.command("evaluate", [*arguments, *self._settings()], evaluation.ranks)
        if not self._is_done(task, "report", words, [run.report_folder]):
            self._do(task, "report", words)

    def _settings(self) -> list[str]:
        settings = self.study.evaluation.set
        return ["--set", *settings] if settings else []

    def _is_done(self, task: Task, what: str, words: Sequence[str], folders: Sequence[Path]) -> bool:
        """Whether the same command was the last of its kind, ended well, and left its reports."""
        records = self.processes.journal.of(task.name, what)
        done = bool(records) and records[-1].code == 0 and records[-1].command == self.processes.typed(words)
        return done and all(read_report(folder) is not None for folder in folders)

    def _do(self, task: Task, what: str, words: Sequence[str]) -> None:
        """Run one command.

        Raises:
            CommandFailed: it ended with an error, or there is no time left to start it.
        """
        if self.out_of_time:
            raise OutOfTime("there is no time left")
        self.progress.begin(task, what)
        metrics = self.folder(task).metrics
        record = self.processes.run(task.name, what, words, lambda: self.progress.step(last_step(metrics)))
        ended = f"{record.seconds:,.0f} s" if record.message is None else f"failed: {record.message}"
        self.progress.end(f"{task.name}: {what}: {ended}")
        if record.message is not None:
            raise CommandFailed(record.message)
        self.failed.pop(task.name, None)

    def _fail(self, task: Task, error: CumaError) -> None:
        self.failed[task.name] = str(error)
        if not isinstance(error, CommandFailed):  # of a command it has been said
            self.progress.end(f"{task.name}: {error}")


class OutOfTime(CumaError):
    """No command may be started any more; what is missing is done at the next start."""


def cells(part: Part) -> Iterator[Cell]:
    """Every recipe, budget and method of a part."""
    for recipe in part.recipes:
        for steps in part.budgets:
            yield from (Cell(recipe, method, steps) for method in part.methods)


def judged(report: Report, split: str = VALID) -> float | None:
    """What a report says of a split in one number, lower is better."""
    found = report.splits.get(split)
    if isinstance(found, ChoiceSplit):
        return found.rows[report.main].emd
    if isinstance(found, ChatSplit):
        return found.rows[report.main].loss
    if found is None or (accuracy := found.rows[report.main].accuracy) is None:
        return None
    return -accuracy


def metric_rows(metrics: Path) -> list[dict[str, float | None]]:
    """The rows of a run's metrics, without one that was cut short; none where there is no such file."""
    rows = []
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def last_step(metrics: Path) -> int:
    """Of a run in progress; 0 before its first row."""
    if not metrics.is_file():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - _TAIL))
        steps = re.findall(rb'^{"step": (\d+)', file.read(), re.MULTILINE)
    return int(steps[-1]) if steps else 0


def step_seconds(metrics: Path) -> list[float]:
    """Seconds of one step, at each logged step."""
    return [float(seconds) for row in metric_rows(metrics) if (seconds := row.get("seconds")) is not None]
