"""A study's report from what its runs left on the disk."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from cuma_ds.errors import CumaError, DataError
from cuma_ds.evaluation.generation import ANSWERS_FILE
from cuma_ds.evaluation.metrics import distinct, equal_lengths
from cuma_ds.evaluation.report.model import ChoiceSplit, Number, Report, number, read_report
from cuma_ds.methods.model import Trained
from cuma_ds.planning.skeleton import Setup, read_model_config
from cuma_ds.profiles import ProfileTable
from cuma_ds.runs import Run
from cuma_ds.studies.compared import Contender, Evaluated, compare, read_evaluated
from cuma_ds.studies.report.model import (
    Curve,
    CurvePoint,
    Measured,
    Reached,
    RunsReport,
    StudyReport,
    Table,
    Trial,
    Tuned,
)
from cuma_ds.studies.study import Task, run_arguments, run_config
from cuma_ds.studies.tuning import at_edge, best_rate
from cuma_ds.studies.work import Cell, Part, Work, metric_rows

Runs = Mapping[str, Sequence[Measured]]


def study_report(work: Work, part: Part, command: str, replicates: int) -> StudyReport:
    """Everything that is known of a part of a study.

    Args:
        work: the study and its runs.
        part: what the report is about.
        command: that made it.
        replicates: bootstrap samples of people.
    """
    study = work.study
    tables = [_table(work, recipe, steps, part, replicates) for recipe in part.recipes for steps in part.budgets]
    runs = [run for table in tables for group in table.runs.values() for run in group]
    return StudyReport(
        name=study.name,
        command=command,
        main=study.first,
        bootstrap=replicates,
        wall_seconds=round(sum(record.seconds for record in work.processes.journal.records), 1),
        machine=f"{os.cpu_count()} CPU cores, {platform.machine()}",
        failed=[f"{name}: {message}" for name, message in sorted(work.failed.items()) if _is_in(part, name)],
        missing=[run.name for run in runs if run.status == "missing"],
        tables=tables,
    )


def _is_in(part: Part, name: str) -> bool:
    """Whether a run is one of a part of the study."""
    recipe, method, *_ = name.split(".")
    return recipe in part.recipes and method in part.methods


def _table(work: Work, recipe: str, steps: int, part: Part, replicates: int) -> Table:
    table = Table(recipe=recipe, steps=steps, runs={})
    contenders: list[Contender] = []
    for method in part.methods:
        cell = Cell(recipe, method, steps)
        tried = work.known(cell)
        rate = work.rate(cell, tried)
        if tried:
            trials = [
                Trial(rate=one, value=value, failed=work.failed.get(work.trial(cell, one).name))
                for one, value in sorted(tried.items())
            ]
            chosen = best_rate(tried) if rate is None else rate
            trial = work.trial(cell, trials[0].rate)
            table.tuned[method] = Tuned(steps=trial.steps, rate=chosen, at_edge=at_edge(tried), trials=trials)
        tasks = [Task(*cell, seed, rate) for seed in part.seeds]
        table.runs[method] = [_measured(work, task, known=rate is not None or not tried) for task in tasks]
        if tried and best_rate(tried) is None and work.next(cell, tried) is None:
            for run in table.runs[method]:
                run.status, run.message = "failed", "no learning rate could be tried"
        evaluated = []
        for task in tasks:
            if _final_report(work, task) is not None:
                evaluated.append(read_evaluated(work.folder(task).folder))
        if evaluated:
            contenders.append(Contender(method, evaluated))
    if contenders:
        main = work.study.first if work.study.first in [one.name for one in contenders] else contenders[0].name
        table.splits = compare(contenders, replicates, main)
    _curves(table, work.study.targets)
    table.equal_lengths = _equal_lengths({one.name: one.runs[0] for one in contenders})
    return table


def _equal_lengths(runs: Mapping[str, Evaluated]) -> dict[str, Number]:
    """Distinct-2 of the answers of each method, cut to the shortest that any gave to the same conversation."""
    asked, answers = set(), {}
    for method, run in runs.items():
        file = run.folder / ANSWERS_FILE
        if run.report.generation is None or not file.is_file():
            return {}
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        asked.add(json.dumps([row["messages"] for row in rows]))
        answers[method] = [row[run.report.main] for row in rows]
    if len(asked) != 1:
        return {}
    return {method: number(distinct(texts, 2)) for method, texts in equal_lengths(answers).items()}


def _final_report(work: Work, task: Task) -> Report | None:
    """The report of a run that is there and belongs to the study."""
    try:
        return read_report(work.folder(task).report_folder) if work.is_trained(task) else None
    except CumaError:
        return None


def _measured(work: Work, task: Task, known: bool) -> Measured:
    run, config = work.folder(task), run_config(work.study, task)
    words = work.processes.command("train", run_arguments(work.study, task), work.study.ranks)
    found = Measured(
        name=task.name,
        seed=task.seed,
        learning_rate=config.training.learning_rate if known else None,
        status="missing",
        message=work.failed.get(task.name),
        train=work.processes.typed(words),
    )
    try:
        trained = known and work.is_trained(task)
    except CumaError as error:
        return found.model_copy(update={"status": "failed", "message": str(error)})
    if not trained:
        return found.model_copy(update={"status": "failed" if found.message else "missing"})
    found.status = "trained"
    found.parameters = trained_parameters(run)
    records = work.processes.journal.of(task.name, "train")
    found.wall_seconds = round(sum(record.seconds for record in records), 1)
    _read_metrics(found, work, task)
    report = read_report(run.report_folder)
    if report is not None:
        _read_report(found, report)
    return found


def trained_parameters(run: Run) -> int:
    """How many numbers a run trains, over all ranks."""
    config, table = run.config(), None
    if config.adapters.uses_profiles:
        table = ProfileTable.load(run.profiles_file)
    width = 0 if table is None else table.embeddings.shape[1]
    sized = config.model_copy(update={"adapters": config.adapters.model_copy(update={"profile_dim": width})})
    trained: list[Trained] = list(Setup(read_model_config(config.model.path), sized).build().trained_parameters())
    return sum(one.parameter.numel() for one in trained)


def _read_metrics(found: Measured, work: Work, task: Task) -> None:
    """Cost, and the learning curve."""
    rows = [row for row in metric_rows(work.folder(task).metrics) if row.get("step")]
    if not rows:
        return
    step_R = np.array([row["step"] for row in rows], dtype=np.float64)
    passed_R = np.diff(step_R, prepend=0.0)
    seconds_R = np.cumsum(passed_R * np.array([row.get("seconds") or 0.0 for row in rows]))
    rate_R = np.array([(row.get("tokens_per_second") or 0.0) * (row.get("seconds") or 0.0) for row in rows])
    tokens_R = np.cumsum(passed_R * rate_R)
    found.train_seconds, found.tokens = round(float(seconds_R[-1]), 1), float(round(tokens_R[-1]))
    for key in ("memory_gib", "gpu_memory_gib"):
        values = [value for row in rows if (value := row.get(key)) is not None]
        setattr(found, key, round(max(values), 3) if values else None)
    valid = [
        CurvePoint(
            step=step,
            tokens=float(round(np.interp(step, step_R, tokens_R))),
            seconds=round(float(np.interp(step, step_R, seconds_R)), 1),
            value=value,
        )
        for step in work.points(task)
        if (value := work.result(task, step)) is not None
    ]
    found.curve = Curve(
        steps=[int(step) for step in step_R],
        tokens=[float(round(tokens)) for tokens in tokens_R],
        seconds=[round(float(seconds), 1) for seconds in seconds_R],
        loss=[row.get("loss") for row in rows],
        valid=valid,
    )


def _read_report(found: Measured, report: Report) -> None:
    """What the run's own report says beside scores."""
    first = next(iter(report.splits.values()))
    if isinstance(first, ChoiceSplit):
        found.entropy = first.rows[report.main].entropy
        found.swapped = first.rows["swapped"].emd if "swapped" in first.rows else None
    if report.routing is not None:
        routers = report.routing.routers
        found.load_entropy = float(np.mean([router.load_entropy for router in routers]))
        found.unused = float(np.mean([router.unused for router in routers]))
        if report.routing.information is not None:
            found.profile_information = float(np.mean(report.routing.information.profile))
    if report.gradients is not None:
        found.conflicting = {kind: row.conflicting for kind, row in report.gradients.rows.items()}
    if report.generation is not None:
        row = report.generation.rows[report.main]
        found.distinct_1, found.distinct_2, found.words = row.distinct_1, row.distinct_2, row.words


