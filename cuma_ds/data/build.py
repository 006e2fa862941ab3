"""From what a source read to prepared data: split by person, equal questions of one profile merged into answer counts.

Shapes: N rows that were read, Q questions, A answers, M rows of a split.
"""

from __future__ import annotations

import dataclasses
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

import cuma_ds
from cuma_ds.config import DataSection
from cuma_ds.data.pairs import ASKED_BY, answer_pairs
from cuma_ds.data.prepared import FORMAT_VERSION, PreparedData
from cuma_ds.data.raw import Rows
from cuma_ds.data.rows import (
    BATCH_ROWS,
    DISTRIBUTIONS,
    SCHEMAS,
    ArrowFile,
    Histograms,
    Split,
    choice_batch,
    choice_schema,
    people_lists,
)
from cuma_ds.data.splits import (
    HELDOUT,
    HELDOUT_QUESTIONS,
    PROBE,
    SPLITS,
    TEST,
    TRAIN,
    Share,
    assign_splits,
    chosen,
    draws,
)
from cuma_ds.errors import DataError

_ALWAYS = ("train", "test", "heldout")
# What the source synthetic is made by.
MADE_BY = ("modes", "separation")


class _Answers(NamedTuple):
    """[A] int each, and [A] survey weights or None."""

    person_A: np.ndarray
    profile_A: np.ndarray
    question_A: np.ndarray
    answer_A: np.ndarray
    weight_A: np.ndarray | None


def build(rows: Rows, config: DataSection, spool: Path | None = None) -> PreparedData:
    """Split by person, and merge equal questions of one profile into answer counts.

    Args:
        rows: of a source.
        config: split settings.
        spool: folder for the splits' files; in memory without one.

    Raises:
        DataError: no rows, or none left for training; weights or held-out questions where there are no choice
            questions; pairs that are to be drawn from distributions.
    """
    drawn = rows.kind == "choice" and config.kind == "preference"
    kind = "preference" if drawn else rows.kind
    if config.kind not in (None, kind):
        raise DataError(
            f"data.kind is {config.kind}, but the rows are of kind {kind}; leave it out, or give other rows"
        )
    if config.weights and kind != "choice":
        raise DataError(f"data.weights is true, but only choice questions have weights, not kind {kind}; leave it out")
    if drawn and rows.distributions:
        raise DataError("data.kind is preference, but pairs are drawn from people's answers, not from distributions")
    if rows.weight_N is not None and not rows.distributions:
        rows = dataclasses.replace(rows, weight_N=_with_mean_one(rows.weight_N, _answers_each(rows)))
    schema = SCHEMAS[kind]
    if kind == "choice":
        schema = DISTRIBUTIONS if rows.distributions else choice_schema(rows.weight_N is not None)
    splits, sizes = {}, {}
    for name, part, chosen_N in _parts(rows, config):
        if name not in _ALWAYS and not chosen_N.any():
            continue
        file = None if spool is None else spool / f"{name}.arrow"
        if drawn:
            batches = answer_pairs(part, chosen_N, config)
        else:
            batches = _histograms(part, chosen_N) if kind == "choice" else _texts(part, chosen_N)
        splits[name] = Split(kind, ArrowFile.collect(schema, batches, file), rows.questions, rows.profiles.groups)
        sizes[name] = _sizes(part, chosen_N)
    return _prepared(rows, splits, sizes, config)


def _parts(rows: Rows, config: DataSection) -> Iterator[tuple[str, Rows, np.ndarray]]:
    """Each split's name, the rows with the answers that it may hold, and which of the rows it holds [N].

    Raises:
        DataError: nothing is left for training.
    """
    split_N = _split(rows, config)
    heldout_Q = _heldout_questions(rows, config)
    asked = rows if heldout_Q is None else _only(rows, ~heldout_Q)
    for number, name in enumerate(SPLITS):
        part, chosen_N = asked, split_N == number
        if number == HELDOUT_QUESTIONS and heldout_Q is not None:
            part, chosen_N = _only(rows, heldout_Q), np.ones(len(split_N), bool)
        if heldout_Q is not None:
            chosen_N = chosen_N & _has_answers(part, heldout_Q == (number == HELDOUT_QUESTIONS))
        if number == TRAIN and not chosen_N.any():
            raise _nothing_left(rows, config)
        yield name, part, chosen_N
    if rows.probe_NQ is not None and rows.option_NQ is not None:
        probed = np.where(rows.probe_NQ, rows.option_NQ, np.int8(-1))
        yield PROBE, dataclasses.replace(rows, option_NQ=probed), np.asarray(rows.probe_NQ.any(axis=1))


