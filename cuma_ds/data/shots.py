"""Answers that other people of a person's group gave, to stand before a question (method few_shot)."""

from __future__ import annotations

import hashlib
import warnings
from typing import NamedTuple

import numpy as np

from cuma_ds.data.prepared import PreparedData
from cuma_ds.errors import ConfigError


class Shot(NamedTuple):
    """A question that somebody was asked, its options in order, and the option that was chosen."""

    question: str
    options: tuple[str, ...]
    chosen: int


class Shots:
    """Draws examples for a person and a question: training answers of the person's group, each at most once.

    Every answer of the group is as likely as any other, to whatever question. The draw depends on the seed, the profile
    and the question alone. A group without training answers, e.g. a country that was held out, has no examples.

    Args:
        data: answers to choice questions.
        count: examples of each question; fewer where the group gave fewer answers.
        seed: of the draw.

    Raises:
        ConfigError: the data is of another kind.
    """

    def __init__(self, data: PreparedData, count: int, seed: int) -> None:
        if data.kind != "choice":
            raise ConfigError(f"adapters.method few_shot asks choice questions, but the data is of kind {data.kind}")
        self._train, self._count, self._seed = data.splits["train"], count, seed
        self._group_of = dict(zip(data.sentences, self._train.groups, strict=True))
        groups_M = np.array(self._train.groups, dtype=object)[self._train.numbers("profile")]
        answers_M = self._train.answers()
        # Of each group, its rows and how many answers there are up to the end of each.
        self._rows: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for group in set(groups_M.tolist()):
            rows = np.flatnonzero(groups_M == group)
            self._rows[group] = rows, answers_M[rows].cumsum()

    def __call__(self, sentence: str, question: str) -> list[Shot]:
        """The examples that stand before a question.

        Args:
            sentence: the person's profile.
            question: as asked.
        """
        rows, ends = self._rows.get(self._group_of.get(sentence, ""), (np.zeros(0, int), np.zeros(0, int)))
        if not len(rows):
            return []
        digest = hashlib.sha256(f"{self._seed}\0{sentence}\0{question}".encode()).digest()
        draw = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        answers = draw.choice(int(ends[-1]), size=min(self._count, int(ends[-1])), replace=False)
        return [self._shot(rows, ends, int(answer)) for answer in answers]

    def _shot(self, rows: np.ndarray, ends: np.ndarray, answer: int) -> Shot:
        """The answer with a number among those of a group."""
        place = int(np.searchsorted(ends, answer, side="right"))
        row = self._train[rows[place]]
        counts = row["answers"] if self._train.weighted else row["counts"]
        first = answer - (int(ends[place - 1]) if place else 0)
        chosen = int(np.searchsorted(np.cumsum(counts), first, side="right"))
        return Shot(row["question"], tuple(row["options"]), chosen)

    def warn(self, data: PreparedData) -> None:
        """Say how many profiles of the splits to evaluate on have no examples."""
        for name in data.evaluation_splits:
            profiles = np.unique(data.splits[name].numbers("profile"))
            without = sum(self._group_of[data.sentences[profile]] not in self._rows for profile in profiles)
            if without:
                warnings.warn(
                    f"method few_shot: {without} of {len(profiles)} profiles of split {name} are of groups without "
                    "training answers; they are asked without examples",
                    stacklevel=3,
                )