def _curves(table: Table, targets: Sequence[float]) -> None:
    """When targets were reached, and what was reached at the time when the first method had finished."""
    curves = {
        method: [run.curve for run in runs if run.curve is not None and len(run.curve.valid) > 1]
        for method, runs in table.runs.items()
    }
    curves = {method: found for method, found in curves.items() if found}
    for target in targets:
        table.reached[f"{target:g}"] = {method: when_reached(found, target) for method, found in curves.items()}
    if len(curves) > 1:
        shared = min(curve.valid[-1].seconds for found in curves.values() for curve in found)
        table.equal_seconds = shared
        table.at_equal_time = {
            method: _mean([value_after(curve, shared) for curve in found]) for method, found in curves.items()
        }


def when_reached(curves: Sequence[Curve], target: float) -> Reached:
    """When the runs of a method reached a target: by the seconds of those that did."""
    seconds = [found for curve in curves if (found := seconds_until(curve, target)) is not None]
    known = [[point.value for point in curve.valid if point.value is not None] for curve in curves]
    at_first = any(values[0] <= target for values in known if values)
    return Reached(seconds=_mean(seconds), seeds=len(seconds), of=len(curves), at_most=at_first)


def seconds_until(curve: Curve, target: float) -> float | None:
    """Seconds of training until ``valid`` first was at ``target`` or below; between checkpoints by a straight line.

    Returns:
        The seconds of the first checkpoint where it was there already, which is the most that it took. None where it
        never was.
    """
    known = [(point.seconds, point.value) for point in curve.valid if point.value is not None]
    if known and known[0][1] <= target:
        return known[0][0]
    for (before, high), (after, low) in pairwise(known):
        if high > target >= low:
            return before + (after - before) * (high - target) / (high - low)
    return None


