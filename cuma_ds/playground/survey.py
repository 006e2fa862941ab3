"""What the data of a model tells the page: which people there are to choose, and what such people answered.

Nothing that fewer than ``evaluation.min_answers`` people share is told.

Shapes: M rows of all splits, N profiles, Q questions, L values of a field, n options of a question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cuma_ds.config import RunConfig
from cuma_ds.data.prepared import PreparedData
from cuma_ds.data.rendering import worded
from cuma_ds.data.rows import Split
from cuma_ds.data.splits import SPLITS
from cuma_ds.distances import distance, distance_name
from cuma_ds.profiles import wording_of
from cuma_ds.profiles.linearize import value_of

Indices = NDArray[np.int64]

# A field of numbers with more values than this is asked for as a number, others as a choice.
_MOST_NUMBERS = 12
# Values that are told to be the largest.
_MOST_LARGEST = 4


class Field(NamedTuple):
    """A field that people are chosen by: one of its values, a number within its range, or (without either) any text.

    Attributes:
        name: as the data has it.
        values: in the order of numbers, then of names.
        range: lowest and highest number.
        largest: the values of most people, largest first.
    """

    name: str
    values: tuple[str, ...] = ()
    range: tuple[float, float] | None = None
    largest: tuple[str, ...] = ()


class Asked(NamedTuple):
    """A choice question of the data, in the words in which the model is asked."""

    text: str
    options: tuple[str, ...]
    nominal: bool
    number: int


class Own(NamedTuple):
    """What people answered themselves.

    Attributes:
        shares: of each option.
        answers: how many there are.
        who: what all of these people have in common; empty for everybody.
        distance: of a prediction from them.
        measure: which distance, ``EMD`` or ``TV``.
    """

    shares: list[float]
    answers: int
    who: list[str]
    distance: float
    measure: str


class Survey:
    """The data of a model.

    Args:
        data: all of its splits count.
        config: says which fields are read, how questions are worded, and how many people may be told of.

    Attributes:
        fields: that people can be chosen by; none where profiles are sentences.
        questions: of choice data, those with most answers first.
        least: people that must share what is told.
    """

    def __init__(self, data: PreparedData, config: RunConfig) -> None:
        self.least = config.evaluation.min_answers
        self._splits = [data.splits[name] for name in SPLITS if name in data.splits and len(data.splits[name])]
        self._profile_M = np.concatenate([split.numbers("profile") for split in self._splits]).astype(np.int64)
        self._choice = data.kind == "choice"
        if self._choice:
            self._question_M = np.concatenate([split.numbers("question") for split in self._splits]).astype(np.int64)
            self._answers_M = np.concatenate([split.answers() for split in self._splits])
        wording = wording_of(config.profiles)
        names = [name for name in dict.fromkeys(n for p in data.profiles for n in p["fields"]) if wording.reads(name)]
        self._values = {name: _values(name, [profile["fields"] for profile in data.profiles]) for name in names}
        found = [self._field(name, [profile["fields"].get(name) for profile in data.profiles]) for name in names]
        self.fields = [field for field in found if field is not None]
        self.questions = self._questions(data.splits["train"], config) if self._choice else []

    @property
    def map_field(self) -> Field | None:
        """The field whose values are shown on the map: the country, else the one with most values; None without any."""
        wide = [field for field in self.fields if len(field.values) >= 3]
        named = [field for field in wide if value_of({field.name: "x"}, "country")]
        return next(iter(named or sorted(wide, key=lambda field: -len(field.values))), None)

    def own(self, text: str, options: Sequence[str], who: Mapping[str, str], predicted: Sequence[float]) -> Own | None:
        """What the people themselves answered: those of the profile, else those of its country.

        Args:
            text, options: of the question.
            who: fields of the profile; without any, everybody is meant.
            predicted: share of each option, which they are compared with.

        Returns:
            None where the data has no such question, or fewer answers of such people than may be told.
        """
        asked = next((one for one in self.questions if (one.text, one.options) == (text, tuple(options))), None)
        if asked is None or not set(who) <= self._values.keys():
            return None
        of_country = {name: value for name, value in who.items() if value_of({name: value}, "country")}
        for shared in [who, of_country] if of_country else [who]:
            rows = np.flatnonzero((self._question_M == asked.number) & self._of(shared)[self._profile_M])
            answers = int(self._answers_M[rows].sum())
            if answers >= self.least:
                shares_n = self._counts(rows)
                shares_n = shares_n / shares_n.sum()
                apart = float(distance(np.asarray(predicted), shares_n, asked.nominal))
                measure = distance_name([asked.nominal])
                return Own(shares_n.tolist(), answers, [str(value) for value in shared.values()], apart, measure)
        return None

    def _of(self, who: Mapping[str, str]) -> NDArray[np.bool_]:
        """[N] which profiles have these fields."""
        fits_N = np.ones(int(self._profile_M.max(initial=-1)) + 1, bool)
        for name, value in who.items():
            fits_N &= np.array(self._values[name][: len(fits_N)]) == value
        return fits_N

    def _counts(self, rows: Indices) -> NDArray[np.float64]:
        """Answers of each option, or sums of their survey weights, of some rows of one question."""
        total, first = np.zeros(1), 0
        for split in self._splits:
            own = rows[(rows >= first) & (rows < first + len(split))] - first
            if len(own):
                total = total + np.array(split.select(own)["counts"], dtype=np.float64).sum(axis=0)
            first += len(split)
        return total

    def _field(self, name: str, given: Sequence[object]) -> Field | None:
        """A field with those of its values that may be told; None where there are none."""
        texts_N = self._values[name]
        texts = sorted(set(texts_N) - {""}, key=_natural)
        place = {text: index for index, text in enumerate(texts)}
        people_L = self._people(np.array([place.get(text, -1) for text in texts_N], dtype=np.int64), len(texts))
        numbers = {text: value for text, value in zip(texts_N, given, strict=True) if text}
        if len(texts) > _MOST_NUMBERS and all(_is_number(value) for value in numbers.values()):
            sizes = np.array([float(text) for text in texts])
            low = np.flatnonzero(np.cumsum(people_L) >= self.least)
            high = np.flatnonzero(np.cumsum(people_L[::-1])[::-1] >= self.least)
            if not len(low) or not len(high) or sizes[low[0]] > sizes[high[-1]]:
                return None
            return Field(name, range=(float(sizes[low[0]]), float(sizes[high[-1]])))
        told = [index for index, people in enumerate(people_L) if people >= self.least]
        values = tuple(texts[index] for index in told)
        largest = tuple(texts[index] for index in sorted(told, key=lambda index: -people_L[index])[:_MOST_LARGEST])
        return Field(name, values, largest=largest) if values else None

    def _people(self, value_N: Indices, values: int) -> Indices:
        """[L] how many people each value has at least; -1 stands for none."""
        value_M = value_N[self._profile_M]
        known = value_M >= 0
        if self._choice:  # nobody answers a question twice
            key_M = self._question_M[known] * values + value_M[known]
            questions = int(self._question_M.max(initial=-1)) + 1
            answers = np.bincount(key_M, self._answers_M[known], questions * values).reshape(questions, values)
            return answers.max(axis=0, initial=0).astype(np.int64)
        person_M = np.concatenate([np.array([people[0] for people in split["people"]]) for split in self._splits])
        pairs = np.unique(np.stack([value_M[known], person_M[known]]), axis=1)
        return np.bincount(pairs[0], minlength=values).astype(np.int64)

    def _questions(self, split: Split, config: RunConfig) -> list[Asked]:
        answers_Q = np.bincount(self._question_M, self._answers_M)
        found = []
        for number in np.argsort(-answers_Q, kind="stable").tolist():
            if answers_Q[number] >= self.least:
                one = split.question(number)
                text = worded(one.text, one.label, config.data.prompt_style)
                found.append(Asked(text, one.options, one.scale == "nominal", number))
        return found


def _values(name: str, profiles: Sequence[Mapping[str, object]]) -> list[str]:
    """What each profile says in a field, as a sentence would have it; empty for nothing."""
    return [value_of({name: fields[name]}, name) if name in fields else "" for fields in profiles]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _natural(text: str) -> tuple[float, str]:
    """Numbers, and texts that begin with one, in its order; then the others by name."""
    head = text.split()[0].rstrip("+,-")
    try:
        return float(head), text
    except ValueError:
        return float("inf"), text
