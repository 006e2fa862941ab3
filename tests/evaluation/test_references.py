"""References read from a prepared split in pieces, and the flat columns they are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from raw_data import write_jsonl

from cuma_ds.config import DataSection
from cuma_ds.data import PreparedData, prepare
from cuma_ds.errors import DataError
from cuma_ds.evaluation.columns import Labels, Ragged
from cuma_ds.evaluation.examples import ChoiceExamples
from cuma_ds.evaluation.references import TrainingAnswers, references


def answers(country: bool, weighted: bool) -> list[dict]:
    rng = np.random.default_rng(2)
    rows = []
    for person in range(400):
        profile = {"age": 20 + person % 7, **({"country": ["Peru", "Laos", "Chad"][person % 3]} if country else {})}
        for number, size in enumerate((2, 4, 3)):
            row = {"question": f"Question {number}?", "options": list("abcd")[:size], "answer": int(rng.integers(size))}
            weight = {"weight": float(rng.uniform(0.5, 2))} if weighted else {}
            rows.append({"profile": profile, "person_id": f"p{person}", **row, **weight})
    return rows


def prepared(folder: Path, country: bool = True, weighted: bool = False, **settings) -> PreparedData:
    path = write_jsonl(folder / "rows.jsonl", answers(country, weighted))
    return prepare(DataSection(path=str(path), heldout_fraction=0, weights=weighted, **settings))


@pytest.mark.parametrize("country", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("single", [True, False])
def test_a_split_read_in_pieces_gives_what_its_rows_give(tmp_path, country, weighted, single, monkeypatch) -> None:
    """Rows are taken as one list of Python objects, and in pieces of five rows; a profile's answers lie in several."""
    monkeypatch.setattr("cuma_ds.data.rows.BATCH_ROWS", 5)
    monkeypatch.setattr("cuma_ds.evaluation.references._ROWS", 7)
    data = prepared(tmp_path, country, weighted)
    data = data.with_single_answers() if single else data
    train, test = data.splits["train"], ChoiceExamples.of(data.splits["test"])
    embeddings = np.random.default_rng(0).normal(size=(len(data.profiles), 8)).astype(np.float32)
    names = ("question_id", "question", "options", "group", "profile", "counts")
    columns = ChoiceExamples.of({name: train[name] for name in names})
    for least in (1, 12, 60, 10_000):
        pieces, rows = TrainingAnswers.of(train, least), TrainingAnswers.of(columns, least)
        assert pieces.has_oracle(test) == rows.has_oracle(test) == (least < 10_000 and (country or least < 60))
        for name in ("collapse", "oracle", "nearest"):
            more = (embeddings,) if name == "nearest" else ()
            both = (getattr(some, name)(test, *more) for some in (pieces, rows))
            for a, b in zip(*both, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12)


def test_references_are_those_that_the_data_allows(tmp_path) -> None:
    data = prepared(tmp_path)
    test, train = ChoiceExamples.of(data.splits["test"]), TrainingAnswers.of(data.splits["train"], 5)
    embeddings = np.eye(len(data.profiles))
    # Profiles were trained on, so that nobody needs the nearest one.
    assert list(references(train, test, embeddings)) == ["collapse", "oracle"]
    assert train.knows(test.profiles).all()
    assert train.knows(np.array([999])).tolist() == [False]


def test_options_that_change_inside_the_training_answers_are_refused() -> None:
    columns = {"question_id": ["q", "q"], "question": ["?"] * 2, "options": [["a", "b"]] * 2, "group": ["x"] * 2}
    examples = ChoiceExamples.of({**columns, "profile": [0, 1], "counts": [[1, 2], [1, 2, 3]]})
    with pytest.raises(DataError, match="question 'q' has 2 options in one place and 3 in another"):
        TrainingAnswers.of(examples, 1)


def test_examples_of_a_split_are_those_of_its_columns(tmp_path) -> None:
    split = prepared(tmp_path, weighted=True).splits["test"]
    names = (
        "question_id",
        "question",
        "options",
        "group",
        "profile",
        "counts",
        "people",
        "scale",
        "answers",
        "weights",
    )
    one, other = ChoiceExamples.of(split), ChoiceExamples.of({name: split[name] for name in names})
    for name in ("questions", "groups", "profiles"):
        assert list(getattr(one, name)) == list(getattr(other, name))
    for name in ("counts", "people", "answers", "weights"):
        a, b = getattr(one, name), getattr(other, name)
        np.testing.assert_array_equal(a.values_F, b.values_F)
        np.testing.assert_array_equal(a.lengths_M, b.lengths_M)
    assert one.texts == other.texts
    assert one.nominal == other.nominal


def test_labels_name_what_occurs_in_the_order_it_comes() -> None:
    labels = Labels(["never", "b", "a"], np.array([2, 1, 2]))
    assert (list(labels), labels.names, labels.code_M.tolist()) == (["a", "b", "a"], ["a", "b"], [0, 1, 0])
    assert list(labels[1:]) == ["b", "a"]
    taken = labels.take([1, 1])
    assert (list(taken), taken.names) == (["b", "b"], ["b"])
    assert list(Labels.of([])) == []


def test_ragged_rows_are_lists_of_arrays() -> None:
    rows = [[1, 2], [], [3], [4, 5, 6]]
    ragged = Ragged.of(rows)
    assert [row.tolist() for row in ragged] == rows
    assert [row.tolist() for row in ragged.take([3, 0, 1])] == [[4, 5, 6], [1, 2], []]
    assert [row.tolist() for row in ragged[1:3]] == [[], [3]]
    assert ragged[-1].tolist() == [4, 5, 6]
    assert ragged.sums().tolist() == [3, 0, 3, 15]
    assert ragged.place_F.tolist() == [0, 1, 0, 0, 1, 2]
    np.testing.assert_array_equal(ragged.padded(3, np.nan)[:2], [[1, 2, np.nan], [np.nan] * 3])
    with pytest.raises(IndexError):
        ragged[4]
