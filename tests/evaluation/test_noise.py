"""The noise floor against a loop over drawn people with SciPy, and against known figures of the benchmark."""

from __future__ import annotations

import numpy as np
import pytest
from run_folder import content
from scipy import stats
from scipy.spatial.distance import jensenshannon

from cuma_ds.config import EvaluationSection
from cuma_ds.evaluation.examples import ChoiceExamples
from cuma_ds.evaluation.noise import Truth, cell_floor, question_floor
from cuma_ds.evaluation.sections import choice_split


def truths(sizes: list[int], answers: int, seed: int = 0, width: int = 11) -> Truth:
    rng = np.random.default_rng(seed)
    shares = np.zeros((len(sizes), width))
    for row, size in zip(shares, sizes, strict=True):
        row[:size] = rng.dirichlet(np.ones(size))
    return Truth(shares, np.full(len(sizes), float(answers)), np.zeros(len(sizes), bool), np.array(sizes, float) - 1)


@pytest.mark.parametrize(("answers", "expected"), [(21, 0.10), (200, 0.034), (2000, 0.011)])
def test_a_perfect_sampler_of_survey_questions_is_this_far_away(answers: int, expected: float) -> None:
    """Scales as the benchmark's 239 questions have them, and answers as spread as people's."""
    sizes = [2] * 30 + [3] * 30 + [4] * 100 + [5] * 25 + [10] * 54
    for floor in (cell_floor(truths(sizes, answers), 40).sampler["emd"],
                  question_floor(truths(sizes, answers), 40).sampler["emd_questions"]):  # fmt: skip
        assert floor == pytest.approx(expected, rel=0.15)


def test_floors_are_means_over_drawn_people() -> None:
    """People are drawn one by one, and distances are SciPy's."""
    answers, rng = 15, np.random.default_rng(5)
    truth = truths([4, 3], answers, width=4)
    truth = truth._replace(answers_D=np.array([15.0, 45.0]))
    totals: dict[tuple[str, str], list[float]] = {}
    for _ in range(1500):
        sums: dict[tuple[str, str], float] = {}
        for shares, size, count in zip(truth.shares_DN, (4, 3), (15, 45), strict=True):
            places, p = np.arange(size) / (size - 1), shares[:size]
            people, others = (rng.choice(size, count, p=p) for _ in range(2))
            observed = np.bincount(people, minlength=size) / count
            for row, predicted in (("truth", p), ("sampler", np.bincount(others, minlength=size) / count)):
                for name, value in {
                    "emd": stats.wasserstein_distance(places, places, predicted, observed),
                    "total_variation": np.abs(predicted - observed).sum() / 2,
                    "similarity": 1 - jensenshannon(predicted, observed),
                }.items():
                    sums[row, name] = sums.get((row, name), 0.0) + value * count / 60
        for key, value in sums.items():
            totals.setdefault(key, []).append(value)
    found = cell_floor(truth, 1500)
    for (row, name), values in totals.items():
        error = np.std(values) / np.sqrt(len(values))
        assert getattr(found, row)[name] == pytest.approx(np.mean(values), abs=5 * error), (row, name)
    assert found.truth["emd"] < found.sampler["emd"]


def test_the_truth_itself_is_nearer_than_a_sampler_by_the_root_of_two() -> None:
    found = question_floor(truths([4] * 60, 400), 40)
    assert found.sampler["emd_questions"] / found.truth["emd_questions"] == pytest.approx(np.sqrt(2), rel=0.03)
    assert found.truth["questions_within"] == found.sampler["questions_within"] == 1.0
    assert found.truth["questions_auc"] > found.sampler["questions_auc"]


def test_nothing_is_said_without_cells() -> None:
    assert cell_floor(truths([], 10)).truth == {}


def test_the_report_has_the_floor_of_its_own_sizes() -> None:
    """Weights of unequal size tell as much as fewer answers, so that the floor rises."""
    columns = {
        "question_id": ["q"], "question": ["?"], "options": [["a", "b", "c"]], "group": ["x"], "profile": [0],
    }  # fmt: skip
    counts = np.array([30, 50, 20])
    plain = ChoiceExamples.of({**columns, "counts": [counts]})
    settings = EvaluationSection(bootstrap=0)
    split = content(choice_split(plain, {"trained": [[0.2, 0.5, 0.3]]}, {}, settings))
    expected = cell_floor(Truth(counts[None] / 100, np.array([100.0]), np.array([False]), np.array([2.0])))
    assert split["floor"]["sampler"]["emd"] == pytest.approx(expected.sampler["emd"], abs=1e-6)
    assert split["floor"]["truth"]["emd_questions"] == pytest.approx(expected.truth["emd"], rel=0.1)
    weights = np.tile([0.2, 1.8], 50)
    sums = np.bincount(np.repeat(np.arange(3), counts), weights, 3)
    weighted = ChoiceExamples.of({**columns, "counts": [sums], "answers": [counts], "weights": [weights]})
    heavier = content(choice_split(weighted, {"trained": [[0.2, 0.5, 0.3]]}, {}, settings))
    effective = weights.sum() ** 2 / (weights**2).sum()
    ratio = heavier["floor"]["sampler"]["emd"] / split["floor"]["sampler"]["emd"]
    assert ratio == pytest.approx(np.sqrt(100 / effective), rel=0.1)