def _heldout_questions(rows: Rows, config: DataSection) -> np.ndarray | None:
    """[Q] whether each question is held out; None where none is to be.

    Raises:
        DataError: rows without questions.
    """
    fraction, seed = config.heldout_question_fraction, config.split_seed
    if not fraction:
        return None
    if rows.kind != "choice":
        raise DataError(f"data.heldout_question_fraction is {fraction}, but rows of kind {rows.kind} have no questions")
    names = rows.questions.table["question_id"].to_pylist()
    present = rows.question_N if rows.option_NQ is None else np.flatnonzero((rows.option_NQ >= 0).any(axis=0))
    held = chosen(Share(present, draws(seed, "question", names), fraction), present)
    if not len(held):
        warnings.warn(
            f"none of the {len(np.unique(present))} questions is held out with heldout_question_fraction {fraction} "
            f"and split_seed {seed}; another seed or a larger fraction holds out some",
            stacklevel=4,
        )
    return np.isin(np.arange(len(names)), held)


def _only(rows: Rows, kept_Q: np.ndarray) -> Rows:
    """The rows with answers to the kept questions alone; rows of other questions are to be left out by the caller."""
    if rows.option_NQ is None:
        return rows
    return dataclasses.replace(rows, option_NQ=np.where(kept_Q, rows.option_NQ, np.int8(-1)))


def _has_answers(rows: Rows, kept_Q: np.ndarray) -> np.ndarray:
    """[N] whether a row has an answer to a kept question."""
    return kept_Q[rows.question_N] if rows.option_NQ is None else np.any(rows.option_NQ >= 0, axis=1)


def _answers_each(rows: Rows) -> np.ndarray:
    """[N] answers of each row."""
    if rows.option_NQ is None:
        return np.ones(len(rows.person_N), np.int64)
    return (rows.option_NQ >= 0).sum(axis=1)


def _sizes(rows: Rows, chosen_N: np.ndarray) -> dict[str, int]:
    """Answers, people and profiles of a split. Of distributions: the people asked, and no person in particular."""
    answers_N, people = _answers_each(rows), len(np.unique(rows.person_N[chosen_N]))
    if rows.distributions and rows.weight_N is not None:
        answers_N, people = rows.weight_N, 0
    return {
        "answers": round(float(answers_N[chosen_N].sum())),
        "people": people,
        "profiles": len(np.unique(rows.profile_N[chosen_N])),
    }


def _histograms(rows: Rows, chosen_N: np.ndarray) -> Iterator[pa.RecordBatch]:
    """Answers of the chosen rows merged into one row per (question, profile), in that order."""
    options_Q = np.array([len(options) for options in rows.questions.table["options"]], np.int64)
    person_N, profile_N = rows.person_N[chosen_N], rows.profile_N[chosen_N]
    weight_N = None if rows.weight_N is None else rows.weight_N[chosen_N]
    if rows.option_NQ is None:
        answers = _Answers(person_N, profile_N, rows.question_N[chosen_N], rows.answer_N[chosen_N], weight_N)
        yield from _merged(answers, options_Q)
        return
    for question, option_N in enumerate(rows.option_NQ[chosen_N].T):
        kept = option_N >= 0
        asked, weight_A = np.full(int(kept.sum()), question), None if weight_N is None else weight_N[kept]
        yield from _merged(_Answers(person_N[kept], profile_N[kept], asked, option_N[kept], weight_A), options_Q)


def _with_mean_one(weight_N: np.ndarray, answers_N: np.ndarray) -> np.ndarray:
    """[N] weights whose mean over all answers is 1, so that a sum of weights is comparable with a number of answers.

    Args:
        weight_N: positive.
        answers_N: answers that have each weight.

    Raises:
        DataError: weights so far apart that the smallest would count nothing.
    """
    relative_N = weight_N / weight_N.max()  # equal weights are exactly 1 from here on
    if not relative_N.min():
        reach = f"{weight_N.min():g} to {weight_N.max():g}"
        raise DataError(f"survey weights reach from {reach}, too far to be added up; correct them")
    return relative_N / np.average(relative_N, weights=answers_N)


def _merged(answers: _Answers, options_Q: np.ndarray) -> Iterator[pa.RecordBatch]:
    """Answers merged into one row per (question, profile) with counts per option, in that order.

    Args:
        answers: any.
        options_Q: [Q] number of options of each question.
    """
    if not len(answers.profile_A):
        return
    width, profiles = int(options_Q.max()), int(answers.profile_A.max()) + 1
    key_A = (answers.question_A.astype(np.int64) * profiles + answers.profile_A) * width + answers.answer_A
    order_A = np.lexsort((answers.person_A, key_A))
    cells, first_C, count_C = np.unique(key_A[order_A], return_index=True, return_counts=True)
    # A row may not be torn apart: cells of one row are neighbours.
    row_C = cells // width
    starts = np.flatnonzero(np.concatenate([[True], row_C[1:] != row_C[:-1]]))
    for first in range(0, len(starts), BATCH_ROWS):
        begin = starts[first]
        end = starts[first + BATCH_ROWS] if first + BATCH_ROWS < len(starts) else len(cells)
        keys, index_C = np.unique(row_C[begin:end], return_inverse=True)
        question_M, counts_C = keys // profiles, count_C[begin:end]
        people = order_A[first_C[begin] : first_C[begin] + counts_C.sum()]
        weight_A = None if answers.weight_A is None else answers.weight_A[people]
        yield choice_batch(
            Histograms(
                keys % profiles, question_M, options_Q[question_M], index_C, cells[begin:end] % width, counts_C,
                answers.person_A[people], weight_A,
            )
        )  # fmt: skip


