"""A sample of a split keeps people with their answers, and counts what it leaves out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from raw_data import write_jsonl

from cuma_ds.config import DataSection
from cuma_ds.data import PreparedData, prepare
from cuma_ds.data.rows import ArrowFile, Split
from cuma_ds.data.sampling import Limits, sample

OPTIONS = ["Yes", "No", "Maybe"]


def answers(count: int = 60, weighted: bool = False) -> list[dict[str, Any]]:
    """People of three countries who answer five questions each; the last one of four options."""
    rng = np.random.default_rng(3)
    return [
        {
            "profile": {"country": ["Peru", "Laos", "Chad"][person % 3]},
            "question": f"Question {question}?",
            "options": [*OPTIONS, *(["Never"] if question == 4 else [])],
            "answer": int(rng.integers(3)),
            "person_id": f"p{person}",
            **({"weight": float(rng.lognormal())} if weighted else {}),
        }
        for person in range(count)
        for question in range(5)
    ]


def prepared(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> PreparedData:
    path = write_jsonl(folder / "rows.jsonl", rows)
    return prepare(DataSection(path=str(path), heldout_fraction=0, test_fraction=0.5, **settings))


def single(split: Split) -> list[tuple]:
    """(person, question, option, weight) of each answer."""
    found = []
    for row in split:
        times = row.get("answers", row["counts"])
        options = np.repeat(np.arange(len(times)), times)
        weights = row.get("weights") or [1.0] * len(options)
        found += [
            (person, row["question"], int(option), weight)
            for person, option, weight in zip(row["people"], options, weights, strict=True)
        ]
    return found


@pytest.mark.parametrize("weighted", [False, True])
def test_drawn_people_keep_all_of_their_answers(tmp_path, weighted) -> None:
    split = prepared(tmp_path, answers(weighted=weighted), weights=weighted).splits["test"]
    found = sample(split, Limits(people=7, seed=1))
    everything = single(split)
    people = {person for person, *_ in single(found.split)}
    assert len(people) == 7
    assert Counter(single(found.split)) == Counter(answer for answer in everything if answer[0] in people)
    assert found[1:] == (7, len({person for person, *_ in everything}), 35, len(everything))
    for row in found.split:
        assert row["counts"] == pytest.approx(
            np.bincount(
                np.repeat(np.arange(len(row["counts"])), row.get("answers", row["counts"])),
                row.get("weights"),
                len(row["counts"]),
            )
        )
    assert {len(row["counts"]) for row in found.split} == {3, 4}


def test_answers_are_drawn_from_those_of_the_drawn_people(tmp_path) -> None:
    split = prepared(tmp_path, answers()).splits["test"]
    people = {person for person, *_ in single(sample(split, Limits(people=7, seed=1)).split)}
    found = sample(split, Limits(people=7, examples=11, seed=1))
    assert found.answers == len(single(found.split)) == 11
    assert {person for person, *_ in single(found.split)} <= people
    assert not Counter(single(found.split)) - Counter(single(split))
    # Not the first ones of each person, and not whole people.
    assert len({question for _, question, *_ in single(found.split)}) > 2
    assert found.people == len({person for person, *_ in single(found.split)}) > 3


def test_a_seed_draws_the_same_people_and_fewer_of_them_are_a_part(tmp_path) -> None:
    split = prepared(tmp_path, answers()).splits["test"]
    few, more, others = (
        single(sample(split, Limits(people=people, seed=seed)).split) for people, seed in ((5, 1), (12, 1), (5, 2))
    )
    assert few == single(sample(split, Limits(people=5, seed=1)).split)
    assert {person for person, *_ in few} < {person for person, *_ in more}
    assert {person for person, *_ in few} != {person for person, *_ in others}


def test_the_sample_does_not_depend_on_how_rows_lie_in_batches(tmp_path) -> None:
    split = prepared(tmp_path, answers()).splits["test"]
    pieces = [batch.slice(start, 4) for batch in split.rows.table.to_batches() for start in range(0, len(batch), 4)]
    torn = Split("choice", ArrowFile(pa.Table.from_batches(pieces)), split.questions, split.groups)
    limits = Limits(people=9, examples=20, seed=4)
    assert sample(torn, limits).split.to_list() == sample(split, limits).split.to_list()


def test_limits_that_leave_nothing_out_give_the_split_itself(tmp_path) -> None:
    split = prepared(tmp_path, answers()).splits["test"]
    for limits in (Limits(), Limits(people=1000), Limits(examples=len(single(split)))):
        found = sample(split, limits)
        assert found.split is split
        assert (found.people, found.answers) == (found.of_people, found.of_answers)


def test_conversations_are_drawn_by_person_too(tmp_path) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [
        {"profile": f"A nurse, {person}.", "person_id": f"p{person}", "messages": talk}
        for person in range(30)
        for _ in range(3)
    ]
    split = prepared(tmp_path, rows).splits["test"]
    found = sample(split, Limits(people=4))
    assert (found.people, found.answers) == (4, 12)
    assert sorted(Counter(row["people"][0] for row in found.split).values()) == [3] * 4
    assert sample(split, Limits(people=4, examples=5)).answers == 5
