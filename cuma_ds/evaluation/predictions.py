"""The prediction of each contender for each example, kept beside a report: two runs can be compared example by example.

``predictions.npz`` is read by :func:`read_predictions`, or by ``numpy.load``. Its arrays are named ``<split>/<what>``,
with M examples and N options of the question that has most; beyond an example's own options stands nan. For choice
questions::

    ids           [M] text      see :func:`example_ids`
    questions     [M] text      id of the question
    counts        [M, N] float64    answers of each option, or sums of their survey weights
    people        [A] int64     who answered, example after example; not there where the data does not say
    people_each   [M] int64     how many of ``people`` belong to each example
    predicted/<contender>       [M, N] float32    probability of each option

For preferences ``questions`` are a hash of the conversation, ``counts`` [M, 2] are the tokens of the chosen and the
rejected answer, and what a contender predicted [M, 2] are their log-probabilities in nats, float64.

For conversations ``questions`` are empty, ``counts`` [M, 1] are the assistant's tokens, and what a contender predicted
[M, 1] is its mean loss, nats per token.

In every run on the same data an example has the same id: examples with one id have the same question and were answered
by the same people. Neither profiles nor names of groups are in the file.
"""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cuma_ds.errors import DataError
from cuma_ds.evaluation.chat import ChatLosses
from cuma_ds.evaluation.columns import Ragged
from cuma_ds.evaluation.examples import ChoiceExamples
from cuma_ds.evaluation.preference import PairLogps
from cuma_ds.files import first_line, write_atomically
from cuma_ds.identity import content_sha256

Array = NDArray[np.floating]
PREDICTIONS_FILE = "predictions.npz"


@dataclass(frozen=True)
class Predictions:
    """One split, see above. ``people`` are of each example; None where the data does not say who answered."""

    ids: list[str]
    questions: list[str]
    counts_MN: NDArray[np.float64]
    people: list[NDArray[np.int64]] | None
    predicted: dict[str, Array]


def collect(examples: ChoiceExamples, predicted: Mapping[str, Sequence[Array]]) -> Predictions:
    """The predictions of one split.

    Args:
        examples: the split.
        predicted: what each contender predicted of each example, M arrays [n].
    """
    width = int(examples.counts.lengths_M.max(initial=1))
    rows = {name: Ragged.of(row).padded(width, np.nan).astype(np.float32) for name, row in predicted.items()}
    counts_MN = examples.counts.padded(width, np.nan)
    return Predictions(example_ids(examples), list(examples.questions), counts_MN, _people(examples), rows)


def collect_talks(talks: ChoiceExamples, losses: Mapping[str, ChatLosses]) -> Predictions:
    """The losses of one split of conversations.

    Args:
        talks: the split, as examples of one question with one answer each.
        losses: of each contender.
    """
    some = next(iter(losses.values()))
    loss_M1 = {name: (row.nll / np.maximum(row.tokens, 1))[:, None].astype(np.float32) for name, row in losses.items()}
    return Predictions(example_ids(talks), list(talks.questions), some.tokens[:, None], _people(talks), loss_M1)


def collect_pairs(pairs: ChoiceExamples, contenders: Mapping[str, PairLogps]) -> Predictions:
    """The log-probabilities of one split of preferences, of each contender."""
    some = next(iter(contenders.values()))
    logps: dict[str, Array] = {name: row.logps_M2 for name, row in contenders.items()}
    return Predictions(example_ids(pairs), list(pairs.questions), some.tokens_M2, _people(pairs), logps)


def example_ids(examples: ChoiceExamples) -> list[str]:
    """A name for each example: a hash of its question and of its people (of its profile where they are unknown).

    The second and later conversations of one person have a number behind it.
    """
    seen: Counter[str] = Counter()
    ids = []
    for index, (question, profile) in enumerate(zip(examples.questions, examples.profiles, strict=True)):
        people = None if examples.people is None else sorted(examples.people[index].tolist())
        key = content_sha256([question, people or f"profile {profile}"])[:16]
        seen[key] += 1
        ids.append(key if seen[key] == 1 else f"{key}-{seen[key]}")
    return ids


def write_predictions(folder: Path, splits: Mapping[str, Predictions]) -> Path:
    """Write ``folder/predictions.npz``, complete or not at all."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for name, split in splits.items():
        arrays[f"{name}/ids"] = np.array(split.ids, dtype=np.str_)
        arrays[f"{name}/questions"] = np.array(split.questions, dtype=np.str_)
        arrays[f"{name}/counts"] = split.counts_MN
        if split.people is not None:
            arrays[f"{name}/people"] = np.concatenate([*split.people, np.zeros(0, np.int64)])
            arrays[f"{name}/people_each"] = np.array([len(people) for people in split.people], dtype=np.int64)
        arrays |= {f"{name}/predicted/{contender}": values for contender, values in split.predicted.items()}
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    file = folder / PREDICTIONS_FILE
    write_atomically(file, content.getvalue())
    return file


def read_predictions(folder: Path) -> dict[str, Predictions]:
    """The predictions in a folder, by split.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        with np.load(folder / PREDICTIONS_FILE, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        names = dict.fromkeys(name.partition("/")[0] for name in arrays)
        return {name: _split(arrays, name) for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{folder / PREDICTIONS_FILE} cannot be read ({first_line(error)}); "
            "evaluate again with launchers/evaluate.py"
        ) from None


def _split(arrays: Mapping[str, NDArray], name: str) -> Predictions:
    people = None
    if f"{name}/people" in arrays:
        people = np.split(arrays[f"{name}/people"], np.cumsum(arrays[f"{name}/people_each"])[:-1])
    start = f"{name}/predicted/"
    return Predictions(
        arrays[f"{name}/ids"].tolist(),
        arrays[f"{name}/questions"].tolist(),
        arrays[f"{name}/counts"],
        people,
        {key.removeprefix(start): values for key, values in arrays.items() if key.startswith(start)},
    )


def _people(examples: ChoiceExamples) -> list[NDArray[np.int64]] | None:
    return None if examples.people is None else [people.astype(np.int64) for people in examples.people]
