"""The prediction of each contender for each example, kept beside a report: two runs can be compared example by example.

``predictions.npz`` is read by :func:`read_predictions`, or by ``numpy.load``. Its arrays are named ``<split>/<what>``,
with M examples and N options of the question that has most; beyond an example's own options stands nan. For choice
questions::

    ids           [M] text      see :func:`example_ids`
    questions     [M] text      id of the question
    groups        [M] int64     number of the group; examples of one group have the same one
    nominal       [M] bool      whether the question's options have no order
    counts        [M, N] float64    answers of each option, or sums of their survey weights
    people        [A] int64     who answered, example after example; not there where the data does not say
    people_each   [M] int64     how many of ``people`` belong to each example
    answers       [M, N] int64      with survey weights, answers of each option; beyond an example's own options -1
    weights       [A] float64       with survey weights, that of each of ``people``
    predicted/<contender>       [M, N] float32    probability of each option

For preferences ``questions`` are a hash of the conversation, ``counts`` [M, 2] are the tokens of the chosen and the
rejected answer, and what a contender predicted [M, 2] are their log-probabilities in nats, float64.

For conversations ``questions`` are empty, ``counts`` [M, 1] are the assistant's tokens, and what a contender predicted
[M, 1] is its mean loss, nats per token.

In every run on the same data an example has the same id: examples with one id have the same question and were answered
by the same people. Groups are numbered within a split. Neither profiles nor names of groups are in the file.
"""

from __future__ import annotations

import dataclasses
import io
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cuma_ds.errors import DataError
from cuma_ds.evaluation.chat import ChatLosses
from cuma_ds.evaluation.columns import Labels, Ragged
from cuma_ds.evaluation.examples import ChoiceExamples
from cuma_ds.evaluation.preference import PairLogps
from cuma_ds.files import first_line, write_atomically
from cuma_ds.identity import content_sha256

Array = NDArray[np.floating]
_Number = TypeVar("_Number", bound=np.generic)
PREDICTIONS_FILE = "predictions.npz"


@dataclass(frozen=True)
class Predictions:
    """One split, see above.

    Attributes:
        ids, questions, groups, nominal: of each example.
        counts_MN: answers of each option.
        predicted: [M, N] by contender.
        people: who answered each example; None where the data does not say.
        answers_MN, weights: None without survey weights.
    """

    ids: list[str]
    questions: list[str]
    groups: list[int]
    nominal: list[bool]
    counts_MN: NDArray[np.float64]
    predicted: dict[str, Array]
    people: list[NDArray[np.int64]] | None = None
    answers_MN: NDArray[np.int64] | None = None
    weights: list[NDArray[np.float64]] | None = None

    def examples(self) -> ChoiceExamples:
        """The examples, with numbers for the names of groups and without texts; each is a profile of its own."""
        return ChoiceExamples(
            questions=Labels.of(self.questions),
            groups=Labels.of([str(group) for group in self.groups]),
            profiles=np.arange(len(self.ids)),
            counts=self._own_options(self.counts_MN),
            texts={},
            people=None if self.people is None else Ragged.of(self.people, np.int64),
            nominal=frozenset(question for question, one in zip(self.questions, self.nominal, strict=True) if one),
            answers=None if self.answers_MN is None else self._own_options(self.answers_MN),
            weights=None if self.weights is None else Ragged.of(self.weights),
        )

    def only(self, chosen: Sequence[int]) -> Predictions:
        """The chosen examples, in their order."""
        rows = np.array(chosen, dtype=np.int64)
        return Predictions(
            ids=[self.ids[row] for row in chosen],
            questions=[self.questions[row] for row in chosen],
            groups=[self.groups[row] for row in chosen],
            nominal=[self.nominal[row] for row in chosen],
            counts_MN=self.counts_MN[rows],
            predicted={name: values[rows] for name, values in self.predicted.items()},
            people=None if self.people is None else [self.people[row] for row in chosen],
            answers_MN=None if self.answers_MN is None else self.answers_MN[rows],
            weights=None if self.weights is None else [self.weights[row] for row in chosen],
        )

    def of(self, contender: str) -> Ragged:
        """What a contender predicted of each example, M arrays [n] without the options that an example has not."""
        return self._own_options(self.predicted[contender].astype(np.float64))

    def _own_options(self, values_MN: NDArray[np.number]) -> Ragged:
        own_MN = np.isfinite(self.counts_MN)
        return Ragged(values_MN[own_MN], own_MN.sum(axis=1))


