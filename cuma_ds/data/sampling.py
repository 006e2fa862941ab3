"""A sample of a split: people first, then their answers.

A benchmark asks each person hundreds of questions. Rows drawn at random would stand for as many people as there are
rows, and almost every row would be a prompt of its own.

Shapes: M rows of a split, A answers (conversations, pairs), U people.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from cuma_ds.data.rows import ArrowFile, Histograms, Split, choice_batch, choice_schema


class Limits(NamedTuple):
    """How much of a split is kept.

    Attributes:
        people: most people; None keeps all.
        examples: most answers of theirs (conversations, pairs); None keeps all.
        seed: of both draws. With one seed, fewer people are a part of more people.
    """

    people: int | None = None
    examples: int | None = None
    seed: int = 0


class Sampled(NamedTuple):
    """What was kept of a split: people and answers (conversations, pairs), and how many of each there were."""

    split: Split
    people: int
    of_people: int
    answers: int
    of_answers: int


def sample(split: Split, limits: Limits) -> Sampled:
    """People drawn at random, then answers drawn at random from all that these people gave.

    Args:
        split: of any kind. Rows of choice questions lose the answers that were not drawn; distributions stay whole.
        limits: how much is kept.

    Returns:
        The sample in the order of the rows, in memory; the split itself where the limits are no smaller than it is.
    """
    person_A = _people(split)
    people = np.unique(person_A)
    generator = np.random.default_rng(limits.seed)
    order_U = generator.permutation(len(people))
    kept = np.sort(people[order_U[: limits.people]])
    kept_A = np.flatnonzero(np.isin(person_A, kept))
    if limits.examples is not None:
        kept_A = np.sort(generator.permutation(kept_A)[: limits.examples])
    sizes = len(np.unique(person_A[kept_A])), len(people), len(kept_A), len(person_A)
    if len(kept_A) == len(person_A):
        return Sampled(split, *sizes)
    torn = split.kind == "choice" and not split.distributions
    return Sampled(_answers(split, kept_A) if torn else split.select(kept_A), *sizes)


def _people(split: Split) -> np.ndarray:
    """[A] who gave each answer (had each conversation), row after row; each row of distributions is one."""
    if split.distributions:
        return np.arange(len(split))
    chunks = [np.zeros(0, np.int32), *(chunk.flatten().to_numpy() for chunk in split.rows.table["people"].chunks)]
    return np.concatenate(chunks)


def _answers(split: Split, kept_A: np.ndarray) -> Split:
    """The rows that are left of a choice split with some of its answers.

    Args:
        split: the whole split.
        kept_A: places of the answers that are kept, row after row, ascending.
    """
    batches, first = [], 0
    for batch in split.rows.table.to_batches():
        last = first + len(batch.column("people").flatten())
        some = kept_A[np.searchsorted(kept_A, first) : np.searchsorted(kept_A, last)] - first
        if len(some):
            batches.append(_reduced(batch, some, split.weighted))
        first = last
    table = pa.Table.from_batches(batches, choice_schema(split.weighted))
    rows = ArrowFile(table.replace_schema_metadata(split.rows.table.schema.metadata))
    return Split("choice", rows, split.questions, split.groups)


def _reduced(batch: pa.RecordBatch, kept_A: np.ndarray, weighted: bool) -> pa.RecordBatch:
    counts = batch.column("answers" if weighted else "counts")
    lengths_M = np.diff(counts.offsets.to_numpy())
    row_F = np.repeat(np.arange(len(batch)), lengths_M)
    option_F = np.arange(len(row_F)) - np.repeat(np.cumsum(lengths_M) - lengths_M, lengths_M)
    # An answer belongs to a cell: a row and an option. The answers of a row stand in the order of its options.
    cell_A = np.repeat(np.arange(len(row_F)), counts.flatten().to_numpy())[kept_A]
    cells, count_C = np.unique(cell_A, return_counts=True)
    rows, row_C = np.unique(row_F[cells], return_inverse=True)
    return choice_batch(
        Histograms(
            batch.column("profile").to_numpy()[rows],
            batch.column("question").to_numpy()[rows],
            lengths_M[rows],
            row_C,
            option_F[cells],
            count_C.astype(np.int32),
            batch.column("people").flatten().to_numpy()[kept_A],
            batch.column("weights").flatten().to_numpy()[kept_A] if weighted else None,
        )
    )
