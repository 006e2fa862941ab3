"""The micro batches of each step, a pure function of (seed, step, rank): any number of ranks sees the same units in
the same step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from cuma_ds.data.batch import PROFILE_SEED, Batch, Unit, as_filler, collate, pack
from cuma_ds.errors import DataError


@dataclass(frozen=True)
class Draw:
    """Which rows of a split each rank meets in each step.

    The rows come as one permutation per epoch after another, so small data wraps around. Step t takes the next
    ``global_batch_size`` of them whatever the number of ranks is, and ranks without a row get fillers.

    Attributes:
        n_rows: rows of the split.
        global_batch_size: rows per optimizer step, over all ranks.
        micro_batch_size: most rows per rank in one forward.
        seed: of the permutations.
        rank, world: this process and the number of processes that share the step.

    Raises:
        DataError: no rows.
    """

    n_rows: int
    global_batch_size: int
    micro_batch_size: int
    seed: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.n_rows < 1:
            raise DataError("there are no training examples; at least one is needed")

    @property
    def accumulation(self) -> int:
        """Micro batches per step and rank."""
        return -(-self._slots // self.micro_batch_size)

    @property
    def micro(self) -> int:
        """Rows of each micro batch, fillers included."""
        return -(-self._slots // self.accumulation)

    @property
    def _slots(self) -> int:
        return -(-self.global_batch_size // self.world)

    def first(self, step: int) -> int:
        """The row that fillers of this rank copy where it has none of its own in a micro batch."""
        return self._row(step, 0)

    def rows(self, step: int) -> list[list[int]]:
        """The rows of this rank's micro batches in ``step``; fewer than ``micro`` where fillers stand behind them."""
        return [[self._row(step, place) for place in places] for places in self.places()]

    def places(self) -> list[range]:
        """Where the rows of this rank's micro batches stand among those of :meth:`global_rows`."""
        starts = [(number * self.world + self.rank) * self.micro for number in range(self.accumulation)]
        return [range(start, max(start, min(start + self.micro, self.global_batch_size))) for start in starts]

    def global_rows(self, step: int) -> list[int]:
        """The rows of ``step`` over all ranks and micro batches, ``global_batch_size`` of them."""
        return [self._row(step, place) for place in range(self.global_batch_size)]

    def _row(self, step: int, offset: int) -> int:
        epoch, place = divmod(step * self.global_batch_size + offset, self.n_rows)
        return int(_permutation(self.seed, epoch, self.n_rows)[place])


@lru_cache(maxsize=4)  # a step touches few epochs at a time
def _permutation(seed: int, epoch: int, n_rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n_rows)


class Stream:
    """The micro batches of one rank, drawn from a split.

    Args:
        draw: which rows.
        unit_of: row number to unit; called again whenever a row comes up.
        pad_id: token id of padding.
        pack_length: tokens of a row that several examples share; None gives each a row of its own.
    """

    def __init__(self, draw: Draw, unit_of: Callable[[int], Unit], pad_id: int, pack_length: int | None = None) -> None:
        self.draw, self.unit_of, self.pad_id, self.pack_length = draw, unit_of, pad_id, pack_length

    def step(self, number: int) -> list[Batch]:
        """This rank's micro batches of step ``number`` (from 0), ``draw.accumulation`` of them."""
        return [
            self._batch(number, rows, places)
            for rows, places in zip(self.draw.rows(number), self.draw.places(), strict=True)
        ]

    def _batch(self, step: int, rows: list[int], places: Iterable[int]) -> Batch:
        units = [self.unit_of(row) for row in rows]
        examples = [example for unit in units for example in unit]
        filler = [as_filler(example) for example in (units or [self.unit_of(self.draw.first(step))])[0]]
        if self.pack_length is None:
            batch = collate(examples + filler * (self.draw.micro - len(units)), self.pad_id)
        else:
            batch = pack(examples or filler, self.pad_id, self.pack_length)
        seeds = [
            profile_seed(self.draw.seed, step, place) for place, unit in zip(places, units, strict=True) for _ in unit
        ]
        seed_N = torch.tensor(seeds + [0] * (len(batch.profile_rows_N) - len(seeds)))
        return dataclasses.replace(batch, rows=tuple(rows), extras={PROFILE_SEED: seed_N})


def profile_seed(run_seed: int, step: int, place: int) -> int:
    """Seed of what training does to the profile of one row of a step, the same on any number of ranks.

    It is the first 63 bits that ``numpy.random.SeedSequence([run_seed, step, place])`` generates. The examples of one
    unit have one seed.

    Args:
        run_seed: of the recipe.
        step: from 0.
        place: where the row stands among those of :meth:`Draw.global_rows`.
    """
    return int(np.random.SeedSequence([run_seed, step, place]).generate_state(1, np.uint64)[0] >> np.uint64(1))
