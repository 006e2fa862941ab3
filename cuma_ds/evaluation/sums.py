"""Sums over people as one matrix product: every sum of a split is a column, every kind of people a row.

Shapes: A answers, Y kinds of people, B replicates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Block:
    """Columns of sums: what each answer adds to which of ``width`` columns (-1: to none), in one or several parts."""

    width: int
    parts: list[tuple[Indices, Array]]


class Layout:
    """All blocks as one sparse matrix [Y, columns]: what one person of each kind adds to every sum, with weights."""

    def __init__(self, groups: Sequence[Mapping[str, Block]], kind_A: Indices, weight_A: Array, kinds: int) -> None:
        self.places: list[dict[str, slice]] = []
        rows, columns, values = [], [], []
        self.width = 0
        for group in groups:
            self.places.append({})
            for name, block in group.items():
                self.places[-1][name] = slice(self.width, self.width + block.width)
                for column_A, value_A in block.parts:
                    used = (column_A >= 0) & (value_A != 0)
                    rows.append(kind_A[used].astype(np.int32))
                    columns.append((column_A[used] + self.width).astype(np.int32))
                    values.append(value_A[used] * weight_A[used])
                self.width += block.width
        shape = (kinds, self.width)
        self._matrix = csr_array((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=shape)

    def sums(self, weights_BY: Array) -> list[dict[str, Array]]:
        """The sums [B, width] of every block when each kind of people counts ``weights_BY`` times."""
        total = np.asarray((self._matrix.T @ weights_BY.T).T)
        return [{name: total[:, place] for name, place in group.items()} for group in self.places]


def join(code_A: Indices, option_A: Indices, width: int) -> Indices:
    return np.where(code_A >= 0, code_A * width + option_A, -1)


def ratio(numerator: Array, denominator: Array) -> Array:
    """Quotient; nan where the denominator is zero."""
    return np.divide(
        numerator, denominator, out=np.full(np.broadcast(numerator, denominator).shape, np.nan), where=denominator > 0
    )


def mean(values_BG: Array) -> Array:
    """Mean over the last axis of what is a number; nan where nothing is."""
    known = np.isfinite(values_BG)
    return ratio(np.where(known, values_BG, 0.0).sum(axis=-1), known.sum(axis=-1).astype(np.float64))
