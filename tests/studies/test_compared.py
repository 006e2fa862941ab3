"""Paired comparisons: over the same people, and equal to what NumPy and SciPy make of the predictions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from cuma_ds.errors import DataError
from cuma_ds.evaluation.predictions import Predictions, write_predictions
from cuma_ds.evaluation.report.model import (
    FORMAT_VERSION,
    ChatReport,
    ChatScores,
    ChatSplit,
    ChoiceReport,
    write_json,
)
from cuma_ds.studies.compared import Contender, Evaluated, compare, read_evaluated
from cuma_ds.studies.report.model import Estimate

OPTIONS = 3


def answered(people: int = 240, groups: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The group [U] and the answer [U] of each of U people."""
    generator = np.random.default_rng(seed)
    group_U = np.arange(people) % groups
    chances = generator.dirichlet(np.ones(OPTIONS), size=groups)
    return group_U, np.array([generator.choice(OPTIONS, p=chances[group]) for group in group_U])


def predictions(group_U: np.ndarray, answer_U: np.ndarray, shift: float, groups: int | None = None) -> Predictions:
    """Each group is one example; what is predicted is a fixed distribution, moved by ``shift``."""
    count = int(group_U.max()) + 1 if groups is None else groups
    counts, people = [], []
    for group in range(count):
        own = np.flatnonzero(group_U == group)
        order = own[np.argsort(answer_U[own], kind="stable")]
        counts.append(np.bincount(answer_U[own], minlength=OPTIONS))
        people.append(order.astype(np.int64))
    chances = np.array([0.5 - shift, 0.3, 0.2 + shift]) + 0.02 * np.arange(count)[:, None] * np.array([1, -1, 0])
    return Predictions(
        ids=[f"id-{group}" for group in range(count)],
        questions=["asked"] * count,
        groups=list(range(count)),
        nominal=[False] * count,
        counts_MN=np.array(counts, dtype=np.float64),
        predicted={"trained": chances.astype(np.float32)},
        people=people,
    )


def evaluated(kept: Predictions, place: str = "run") -> Evaluated:
    size = {"cells": 0, "answers": 0}
    lists = {name: {} for name in ("rows", "differences", "reliability", "subgroups", "questions")}
    split = {"distance": "EMD", "groups": 1, "answers": 1, "people": 1, "compared": size, "left_out": size, "cells": []}
    report = ChoiceReport(
        format_version=FORMAT_VERSION, run=place, checkpoint="step-1", kind="choice", main="trained", min_answers=1,
        min_subgroup=2, bootstrap=0, splits={"test": {**split, **lists}},
    )  # fmt: skip
    return Evaluated(place, Path(place), report, {"test": kept})


def emd_of(group_U: np.ndarray, answer_U: np.ndarray, chances_GN: np.ndarray) -> float:
    """Mean EMD of groups, weighted by answers, by hand."""
    total = 0.0
    for group, chances_N in enumerate(chances_GN):
        own = answer_U[group_U == group]
        if len(own):
            shares = np.bincount(own, minlength=OPTIONS) / len(own)
            total += len(own) * np.abs(np.cumsum(shares - chances_N)).sum() / (OPTIONS - 1)
    return total / len(answer_U)


def test_a_difference_and_its_interval_are_those_of_an_independent_paired_bootstrap() -> None:
    group_U, answer_U = answered()
    first, second = (predictions(group_U, answer_U, shift) for shift in (0.0, 0.15))
    found = compare([Contender("a", [evaluated(first)]), Contender("b", [evaluated(second)])], 4000)["test"]
    chances = [one.predicted["trained"].astype(np.float64) for one in (first, second)]

    def difference(people: np.ndarray) -> float:
        drawn = people.astype(int)
        return emd_of(group_U[drawn], answer_U[drawn], chances[0]) - emd_of(group_U[drawn], answer_U[drawn], chances[1])

    everybody = np.arange(len(answer_U))
    independent = scipy.stats.bootstrap(
        (everybody,), difference, n_resamples=4000, vectorized=False, method="percentile", rng=np.random.default_rng(1)
    )
    value = difference(everybody)
    # The interval of a distance is moved so that the mean of the samples is the measured value.
    moved = value - independent.bootstrap_distribution.mean()
    estimate = found.differences[0].scores["emd"]
    assert estimate.value == pytest.approx(value, abs=1e-6)
    low, high = (end + moved for end in independent.confidence_interval)
    assert estimate.interval == pytest.approx((low, high), abs=0.06 * (high - low))
    single = [found.methods[name].scores["emd"].interval for name in "ab"]
    paired = estimate.interval[1] - estimate.interval[0]
    apart = sum((end[1] - end[0]) ** 2 for end in single) ** 0.5
    assert paired < 0.9 * apart, "the samples of both must be of the same people"
    assert (found.people, found.examples, found.left_out, found.questions) == (240, 4, 0, 1)


