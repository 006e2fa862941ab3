"""Any source becomes prepared data in the same way."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from cuma_ds.config import DataSection
from cuma_ds.data.build import build
from cuma_ds.data.raw import ProfileList, ReadOptions, Rows, question_file
from cuma_ds.data.rows import Question
from cuma_ds.data.sources import SOURCES
from cuma_ds.data.splits import draws


def test_every_source_of_a_recipe_can_be_read() -> None:
    assert tuple(SOURCES) == get_args(DataSection.model_fields["source"].annotation)


def toy_source(options: ReadOptions, as_matrix: bool, weighted: bool) -> Rows:
    """What 60 people answered to two questions: one row for each answer, or one for each person."""
    rng = np.random.default_rng(3)
    profiles = ProfileList(options.template)
    profile_P = np.array([profiles.add({"country": f"C{person % 5}"}) for person in range(60)], np.int32)
    option_PQ = rng.integers(-1, 3, (60, 2)).astype(np.int8)
    option_PQ[:, 0] = np.maximum(option_PQ[:, 0], 0)
    weight_P = rng.uniform(0.5, 2, 60)
    questions = question_file([Question(name, f"{name}?", ("a", "b", "c")) for name in ("x", "y")], None)
    draw_P = draws(options.config.split_seed, "person", map(str, range(60)))
    if as_matrix:
        weight_N = weight_P if weighted else None
        person_P = np.arange(60, dtype=np.int32)
        return Rows(
            "choice", person_P, draw_P, profile_P, profiles, {}, questions, option_NQ=option_PQ, weight_N=weight_N
        )
    person_N, question_N = np.nonzero(option_PQ >= 0)
    answer_N, weight_N = option_PQ[person_N, question_N].astype(np.int32), weight_P[person_N] if weighted else None
    return Rows(
        "choice", person_N.astype(np.int32), draw_P, profile_P[person_N], profiles, {}, questions,
        question_N.astype(np.int32), answer_N, weight_N=weight_N,
    )  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("questions", [0.0, 0.6])
def test_answers_by_row_and_by_person_are_the_same_data(tmp_path, weighted, questions) -> None:
    config = DataSection(heldout_fraction=0.3, weights=weighted, heldout_question_fraction=questions)
    options = ReadOptions(config, "wvs")
    by_row, by_person = (build(toy_source(options, as_matrix, weighted), config) for as_matrix in (False, True))
    assert by_row.manifest == by_person.manifest
    assert ("heldout_questions" in by_row.splits) == (questions > 0)
    total = 0.0
    for name, split in by_row.splits.items():
        for one, other in zip(split, by_person.splits[name], strict=True):
            assert {key: value for key, value in one.items() if key not in ("counts", "weights")} == {
                key: value for key, value in other.items() if key not in ("counts", "weights")
            }
            assert one["counts"] == pytest.approx(other["counts"])
            total += sum(one["counts"])
    assert total == pytest.approx(sum(sizes["answers"] for sizes in by_row.manifest["splits"].values()))