def value_after(curve: Curve, seconds: float) -> float | None:
    """What ``valid`` was after so many seconds of training; None before the first checkpoint."""
    known = [(point.seconds, point.value) for point in curve.valid if point.value is not None]
    if not known or seconds < known[0][0]:
        return None
    times, values = zip(*known, strict=True)
    return float(np.interp(seconds, times, values))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), 6) if known and len(known) == len(values) else None


def runs_report(places: Sequence[str], replicates: int | None) -> RunsReport:
    """Compare evaluated runs pair by pair.

    Args:
        places: run folders, or folders of reports.
        replicates: bootstrap samples of people; None takes what the reports have.

    Raises:
        DataError: two of them are the same, one cannot be read, or they have nothing in common.
    """
    if len(set(places)) < len(places):
        raise DataError("--runs: one folder is named twice; name different ones")
    found = [read_evaluated(place) for place in places]
    names = [one.report.run for one in found]
    if len(set(names)) < len(names):
        names = list(places)
    samples = max(one.report.bootstrap for one in found) if replicates is None else replicates
    contenders = [Contender(name, [one]) for name, one in zip(names, found, strict=True)]
    return RunsReport(
        runs=dict(zip(names, places, strict=True)), bootstrap=samples, splits=compare(contenders, samples)
    )
