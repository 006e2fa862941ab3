"""The cultural map of a question: groups in the plane, near each other where the routers treat them alike.

Shapes: G groups of the map, B people who are placed on it, R routers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.spatial.distance import cdist

from cuma_ds.evaluation.routing import cultural_map

Array = NDArray[np.float64]


class Landscape(NamedTuple):
    """The map of one question.

    Attributes:
        names: of the groups.
        gates_GK: routing of each, K = R E.
        xy_G2: where they stand, as :func:`.cultural_map` has it.
        fidelity: rank correlation of distances on the map with distances between routings.
    """

    names: Sequence[str]
    gates_GK: Array
    xy_G2: Array
    fidelity: float


class Places(NamedTuple):
    """People on a map.

    Attributes:
        land: the map.
        xy_B2: where they stand.
        alike: for each, the groups that are routed most like them, nearest first.
    """

    land: Landscape
    xy_B2: Array
    alike: list[list[str]]


def landscape(names: Sequence[str], gates_GRE: NDArray[np.floating]) -> Landscape:
    """The map of at least three groups by their routing."""
    drawn = cultural_map(gates_GRE)
    return Landscape(names, np.asarray(gates_GRE, np.float64).reshape(len(gates_GRE), -1), drawn.xy_N2, drawn.fidelity)


def placed(land: Landscape, gates_BRE: NDArray[np.floating], nearest: int = 3) -> Places:
    """Put people on a map, which stays as it is.

    Each stands where the distances to all groups fit those between routings best (least squares), which is how the map
    places the groups themselves.
    """
    gates_BK = np.asarray(gates_BRE, np.float64).reshape(len(gates_BRE), -1)
    apart_BG = cdist(gates_BK, land.gates_GK)
    order_BG = apart_BG.argsort(axis=1, kind="stable")
    xy_B2 = np.stack([_best_place(land.xy_G2, row) for row in apart_BG])
    return Places(land, xy_B2, [[land.names[group] for group in row[:nearest]] for row in order_BG])


def _best_place(xy_G2: Array, apart_G: Array) -> Array:
    """The point whose distances to others come nearest to given ones; the search starts at the closest of them."""

    def stress(xy_2: Array) -> float:
        return float(np.square(np.linalg.norm(xy_G2 - xy_2, axis=1) - apart_G).sum())

    start = xy_G2[int(apart_G.argmin())]
    return np.asarray(minimize(stress, start, method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9}).x)
