"""Evaluated models compared example by example: the same people, drawn together.

Shapes: M examples, U people, N most options, B bootstrap samples. ``[1 + B]`` is a value over all people, then one of
each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cuma_ds.errors import DataError
from cuma_ds.evaluation.predictions import Predictions, read_predictions
from cuma_ds.evaluation.preference import PairLogps
from cuma_ds.evaluation.preference_split import pair_scores
from cuma_ds.evaluation.report.model import REPORT_FILE, ChoiceSplit, Number, Report, number, read_report
from cuma_ds.evaluation.resampling import interval, resample
from cuma_ds.evaluation.scores import Scorer
from cuma_ds.runs import Run
from cuma_ds.studies.report.model import Compared, Difference, Estimate, MethodScores

Array = NDArray[np.float64]
# Contender -> score -> [1 + B].
Values = dict[str, dict[str, Array]]
# Rows of a report that are no model: the same for every run on the same data.
_REFERENCES = ("collapse", "oracle")


@dataclass(frozen=True)
class Evaluated:
    """A report and the predictions beside it.

    Attributes:
        place: as it was named.
        folder: of the report.
    """

    place: str
    folder: Path
    report: Report
    predictions: dict[str, Predictions]


class Contender(NamedTuple):
    """What is compared: the runs of one method, one for each seed, or a single model."""

    name: str
    runs: Sequence[Evaluated]


def read_evaluated(place: str | Path) -> Evaluated:
    """An evaluated run, or any folder that launchers/evaluate.py wrote.

    Raises:
        DataError: there is no report, or there are no predictions beside it that can be read.
    """
    folder = Path(place)
    if not (folder / REPORT_FILE).is_file():
        folder = Run(folder).report_folder
    try:
        report = read_report(folder)
        if report is None:
            raise DataError(
                f"there is no report in {place}; evaluate it with launchers/evaluate.py, or name the folder of a report"
            )
        return Evaluated(str(place), folder, report, read_predictions(folder))
    except DataError as error:
        raise DataError(f"{place}: {error}" if str(place) not in str(error) else str(error)) from None


def compare(contenders: Sequence[Contender], replicates: int, main: str | None = None) -> dict[str, Compared]:
    """Compare contenders over the examples that all of their runs have, split by split.

    Args:
        contenders: at least two, of reports of one kind.
        replicates: bootstrap samples of people; 0 gives no intervals.
        main: the contender that each other one is compared with; None compares every pair.

    Raises:
        DataError: reports of different kinds, or without a split in common.
    """
    kinds = {run.report.kind: run.place for one in contenders for run in one.runs}
    if len(kinds) > 1:
        (first, a), (second, b), *_ = kinds.items()
        raise DataError(f"{a} is a report on {first} data and {b} one on {second}; they cannot be compared")
    runs = [run for one in contenders for run in one.runs]
    splits = [name for name in runs[0].predictions if all(name in run.predictions for run in runs)]
    if not splits:
        held = "; ".join(f"{run.place} has {', '.join(run.predictions)}" for run in runs[:2])
        raise DataError(f"the reports have no split in common: {held}")
    return {name: _compared(contenders, name, replicates, main) for name in splits}


def _compared(contenders: Sequence[Contender], split: str, replicates: int, main: str | None) -> Compared:
    runs = [run for one in contenders for run in one.runs]
    kept, left_out = _common([run.predictions[split] for run in runs])
    size = len(kept[0].ids)
    found = Compared(
        kind=runs[0].report.kind,
        distance=_distance(runs[0].report, split),
        examples=size,
        left_out=left_out,
        people=None if kept[0].people is None else len(np.unique(np.concatenate([*kept[0].people, np.zeros(0)]))),
        questions=len(set(kept[0].questions)),
    )
    if not size:
        return found
    names = [f"{place}" for place in range(len(runs))]
    by_run = _values(runs, dict(zip(names, kept, strict=True)), replicates)
    found.references = {
        name: {score: number(float(value_B[0])) for score, value_B in by_run[name].items()}
        for name in _REFERENCES
        if name in by_run
    }
    if not left_out:
        found.references |= _floor(runs[0].report, split)
    place = 0
    by_contender: dict[str, list[dict[str, Array]]] = {}
    for one in contenders:
        by_contender[one.name] = [by_run[name] for name in names[place : place + len(one.runs)]]
        place += len(one.runs)
    found.methods = {
        name: MethodScores(scores=_estimates([rows], lambda rows: rows[0])) for name, rows in by_contender.items()
    }
    pairs = combinations(by_contender, 2) if main is None else ((main, name) for name in by_contender if name != main)
    for first, second in pairs:
        rows = [by_contender[first], by_contender[second]]
        scores = _estimates(rows, lambda values: values[0] - values[1])
        found.differences.append(Difference(first=first, second=second, scores=scores))
    return found


def _estimates(
    rows: Sequence[Sequence[Mapping[str, Array]]], combined: Callable[[Sequence[Array]], Array]
) -> dict[str, Estimate]:
    """The mean over seeds of what is made of one or two contenders, with its interval and the value of each seed.

    Args:
        rows: for each contender its runs, one a seed.
        combined: of the contenders' [1 + B].
    """
    scores = [name for name in rows[0][0] if all(name in row for runs in rows for row in runs)]
    paired = len({len(runs) for runs in rows}) == 1
    found = {}
    for name in scores:
        mean_B = combined([np.mean([row[name] for row in runs], axis=0) for runs in rows])
        value = float(mean_B[0])
        ends = interval(mean_B[1:], value) if len(mean_B) > 1 else None
        seeds = [float(combined([row[name] for row in some])[0]) for some in zip(*rows, strict=True)] if paired else []
        found[name] = Estimate(
            value=number(value),
            interval=None if ends is None else (number(ends[0]), number(ends[1])),
            seeds=[number(one) for one in seeds],
        )
    return found


def _common(predictions: Sequence[Predictions]) -> tuple[list[Predictions], int]:
    """The examples that all have, answered by the same people in the same way; and how many of all are not."""
    shared = set.intersection(*(set(one.ids) for one in predictions))
    everything = set.union(*(set(one.ids) for one in predictions))
    place = [{key: row for row, key in enumerate(one.ids)} for one in predictions]
    first = predictions[0]
    keys = [
        key
        for key in first.ids
        if key in shared
        and all(
            _same(first.counts_MN[place[0][key]], one.counts_MN[rows[key]])
            for one, rows in zip(predictions, place, strict=True)
        )
    ]
    kept = [one.only([rows[key] for key in keys]) for one, rows in zip(predictions, place, strict=True)]
    return kept, len(everything) - len(keys)


def _same(counts_N: Array, others_N: Array) -> bool:
    a, b = counts_N[np.isfinite(counts_N)], others_N[np.isfinite(others_N)]
    return len(a) == len(b) and bool(np.allclose(a, b))


def _floor(report: Report, split: str) -> dict[str, dict[str, Number]]:
    """The scores of the truth itself and of a perfect sampler, as the report has them: nobody can do better."""
    found = report.splits[split]
    if not isinstance(found, ChoiceSplit):
        return {}
    return {
        name: {score: value for score, value in scores if isinstance(value, float)}
        for name, scores in found.floor.items()
    }


def _distance(report: Report, split: str) -> str:
    found = report.splits[split]
    return found.distance if isinstance(found, ChoiceSplit) else ""


def _values(runs: Sequence[Evaluated], kept: Mapping[str, Predictions], replicates: int) -> Values:
    """Every score of every run, and of the references of the first."""
    report, first = runs[0].report, next(iter(kept.values()))
    mains = dict(zip(kept, [run.report.main for run in runs], strict=True))
    if report.kind == "choice":
        scorer = Scorer(first.examples(), {}, report.min_answers, report.min_subgroup)
        contenders = {name: one.of(mains[name]) for name, one in kept.items()}
        contenders |= {name: first.of(name) for name in _REFERENCES if name in first.predicted}
        return scorer.replicates(contenders, replicates)
    person_M = np.arange(len(first.ids))
    if first.people is not None:
        person_M = np.unique([int(people[0]) for people in first.people], return_inverse=True)[1]
    if report.kind == "chat":
        tokens_M = first.counts_MN[:, 0]
        losses = {name: {"loss": one.predicted[mains[name]][:, 0] * tokens_M} for name, one in kept.items()}
        return _ratios(losses, tokens_M, person_M, replicates)
    scores = {}
    for name, one in kept.items():
        logps = {who: PairLogps(values.astype(np.float64), one.counts_MN) for who, values in one.predicted.items()}
        scores[name] = pair_scores(mains[name], logps)
    return _ratios(scores, np.ones(len(person_M)), person_M, replicates)


def _ratios(sums: Mapping[str, Mapping[str, Array]], total_M: Array, person_M: NDArray, replicates: int) -> Values:
    """Ratios of sums over examples, of all people and of each bootstrap sample of people.

    Args:
        sums: contender -> score -> [M] what each example adds to the numerator.
        total_M: what it adds to the denominator.
        person_M: whose example it is, from 0 on.
        replicates: B.
    """
    people = int(person_M.max()) + 1
    weights_BU = np.concatenate(
        [np.ones((1, people)), *resample(np.ones(people, dtype=np.int64), replicates, 0, max(replicates, 1))]
    )
    total_B = weights_BU @ np.bincount(person_M, total_M, people)
    return {
        name: {
            score: (weights_BU @ np.bincount(person_M, value_M, people)) / np.maximum(total_B, 1e-12)
            for score, value_M in row.items()
        }
        for name, row in sums.items()
    }