def _texts(rows: Rows, chosen_N: np.ndarray) -> Iterator[pa.RecordBatch]:
    """The chosen conversations or preferences, in their order."""
    assert rows.payload is not None
    start = 0
    for batch in rows.payload.table.to_batches(4096):
        places = np.flatnonzero(chosen_N[start : start + len(batch)])
        if len(places):
            profile_M = pa.array(rows.profile_N[start + places].astype(np.int32))
            people_M = people_lists(rows.person_N[start + places], np.ones(len(places), np.int32))
            part = batch.take(pa.array(places))
            yield pa.RecordBatch.from_arrays([profile_M, people_M, *part.columns], schema=SCHEMAS[rows.kind])
        start += len(batch)


def _split(rows: Rows, config: DataSection) -> np.ndarray:
    """[N] int8 index into ``SPLITS``, by the recipe's fractions and seed.

    Raises:
        DataError: nothing is left for training.
    """
    seed, sentences = config.split_seed, [profile["sentence"] for profile in rows.profiles.profiles]
    countries = sorted(set(rows.profiles.groups) - {""})
    code = {country: index for index, country in enumerate(countries)}
    unit_G = (
        np.array([code.get(group, -1) for group in rows.profiles.groups], np.int32)
        if countries
        else np.arange(len(sentences))
    )
    units = Share(unit_G[rows.profile_N], draws(seed, "unit", countries or sentences), config.heldout)
    profiles = Share(rows.profile_N, draws(seed, "profile", sentences), config.heldout_profile_fraction)
    people = Share(rows.person_N, rows.draw_P, config.test_fraction)
    if config.valid_fraction and rows.given_N is not None:
        raise DataError(
            f"data.valid_fraction is {config.valid_fraction}, but this source names the people of its split valid "
            "itself; leave it out"
        )
    split_N = assign_splits(people, units, profiles, rows.given_N, config.valid_fraction)
    if rows.probe_NQ is not None:
        split_N[(split_N == TRAIN) & rows.probe_NQ.any(axis=1)] = TEST
    expected = round(config.heldout * len(units.draw))
    if expected and not (split_N == HELDOUT).any():
        what = "countries" if countries else "profiles"
        warnings.warn(
            f"none of the {len(units.draw)} {what} is held out with heldout_fraction {config.heldout} and split_seed "
            f"{seed}; "
            "another seed or a larger fraction holds out some",
            stacklevel=2,
        )
    if not (split_N == TRAIN).any():
        raise _nothing_left(rows, config)
    return split_N


def _nothing_left(rows: Rows, config: DataSection) -> DataError:
    return DataError(
        f"nothing is left for training: {len(rows.person_N)} rows of {len(np.unique(rows.person_N))} people with "
        f"test_fraction {config.test_fraction}, valid_fraction {config.valid_fraction} and heldout_fraction "
        f"{config.heldout}; give more people or hold out less"
    )


def _prepared(
    rows: Rows, splits: dict[str, Split], sizes: dict[str, dict[str, int]], config: DataSection
) -> PreparedData:
    """Splits with their manifest.

    Args:
        rows: all that was read.
        splits: rows by split.
        sizes: answers, people and profiles by split.
    """
    profiles = rows.profiles
    kind = splits["train"].kind
    drawn = {key: getattr(config, key) for key in ASKED_BY} if kind != rows.kind else {}
    heldout = np.unique(splits["heldout"].numbers("profile"))
    manifest = {
        "format_version": FORMAT_VERSION,
        "source": config.source,
        "kind": kind,
        # Of pairs drawn from answers: their prompts are written when they are prepared.
        **drawn,
        **({"min_margin": config.min_margin} if kind == "preference" else {}),
        **({key: getattr(config, key) for key in MADE_BY} if config.source == "synthetic" else {}),
        "template": profiles.template,
        # Release 0.1.0 had no such key: it drew among the people present, so that two kinds of one source did not
        # agree.
        "split": {"by": "hash", "people": "drawn" if rows.given_N is None else "given by the source"},
        "test_fraction": config.test_fraction,
        "heldout_fraction": config.heldout,
        "heldout_profile_fraction": config.heldout_profile_fraction,
        **({"heldout_question_fraction": config.heldout_question_fraction} if config.heldout_question_fraction else {}),
        "seed": config.split_seed,
        "questions": None if config.questions is None else list(config.questions),
        # Without these two a folder is as release 0.1.0 wrote it.
        **({"valid_fraction": config.valid_fraction} if config.valid_fraction else {}),
        **({"weights": True} if config.weights else {}),
        "versions": {"cuma_ds": cuma_ds.__version__, "python": platform.python_version(), "pyarrow": pa.__version__},
        "inputs": rows.inputs,
        "skipped": dict(rows.skipped),
        "hashes": {},
        "splits": {name: {"examples": len(splits[name]), **sizes[name]} for name in splits},
        "heldout_groups": sorted({profiles.groups[profile] for profile in heldout} - {""}),
    }
    return PreparedData(manifest, splits, profiles.profiles)