def test_seeds_are_averaged_and_paired_in_their_order() -> None:
    group_U, answer_U = answered()
    shifts = {"a": [0.0, 0.1], "b": [0.2, 0.05]}
    contenders = [
        Contender(name, [evaluated(predictions(group_U, answer_U, shift)) for shift in own])
        for name, own in shifts.items()
    ]
    found = compare(contenders, 200)["test"]
    single = {
        shift: compare([Contender("x", [evaluated(predictions(group_U, answer_U, shift))])] * 2, 0)["test"]
        .methods["x"].scores["emd"].value
        for own in shifts.values() for shift in own
    }  # fmt: skip
    for name, own in shifts.items():
        assert found.methods[name].scores["emd"].seeds == pytest.approx([single[shift] for shift in own], abs=1e-6)
        assert found.methods[name].scores["emd"].value == pytest.approx(np.mean([single[s] for s in own]), abs=1e-6)
    pair = found.differences[0].scores["emd"]
    assert pair.seeds == pytest.approx([single[0.0] - single[0.2], single[0.1] - single[0.05]], abs=2e-6)
    assert pair.value == pytest.approx(np.mean(pair.seeds), abs=2e-6)


def test_a_difference_is_clear_only_where_all_seeds_agree() -> None:
    assert Estimate(value=0.2, interval=(0.1, 0.3), seeds=[0.1, 0.3]).clear
    assert not Estimate(value=0.2, interval=(0.1, 0.3), seeds=[-0.1, 0.5]).clear
    assert not Estimate(value=0.2, interval=(-0.1, 0.3), seeds=[0.1, 0.3]).clear
    assert not Estimate(value=0.2, seeds=[0.1, 0.3]).clear


def test_only_what_all_were_asked_is_compared_and_it_is_said() -> None:
    group_U, answer_U = answered()
    whole = predictions(group_U, answer_U, 0.0)
    part = whole.only([3, 1])
    other = predictions(group_U, answer_U, 0.1)
    other.counts_MN[1] += 1  # other answers under the same id
    found = compare([Contender("a", [evaluated(part)]), Contender("b", [evaluated(other)])], 50)["test"]
    assert (found.examples, found.left_out) == (1, 3)
    assert found.people == (group_U == 3).sum()
    nothing = compare([Contender("a", [evaluated(part)]), Contender("b", [evaluated(other.only([0]))])], 50)["test"]
    assert (nothing.examples, nothing.left_out, nothing.methods) == (0, 3, {})


def test_conversations_are_compared_by_their_loss_per_token() -> None:
    generator = np.random.default_rng(3)
    tokens_M, person_M = generator.integers(3, 40, 60).astype(float), np.arange(60) % 20
    loss_RM = generator.gamma(2.0, 1.0, (2, 60)).astype(np.float32)
    runs = []
    for place, loss_M in zip("ab", loss_RM, strict=True):
        kept = Predictions(
            ids=[str(row) for row in range(60)], questions=[""] * 60, groups=[0] * 60, nominal=[False] * 60,
            counts_MN=tokens_M[:, None], predicted={"trained": loss_M[:, None]},
            people=[np.array([person]) for person in person_M],
        )  # fmt: skip
        split = ChatSplit(conversations=60, people=20, tokens=int(tokens_M.sum()), rows={"trained": ChatScores()})
        report = ChatReport(
            run=place, checkpoint="c", kind="chat", main="trained", min_answers=1, min_subgroup=2, bootstrap=0,
            splits={"test": split},
        )  # fmt: skip
        runs.append(Evaluated(place, Path(place), report, {"test": kept}))
    found = compare([Contender(one.place, [one]) for one in runs], 3000)["test"].differences[0].scores["loss"]
    nll_RU = np.array([np.bincount(person_M, loss_M * tokens_M, 20) for loss_M in loss_RM])
    tokens_U = np.bincount(person_M, tokens_M, 20)
    drawn_BU = generator.integers(0, 20, (3000, 20))
    values_B = (nll_RU[0] - nll_RU[1])[drawn_BU].sum(axis=1) / tokens_U[drawn_BU].sum(axis=1)
    assert found.value == pytest.approx((nll_RU[0] - nll_RU[1]).sum() / tokens_U.sum(), abs=1e-6)
    low, high = np.quantile(values_B, [0.025, 0.975]) + (found.value - values_B.mean())
    assert found.interval == pytest.approx((low, high), abs=0.08 * (high - low))


def test_what_cannot_be_compared_is_one_line(tmp_path: Path) -> None:
    group_U, answer_U = answered()
    kept = evaluated(predictions(group_U, answer_U, 0.0))
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match=r"there is no report in .*bare; evaluate it with launchers/evaluate.py"):
        read_evaluated(tmp_path / "bare")
    write_json(tmp_path / "bare", kept.report)
    with pytest.raises(DataError, match=r"bare/predictions.npz cannot be read .*; evaluate again") as error:
        read_evaluated(tmp_path / "bare")
    assert "\n" not in str(error.value)
    write_predictions(tmp_path / "bare", kept.predictions)
    assert read_evaluated(tmp_path / "bare").predictions["test"].ids == kept.predictions["test"].ids
    elsewhere = Evaluated("b", Path("b"), kept.report, {"heldout": kept.predictions["test"]})
    with pytest.raises(DataError, match="no split in common: run has test; b has heldout"):
        compare([Contender("a", [kept]), Contender("b", [elsewhere])], 0)
