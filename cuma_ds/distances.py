"""Distances of two distributions over the options of a question.

Shapes: n options of one question, in their order.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cuma_ds.errors import DataError

Array = NDArray[np.float64]


def emd(p: ArrayLike, q: ArrayLike, steps: ArrayLike | None = None) -> Array:
    """Earth mover's distance of two distributions on ordered options, normalised to [0, 1].

    The options stand at k / (n - 1), so this is the Wasserstein-1 distance there: sum_k |P_k - Q_k| / (n - 1) with P, Q
    the cumulative distributions. 0 = equal, 1 = all mass on opposite ends.

    Args:
        p, q: [..., n] probabilities, broadcast against each other.
        steps: [...] n - 1 of each, where distributions of fewer options were filled up with zeros.

    Raises:
        DataError: different numbers of options.
    """
    p, q = _comparable(p, q)
    return np.abs(np.cumsum(p - q, axis=-1)).sum(axis=-1) / (
        max(p.shape[-1] - 1, 1) if steps is None else np.asarray(steps)
    )


def total_variation(p: ArrayLike, q: ArrayLike) -> Array:
    """Total variation distance of two distributions on unordered options: 1/2 sum_k |p_k - q_k|, in [0, 1].

    Args:
        p, q: [..., n] probabilities, broadcast against each other.

    Raises:
        DataError: different numbers of options.
    """
    p, q = _comparable(p, q)
    return np.abs(p - q).sum(axis=-1) / 2


def jensen_shannon(p: ArrayLike, q: ArrayLike) -> Array:
    """Jensen-Shannon distance of two distributions: the square root of their divergence in nats, in [0, 0.833].

    GlobalOpinionQA (arXiv 2306.16388) reports one minus it.

    Args:
        p, q: [..., n] probabilities, broadcast against each other.

    Raises:
        DataError: different numbers of options.
    """
    p, q = _comparable(p, q)
    middle = (p + q) / 2
    divergence = (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2
    return np.sqrt(np.maximum(divergence, 0.0))


def _comparable(p: ArrayLike, q: ArrayLike) -> tuple[Array, Array]:
    """Both as float64.

    Raises:
        DataError: different numbers of options.
    """
    p, q = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    if p.shape[-1] != q.shape[-1]:
        raise DataError(f"distributions over {p.shape[-1]} and {q.shape[-1]} options cannot be compared")
    return p, q


def _relative_entropy(p: Array, q: Array) -> Array:
    """Kullback-Leibler divergence of q from p in nats, with 0 log 0 = 0."""
    ratio = np.divide(p, q, out=np.ones(np.broadcast(p, q).shape), where=(p > 0) & (q > 0))
    return (p * np.log(ratio)).sum(axis=-1)


def distance(p: ArrayLike, q: ArrayLike, nominal: ArrayLike, steps: ArrayLike | None = None) -> Array:
    """:func:`total_variation` where ``nominal`` [...] is true (options without an order), else :func:`emd`."""
    if not np.any(nominal):
        return emd(p, q, steps)
    return np.where(nominal, total_variation(p, q), emd(p, q, steps))


def distance_name(nominal: Iterable[bool]) -> str:
    """Which distance questions are judged by: ``EMD`` (none is nominal), ``TV`` (all are) or ``EMD and TV``."""
    return {(): "EMD", (False,): "EMD", (True,): "TV"}.get(tuple(sorted(set(nominal))), "EMD and TV")