def collect(examples: ChoiceExamples, predicted: Mapping[str, Sequence[ArrayLike]]) -> Predictions:
    """The predictions of one split.

    Args:
        examples: the split.
        predicted: what each contender predicted of each example, M arrays [n].
    """
    width = int(examples.counts.lengths_M.max(initial=1))
    rows: dict[str, Array] = {
        name: Ragged.of(row).padded(width, np.nan).astype(np.float32) for name, row in predicted.items()
    }
    found = _of(examples, examples.counts.padded(width, np.nan), rows)
    if examples.answers is None or examples.weights is None:
        return found
    answers_MN = examples.answers.padded(width, -1).astype(np.int64)
    return dataclasses.replace(found, answers_MN=answers_MN, weights=_listed(examples.weights, np.float64))


def collect_talks(talks: ChoiceExamples, losses: Mapping[str, ChatLosses]) -> Predictions:
    """The losses of one split of conversations.

    Args:
        talks: the split, as examples of one question with one answer each.
        losses: of each contender.
    """
    some = next(iter(losses.values()))
    loss_M1: dict[str, Array] = {
        name: (row.nll / np.maximum(row.tokens, 1))[:, None].astype(np.float32) for name, row in losses.items()
    }
    return _of(talks, some.tokens[:, None], loss_M1)


def collect_pairs(pairs: ChoiceExamples, contenders: Mapping[str, PairLogps]) -> Predictions:
    """The log-probabilities of one split of preferences, of each contender."""
    some = next(iter(contenders.values()))
    logps: dict[str, Array] = {name: row.logps_M2 for name, row in contenders.items()}
    return _of(pairs, some.tokens_M2, logps)


def _of(examples: ChoiceExamples, counts_MN: NDArray[np.float64], predicted: dict[str, Array]) -> Predictions:
    return Predictions(
        ids=example_ids(examples),
        questions=list(examples.questions),
        groups=examples.groups.code_M.tolist(),
        nominal=[question in examples.nominal for question in examples.questions],
        counts_MN=counts_MN,
        predicted=predicted,
        people=None if examples.people is None else _listed(examples.people, np.int64),
    )


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
        arrays[f"{name}/groups"] = np.array(split.groups, dtype=np.int64)
        arrays[f"{name}/nominal"] = np.array(split.nominal, dtype=np.bool_)
        arrays[f"{name}/counts"] = split.counts_MN
        if split.people is not None:
            arrays[f"{name}/people"] = np.concatenate([*split.people, np.zeros(0, np.int64)])
            arrays[f"{name}/people_each"] = np.array([len(people) for people in split.people], dtype=np.int64)
        if split.answers_MN is not None and split.weights is not None:
            arrays[f"{name}/answers"] = split.answers_MN
            arrays[f"{name}/weights"] = np.concatenate([*split.weights, np.zeros(0)])
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
    def by_example(what: str) -> list[NDArray] | None:
        if f"{name}/{what}" not in arrays:
            return None
        return np.split(arrays[f"{name}/{what}"], np.cumsum(arrays[f"{name}/people_each"])[:-1])

    start = f"{name}/predicted/"
    return Predictions(
        ids=arrays[f"{name}/ids"].tolist(),
        questions=arrays[f"{name}/questions"].tolist(),
        groups=arrays[f"{name}/groups"].tolist(),
        nominal=arrays[f"{name}/nominal"].tolist(),
        counts_MN=arrays[f"{name}/counts"],
        predicted={key.removeprefix(start): values for key, values in arrays.items() if key.startswith(start)},
        people=by_example("people"),
        answers_MN=arrays.get(f"{name}/answers"),
        weights=by_example("weights"),
    )


def _listed(rows: Ragged, dtype: type[_Number]) -> list[NDArray[_Number]]:
    return [row.astype(dtype) for row in rows]
