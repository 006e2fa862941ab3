"""EMD and total variation against scipy and their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cuma_ds.distances import distance, distance_name, emd, total_variation
from cuma_ds.errors import DataError


@st.composite
def two_distributions(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    options = draw(st.integers(2, 11))
    weights = st.lists(st.integers(0, 1000), min_size=options, max_size=options).filter(any)
    p, q = np.array(draw(weights), dtype=float), np.array(draw(weights), dtype=float)
    return p / p.sum(), q / q.sum()


@settings(deadline=None, derandomize=True)
@given(two_distributions())
def test_emd_is_scipys_wasserstein_distance_on_the_unit_interval(pair: tuple[np.ndarray, np.ndarray]) -> None:
    p, q = pair
    places = np.linspace(0, 1, len(p))
    assert float(emd(p, q)) == pytest.approx(stats.wasserstein_distance(places, places, p, q), abs=1e-12)


@settings(deadline=None, derandomize=True)
@given(two_distributions())
def test_emd_is_a_distance_in_0_1_that_reversing_the_scale_leaves_alone(pair: tuple[np.ndarray, np.ndarray]) -> None:
    p, q = pair
    assert 0 <= emd(p, q) <= 1 + 1e-12
    assert float(emd(p, q)) == pytest.approx(float(emd(q, p)))
    assert float(emd(p, q)) == pytest.approx(float(emd(p[::-1], q[::-1])))
    assert emd(p, p) == 0


@settings(deadline=None, derandomize=True)
@given(two_distributions())
def test_total_variation_is_the_most_that_any_set_of_options_differs_by(pair: tuple[np.ndarray, np.ndarray]) -> None:
    p, q = pair
    tv = float(total_variation(p, q))
    assert tv == pytest.approx(float((p - q)[p > q].sum()), abs=1e-12)
    assert tv == pytest.approx(float(total_variation(q, p)))
    assert float(emd(p, q)) <= tv + 1e-12
    order = np.random.default_rng(len(p)).permutation(len(p))
    assert tv == pytest.approx(float(total_variation(p[order], q[order])), abs=1e-12)


def test_each_question_has_its_own_distance() -> None:
    p, q = [[1, 0, 0], [1, 0, 0]], [[0, 0.5, 0.5], [0, 0.5, 0.5]]
    np.testing.assert_allclose(distance(p, q, [False, True]), [0.75, 1.0])
    assert [distance_name(some) for some in ([], [False], [True, True], [True, False])] == [
        "EMD",
        "EMD",
        "TV",
        "EMD and TV",
    ]
    with pytest.raises(DataError, match="3 and 4 options"):
        total_variation([1, 0, 0], [1, 0, 0, 0])


@pytest.mark.parametrize("options", [2, 3, 7])
def test_emd_of_opposite_ends_is_one_and_of_neighbours_one_step(options: int) -> None:
    eye = np.eye(options)
    assert float(emd(eye[0], eye[-1])) == pytest.approx(1.0)
    assert float(emd(eye[0], eye[1])) == pytest.approx(1 / (options - 1))


def test_emd_broadcasts_over_leading_dimensions() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(5), size=(3, 4)), rng.dirichlet(np.ones(5), size=4)
    expected = [
        [stats.wasserstein_distance(np.arange(5) / 4, np.arange(5) / 4, p[i, j], q[j]) for j in range(4)]
        for i in range(3)
    ]
    np.testing.assert_allclose(emd(p, q), expected, atol=1e-12)


def test_emd_refuses_different_scales() -> None:
    with pytest.raises(DataError, match="3 and 4 options"):
        emd([1, 0, 0], [1, 0, 0, 0])
