"""Routing analysis: information against scikit-learn, load against counting, maps that are the same every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from scipy.spatial.distance import pdist
from sklearn.metrics import mutual_info_score

from cuma_ds.evaluation.report.routing_plots import plot_information, plot_interference, plot_load, plot_map
from cuma_ds.evaluation.routing import (
    comparable_means,
    cultural_map,
    expert_load,
    field_information,
    mutual_information,
)
from cuma_ds.inference.forward import RoutingTally


def test_mutual_information_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        joint = rng.integers(0, 6, size=(4, 7))
        pairs = [(x, y) for x in range(4) for y in range(7) for _ in range(joint[x, y])]
        assert float(mutual_information(joint)) == pytest.approx(
            mutual_info_score(*zip(*pairs, strict=True)), abs=1e-12
        )


def test_a_field_that_decides_the_expert_is_worth_its_entropy() -> None:
    labels = ["a", "b"] * 30
    gates = np.zeros((60, 2, 4))
    gates[::2, :, 0] = gates[1::2, :, 1] = 1
    found = field_information(gates, labels)
    np.testing.assert_allclose(found.value_R, np.log(2))
    assert (found.corrected_R > 0.95 * np.log(2)).all()


def test_a_field_that_decides_nothing_is_worth_nothing_above_shuffled_labels() -> None:
    rng = np.random.default_rng(1)
    gates = np.eye(8)[rng.integers(0, 8, size=(40, 200))]
    found = field_information(gates, [str(k % 10) for k in range(40)])
    assert found.value_R.mean() > 0.5, "few profiles and many labels: the plain measure is far off"
    assert np.abs((found.value_R - found.null_R).mean()) < 0.02
    assert np.mean(found.value_R > found.high_R) < 0.12


def test_profiles_without_a_label_are_left_out_and_unique_labels_have_no_null() -> None:
    gates = np.random.default_rng(2).dirichlet(np.ones(3), size=(6, 2))
    with_gaps = field_information(gates, ["a", "a", None, "b", "b", None])
    np.testing.assert_allclose(with_gaps.value_R, field_information(gates[[0, 1, 3, 4]], ["a", "a", "b", "b"]).value_R)
    alone = field_information(gates, list("abcdef"))
    assert alone.null_R is None
    np.testing.assert_array_equal(alone.corrected_R, alone.value_R)


def test_load_and_entropy_by_hand() -> None:
    tally = RoutingTally(
        ("r0", "r1"), {}, np.array([[10.0, 10, 10, 10], [40, 0, 0, 0]]), np.array([20 * np.log(2), 0]), 20
    )
    even, one = expert_load(tally)
    assert (even.router, even.load, even.load_entropy, even.unused) == ("r0", [0.25] * 4, 1.0, 0)
    assert even.gate_entropy == pytest.approx(np.log(2), abs=1e-6)
    assert (one.load, one.load_entropy, one.unused) == ([1, 0, 0, 0], 0.0, 3)


def test_names_are_compared_on_questions_that_everybody_answered() -> None:
    gates = np.arange(10, dtype=np.float32).reshape(5, 1, 2)
    found = comparable_means(["q1", "q1", "q2", "q1", "q1"], ["a", "b", "a", "c", "c"], [1, 10, 9, 1, 3], gates)
    np.testing.assert_allclose(found["a"], gates[0])
    np.testing.assert_allclose(found["c"], (gates[3] + 3 * gates[4]) / 4)
    # Nobody answered everything: the question of most is taken, and whoever did not answer it is left out.
    assert set(comparable_means(["q1", "q1", "q2"], ["a", "b", "c"], [1, 1, 1], gates[:3])) == {"a", "b"}


@pytest.mark.parametrize("most", [1000, 5])
def test_a_map_of_points_in_a_plane_keeps_their_distances(most: int, monkeypatch) -> None:
    monkeypatch.setattr("cuma_ds.evaluation.routing._MOST_SCALED", most)
    rng = np.random.default_rng(0)
    gates = (rng.normal(size=(20, 2)) @ rng.normal(size=(2, 12))).reshape(20, 3, 4)
    found = cultural_map(gates)
    assert found.method == ("MDS" if most == 1000 else "PCA")
    np.testing.assert_allclose(pdist(found.xy_N2), pdist(gates.reshape(20, -1)), rtol=0.02)
    assert found.fidelity > 0.99
    np.testing.assert_array_equal(found.xy_N2, cultural_map(gates).xy_N2)


def test_equal_routings_lie_on_one_spot() -> None:
    found = cultural_map(np.full((5, 2, 3), 1 / 3))
    assert np.allclose(found.xy_N2, 0)
    assert np.isnan(found.fidelity)


@pytest.mark.parametrize(("profiles", "routers", "experts"), [(3, 1, 1), (40, 30, 8), (9, 4, 40)])
def test_pictures_of_any_size(tmp_path: Path, profiles: int, routers: int, experts: int) -> None:
    rng = np.random.default_rng(0)
    gates = rng.dirichlet(np.ones(experts), size=(profiles, routers))
    names = [f"model.layers.{k}.self_attn.q_proj" for k in range(routers)]
    tally = RoutingTally(tuple(names), {}, gates.sum(axis=0), np.ones(routers), 10)
    plot_load(tmp_path / "load.png", expert_load(tally))
    labels = [["x", "y", None][k % 3] for k in range(profiles)]
    whole = field_information(gates, [str(k) for k in range(profiles)])
    plot_information(tmp_path / "information.png", names, whole, {"a_field": field_information(gates, labels, 5)})
    xy = cultural_map(gates).xy_N2
    people = [f"Place $ number {k}" for k in range(profiles)]
    plot_map(
        tmp_path / "map.png", xy, np.ones(profiles), people, ("mean answer", rng.random(profiles)), {"a field": labels}
    )
    plot_map(tmp_path / "plain.png", xy, np.ones(profiles), [""] * profiles, None, {})
    cosines = np.corrcoef(rng.normal(size=(profiles, 9)))
    plot_interference(tmp_path / "interference.png", people, {"dense": cosines, "CuMA": cosines})
    for file in tmp_path.glob("*.png"):
        assert min(imread(file).shape[:2]) > 150, file.name
