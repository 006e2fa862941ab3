"""Columns of a split as few flat arrays, so that millions of rows need no Python object each.

Shapes: M rows, F values of all rows together, Q different names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

Indices = NDArray[np.int64]
Values = NDArray[np.number]


class Labels(Sequence[str]):
    """One of few names for each of M rows. It reads like a list of M texts.

    Attributes:
        names: Q different names, each of which occurs, in the order in which they occur first.
        code_M: place of each row's name in ``names``, int64.
    """

    def __init__(self, names: Sequence[str], code_M: NDArray[np.integer]) -> None:
        """Rows of a table of names, of which some may not occur.

        Args:
            names: the table.
            code_M: row of the table for each of M rows.
        """
        used, first, code = np.unique(code_M, return_index=True, return_inverse=True)
        order = np.argsort(first)
        place = np.empty(len(used), np.int64)
        place[order] = np.arange(len(used))
        self.names: list[str] = [names[used[index]] for index in order]
        self.code_M: Indices = place[code]

    @classmethod
    def of(cls, values: Sequence[str]) -> Labels:
        """Texts as labels; labels stay as they are."""
        if isinstance(values, Labels):
            return values
        place = {name: index for index, name in enumerate(dict.fromkeys(values))}
        return cls(list(place), np.array([place[value] for value in values], dtype=np.int64))

    def take(self, chosen: ArrayLike) -> Labels:
        """The labels of some rows, in the order they are asked for."""
        return Labels(self.names, self.code_M[np.asarray(chosen, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.code_M)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Labels: ...

    def __getitem__(self, index: int | slice) -> str | Labels:
        """One label, or those of a range of rows."""
        if isinstance(index, slice):
            return Labels(self.names, self.code_M[index])
        return self.names[self.code_M[index]]


class Ragged(Sequence[Values]):
    """M arrays of different lengths, one behind the other. It reads like a list of M arrays.

    Attributes:
        values_F: the values of all rows.
    """

    def __init__(self, values_F: Values, lengths_M: NDArray[np.integer]) -> None:
        self.values_F = values_F
        self._start_M1 = np.concatenate([[0], np.cumsum(lengths_M, dtype=np.int64)])

    @classmethod
    def of(cls, rows: Iterable[ArrayLike], dtype: type[np.generic] = np.float64) -> Ragged:
        """Arrays one behind the other; what is ragged already stays as it is."""
        if isinstance(rows, Ragged):
            return rows
        arrays = [np.asarray(row, dtype=dtype) for row in rows]
        return cls(np.concatenate([np.zeros(0, dtype), *arrays]), np.array([len(row) for row in arrays], np.int64))

    @classmethod
    def of_lists(cls, column: pa.ChunkedArray) -> Ragged:
        """A column of lists of numbers."""
        lengths = [np.zeros(0, np.int64), *(np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks)]
        empty = np.zeros(0, column.type.value_type.to_pandas_dtype())
        return cls(
            np.concatenate([empty, *(chunk.flatten().to_numpy() for chunk in column.chunks)]), np.concatenate(lengths)
        )

    @property
    def lengths_M(self) -> Indices:
        """Number of values of each row."""
        return np.diff(self._start_M1)

    @property
    def row_F(self) -> Indices:
        """The row of each value."""
        return np.repeat(np.arange(len(self)), self.lengths_M)

    @property
    def place_F(self) -> Indices:
        """The place of each value in its row, from 0."""
        return np.arange(len(self.values_F)) - np.repeat(self._start_M1[:-1], self.lengths_M)

    def sums(self) -> NDArray[np.float64]:
        """The sum of each row, [M]."""
        return np.bincount(self.row_F, self.values_F, len(self)).astype(np.float64)

    def padded(self, width: int, fill: float = 0.0) -> NDArray[np.float64]:
        """The rows side by side, [M, width], with ``fill`` behind the shorter ones."""
        table = np.full((len(self), width), fill)
        table[self.row_F, self.place_F] = self.values_F
        return table

    def take(self, chosen: ArrayLike) -> Ragged:
        """Some rows, in the order they are asked for."""
        rows = np.asarray(chosen, dtype=np.int64)
        lengths = self.lengths_M[rows]
        first = np.repeat(self._start_M1[rows] - (np.cumsum(lengths) - lengths), lengths)
        return Ragged(self.values_F[first + np.arange(len(first))], lengths)

    def __len__(self) -> int:
        return len(self._start_M1) - 1

    @overload
    def __getitem__(self, index: int) -> Values: ...

    @overload
    def __getitem__(self, index: slice) -> Ragged: ...

    def __getitem__(self, index: int | slice) -> Values | Ragged:
        """One row, or a range of rows."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return self.take(np.arange(len(self))[index])
            own = slice(self._start_M1[start], self._start_M1[max(stop, start)])
            return Ragged(self.values_F[own], np.diff(self._start_M1[start : max(stop, start) + 1]))
        place = range(len(self))[index]
        return self.values_F[self._start_M1[place] : self._start_M1[place + 1]]
