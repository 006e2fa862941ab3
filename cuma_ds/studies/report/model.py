"""What comparison.json of a study, or of a comparison of runs, holds."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel

from cuma_ds.evaluation.report.model import Interval, Number
from cuma_ds.files import write_atomically

FORMAT_VERSION = 1
COMPARISON_FILE = "comparison.json"


class Estimate(BaseModel):
    """A score of a method, or a difference of two.

    Attributes:
        value: mean over seeds.
        interval: 95% bootstrap interval of that mean over people; the seeds stay as they are.
        seeds: the value of each seed; empty for a difference of methods with unequal numbers of seeds.
    """

    value: Number
    interval: Interval | None = None
    seeds: list[Number] = []

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero and every seed has the sign of the mean."""
        if self.value is None or self.interval is None or self.interval[0] is None or self.interval[1] is None:
            return False
        sign = 1 if self.value > 0 else -1
        agree = all(one is not None and one * sign > 0 for one in self.seeds)
        return agree and self.interval[0] * self.interval[1] > 0


class MethodScores(BaseModel):
    """Scores of one method, by their names in report.json."""

    scores: dict[str, Estimate]


class Difference(BaseModel):
    """Scores of ``first`` less those of ``second``, over the same drawn people; seeds are paired in their order."""

    first: str
    second: str
    scores: dict[str, Estimate]


class Compared(BaseModel):
    """One split, over the examples that all runs have.

    Attributes:
        distance: what ``emd`` is, as in report.json.
        examples: compared ones.
        left_out: those that not all runs have, or that other people answered.
        people: None where the data does not say who answered.
        references: reference -> score, of rows that are no model.
        methods: method (or run) -> scores.
        differences: pair by pair.
    """

    kind: str
    distance: str
    examples: int
    left_out: int
    people: int | None
    questions: int
    references: dict[str, dict[str, Number]] = {}
    methods: dict[str, MethodScores] = {}
    differences: list[Difference] = []


class Trial(BaseModel):
    """One learning rate that was tried; ``value`` is what it reached on ``valid`` (lower is better)."""

    rate: float
    value: Number
    failed: str | None = None


class Tuned(BaseModel):
    """How the learning rate of a method was chosen.

    Attributes:
        rate: the best; None where every trial failed or some are missing.
        at_edge: the best is the smallest or largest that was tried.
    """

    steps: int
    rate: float | None
    at_edge: bool
    trials: list[Trial]


class CurvePoint(BaseModel):
    """What a run had reached after so many steps: the score of :class:`Trial` on ``valid``."""

    step: int
    tokens: float
    seconds: float
    value: Number


class Curve(BaseModel):
    """Learning of one run.

    Attributes:
        steps, tokens, seconds: done so far, at each logged step; seconds of training alone.
        loss: training loss there.
        valid: at checkpoints.
    """

    steps: list[int]
    tokens: list[float]
    seconds: list[float]
    loss: list[Number]
    valid: list[CurvePoint]


class Measured(BaseModel):
    """What one run is, costs and does.

    Attributes:
        status: trained, failed or missing.
        message: why it failed.
        train: the command, as it can be typed in the folder that the study was started in.
        parameters: trained ones.
        wall_seconds: of the training process, all starts together.
        memory_gib, gpu_memory_gib: peak of the main rank.
        entropy: of the predicted distributions on the first split, in nats.
        swapped: distance with the profiles of others.
        load_entropy, unused: of routers, means.
        profile_information: between the chosen expert and the profile, nats, mean over routers.
        conflicting: kind of adapters -> share of pairs of groups whose gradients point apart.
        distinct_1, distinct_2, words: of generated answers.
    """

    name: str
    seed: int
    learning_rate: Number
    status: str
    message: str | None = None
    train: str
    parameters: int | None = None
    wall_seconds: Number = None
    train_seconds: Number = None
    tokens: Number = None
    memory_gib: Number = None
    gpu_memory_gib: Number = None
    entropy: Number = None
    swapped: Number = None
    load_entropy: Number = None
    unused: Number = None
    profile_information: Number = None
    conflicting: dict[str, Number] = {}
    distinct_1: Number = None
    distinct_2: Number = None
    words: Number = None
    curve: Curve | None = None


class Reached(BaseModel):
    """How long a method took to a target distance on ``valid``.

    Attributes:
        seconds: of training, mean over the seeds that reached it (between checkpoints by a straight line); None where
            none did.
        seeds: how many did.
        of: how many were trained.
        at_most: one of them was there at its first checkpoint already, so that the mean is the most that it took.
    """

    seconds: Number = None
    seeds: int = 0
    of: int
    at_most: bool = False


class Table(BaseModel):
    """One recipe at one budget. ``runs`` and ``tuned`` are by method.

    Attributes:
        splits: comparisons of the methods with at least one evaluated run.
        reached: target distance -> method -> when it was reached.
        equal_lengths: method -> Distinct-2 of generated answers, each cut to the shortest that any method gave to the
            same conversation (first seeds); empty where none were generated.
        equal_seconds: the time at which the first method had finished.
        at_equal_time: method -> distance on ``valid`` at that time, mean over seeds.
    """

    recipe: str
    steps: int
    runs: dict[str, list[Measured]]
    tuned: dict[str, Tuned] = {}
    splits: dict[str, Compared] = {}
    reached: dict[str, dict[str, Reached]] = {}
    equal_lengths: dict[str, Number] = {}
    equal_seconds: Number = None
    at_equal_time: dict[str, Number] = {}


class StudyReport(BaseModel):
    """The report of a study."""

    format_version: int = FORMAT_VERSION
    name: str
    command: str
    main: str
    bootstrap: int
    wall_seconds: float
    machine: str
    failed: list[str] = []
    missing: list[str] = []
    tables: list[Table]
    pictures: dict[str, str] = {}


class RunsReport(BaseModel):
    """The comparison of runs, pair by pair."""

    format_version: int = FORMAT_VERSION
    runs: dict[str, str]
    bootstrap: int
    splits: dict[str, Compared]
    pictures: dict[str, str] = {}


def write_comparison(folder: Path, report: StudyReport | RunsReport) -> Path:
    """Write the comparison, complete or not at all."""
    file = folder / COMPARISON_FILE
    write_atomically(
        file, json.dumps(report.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )
    return file
