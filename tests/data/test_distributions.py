"""Distribution rows and published tables: shares as they are read by hand, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published import OPINIONS, subpop_lines, write_lines, write_opinions
from raw_data import draw, write_jsonl

from cuma_ds.config import DataSection
from cuma_ds.data import PreparedData, load_data, prepare
from cuma_ds.data.sampling import Limits, sample
from cuma_ds.errors import CumaError, DataError

OPTIONS = ["Yes", "No", "Maybe"]
PEOPLE = {"Peru": 800, "Laos": 40, "Chad": 1000, "Cuba": 250, "Fiji": 100}


def counts_of(country: int, question: int) -> list[int]:
    """Answers of one country, none for some options."""
    people = list(PEOPLE.values())[country]
    some = people * (country + 2 * question) // 12
    return [some, people - some - (people // 10) * (country % 2), (people // 10) * (country % 2)]


def distributions(percent: bool = False, **changes: Any) -> list[dict[str, Any]]:
    """Three questions in five countries."""
    rows = []
    for country, (name, people) in enumerate(PEOPLE.items()):
        for question in range(3):
            counts = counts_of(country, question)
            shares = [count / people * (100 if percent else 1) for count in counts]
            row = {"profile": {"country": name}, "question": f"Question {question}?", "options": OPTIONS}
            rows.append({**row, "question_id": f"q{question}", "shares": shares, "weight": people, **changes})
    return rows


def load(path: Path, **settings: Any) -> PreparedData:
    return load_data(DataSection(**{"path": str(path), "heldout_fraction": 0, **settings}), "wvs")


def shown(data: PreparedData) -> dict[tuple[str, str], dict[str, float]]:
    """(group or sentence, question) to the share of each option."""
    return {
        (row["group"] or data.sentences[row["profile"]], row["question_id"]): {
            option: count / sum(row["counts"]) for option, count in zip(row["options"], row["counts"], strict=True)
        }
        for split in data.splits.values()
        for row in split
    }


@pytest.mark.parametrize("percent", [False, True])
def test_counts_are_shares_times_people(tmp_path, percent) -> None:
    data = load(write_jsonl(tmp_path / "a.jsonl", distributions(percent)))
    found = {(row["group"], row["question_id"]): row["counts"] for split in data.splits.values() for row in split}
    for country, name in enumerate(PEOPLE):
        for question in range(3):
            assert found[name, f"q{question}"] == pytest.approx(counts_of(country, question), abs=1e-9)
    sizes = data.manifest["splits"].values()
    assert sum(size["answers"] for size in sizes) == 3 * sum(PEOPLE.values())
    assert {size["people"] for size in sizes} == {0}
    assert all(split.distributions for split in data.splits.values())


def test_a_hash_of_profile_and_question_decides_what_is_tested(tmp_path) -> None:
    data = load(write_jsonl(tmp_path / "a.jsonl", distributions()), split_seed=2, test_fraction=0.4)
    tested = {(row["group"], row["question_id"]) for row in data.splits["test"]}
    expected = {
        (name, f"q{question}")
        for name in PEOPLE
        for question in range(3)
        if draw(2, "person", f"q{question}\0A person living in {name}.") < 0.4
    }
    assert tested == expected
    turned = load(write_jsonl(tmp_path / "b.jsonl", distributions()[::-1]), split_seed=2, test_fraction=0.4)
    assert {(row["group"], row["question_id"]) for row in turned.splits["test"]} == expected


def test_a_distribution_without_people_stands_for_a_thousand_and_rounded_shares_are_normalised(tmp_path) -> None:
    rows = [{key: value for key, value in row.items() if key != "weight"} for row in distributions()]
    rows[0]["shares"] = [0.33, 0.33, 0.33]
    rows[1]["shares"] = [51, 31, 20]
    data = load(write_jsonl(tmp_path / "a.jsonl", rows))
    assert shown(data)["Peru", "q0"] == pytest.approx(dict.fromkeys(OPTIONS, 1 / 3))
    assert shown(data)["Peru", "q1"]["Yes"] == pytest.approx(0.5)
    sums = [sum(row["counts"]) for split in data.splits.values() for row in split]
    assert sums == pytest.approx([1000.0] * 15)


def test_a_prepared_folder_reads_back_as_distributions(tmp_path) -> None:
    data = load(write_jsonl(tmp_path / "a.jsonl", distributions())).save(tmp_path / "prepared")
    again = load(tmp_path / "prepared")
    assert again.splits["train"].distributions
    assert [row["counts"] for row in again.splits["train"]] == [row["counts"] for row in data.splits["train"]]
    part = sample(again.splits["train"], Limits(examples=3)).split
    assert (len(part), part.distributions) == (3, True)
    known = {(row["group"], row["question_id"]): row["counts"] for row in again.splits["train"]}
    assert all(row["counts"] == known[row["group"], row["question_id"]] for row in part)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"shares": [0.5, 0.3, 0.17]}, "shares sum to 0.97; allowed: 1, or 100 for percentages, within 2%"),
        ({"shares": [50, 30, 23]}, "shares sum to 103; allowed: 1, or 100"),
        ({"shares": [0.5, 0.5]}, "shares has 2 numbers; allowed: one number for each of the 3 options"),
        ({"shares": [0.6, 0.5, -0.1]}, r"shares\[2\] is -0.1; allowed: a number from 0 on"),
        ({"shares": [0.6, 0.4, None]}, r"shares\[2\] is NoneType"),
        ({"shares": "a lot"}, "shares is str; allowed"),
        ({"weight": 0}, r"weight is 0; allowed: a positive number \(1000 where a row has none\)"),
        ({"weight": -3}, "weight is -3"),
        ({"answer": 1}, "unknown key 'answer'; a distribution row allows: profile, question, options, shares"),
        ({"person_id": "p"}, "unknown key 'person_id'"),
    ],
)
def test_a_bad_distribution_is_told_with_its_line(tmp_path, change, problem) -> None:
    rows = distributions()
    rows[3] = {**rows[3], **change}
    with pytest.raises(DataError, match=rf"a\.jsonl:4: {problem}") as caught:
        load(write_jsonl(tmp_path / "a.jsonl", rows))
    assert "\n" not in str(caught.value)


def test_what_makes_no_sense_of_distributions_is_refused(tmp_path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", distributions())
    for settings, problem in (
        ({"weights": True}, "holds distributions, which always count by their weight; leave it out"),
        ({"kind": "preference"}, "pairs are drawn from people's answers, not from distributions"),
        ({"histogram_targets": False}, "distributions are of no single answers"),
    ):
        with pytest.raises(CumaError, match=problem):
            load(file, **settings)
    answer = {"profile": {"country": "Peru"}, "question": "Q?", "options": OPTIONS, "answer": 0}
    with pytest.raises(DataError, match="a choice row after distribution rows; one data set holds one kind"):
        load(write_jsonl(tmp_path / "b.jsonl", [*distributions(), answer]))


def test_global_opinions_are_read_as_they_are_published(tmp_path) -> None:
    data = prepare(DataSection(source="global-opinions", path=str(write_opinions(tmp_path / "global_opinions.csv"))))
    found = {
        (row["group"], row["question"]): dict(zip(row["options"], row["counts"], strict=True))
        for split in data.splits.values()
        for row in split
    }
    tea, cups = (row["question"] for row in OPINIONS[:2])
    # Without "DK/Refused", of 1,000 people each; the samples of no nation and the old one are left out.
    expected = {
        ("Peru", tea): {"Good": 600 / 0.91, "Bad": 310 / 0.91},
        ("Laos", tea): {"Good": 500, "Bad": 500},
        ("South Korea", tea): {"Good": 750 / 0.95, "Bad": 200 / 0.95},
        ("Peru", cups): {"1.0": 200, "2.0": 300, "Many's the cup": 500},
    }
    assert found.keys() == expected.keys()
    for key, counts in expected.items():
        assert found[key] == pytest.approx(counts)
    assert data.manifest["skipped"] == {
        "questions with unusable shares": 1, "questions without text, options or answers": 1
    }  # fmt: skip
    assert set(data.splits["train"]["scale"]) == {"nominal"}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"options": "Yes and No"}, "row 1: options is no list; save the file as it is published"),
        ({"selections": "__import__('os')"}, "row 1: selections is no dict of countries"),
    ],
)
def test_cells_of_another_form_are_refused(tmp_path, row, problem) -> None:
    file = write_opinions(tmp_path / "global_opinions.csv", [{**OPINIONS[0], **row}])
    with pytest.raises(DataError, match=problem):
        prepare(DataSection(source="global-opinions", path=str(file)))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="column question, selections, options is missing"):
        prepare(DataSection(source="global-opinions", path=str(tmp_path / "other.csv")))


@pytest.mark.parametrize("source", ["subpop", "opinionqa"])
def test_subpop_lines_are_read_in_the_order_of_their_scale(tmp_path, source) -> None:
    lines = subpop_lines()
    lines[0] = {**lines[0], "options": str(lines[0]["options"]), "responses": str(lines[0]["responses"])}
    file = write_lines(tmp_path / "SubPOP.jsonl", lines)
    data = prepare(DataSection(source=source, path=str(file)))
    rows = [row for split in data.splits.values() for row in split]
    assert len(rows) == len(lines)
    asked = {row["question_id"]: (row["options"], row["scale"]) for row in rows}
    assert asked["safer_W1"] == (["Safer", "Neither", "More dangerous"], "ordinal")
    assert asked["trust_W2"] == (["A lot", "A little"], "ordinal")
    assert asked["first_W2"] == (["Tea", "Coffee", "Milk"], "nominal")
    found = {(data.sentences[row["profile"]], row["question_id"]): row["counts"] for row in rows}
    assert found["Sex: Male.", "safer_W1"] == pytest.approx([100, 300, 600])
    assert found["Sex: Female.", "safer_W1"] == pytest.approx([600, 100, 300])
    assert found["Political party: Democrat.", "trust_W2"] == pytest.approx([750, 250])
    assert found["Religion: Hindu.", "first_W2"] == pytest.approx([250, 250, 500])
    assert sum(map(sum, found.values())) == pytest.approx(1000 * len(lines))


def test_bad_lines_of_subpop_are_refused_or_counted(tmp_path) -> None:
    lines = subpop_lines()
    bad = {**lines[1], "responses": [0.5, 0.1, 0.1]}
    data = prepare(DataSection(source="subpop", path=str(write_lines(tmp_path / "a.jsonl", [*lines[2:], bad]))))
    assert data.manifest["skipped"] == {"distributions with unusable responses": 1}
    for change, problem in (
        ({"ordinal": [1.0]}, "3 responses, 1 places in ordinal and 3 options besides the refusal"),
        ({"responses": "many"}, "responses is no list"),
    ):
        file = write_lines(tmp_path / "b.jsonl", [lines[0], {**lines[1], **change}])
        with pytest.raises(DataError, match=rf"b\.jsonl:2: {problem}"):
            prepare(DataSection(source="subpop", path=str(file)))
    file = write_lines(tmp_path / "c.jsonl", [{"qkey": "a"}])
    with pytest.raises(DataError, match=r"c\.jsonl:1: key 'attribute' is missing"):
        prepare(DataSection(source="subpop", path=str(file)))


def answers(split_of: str = "questions") -> list[dict[str, Any]]:
    """120 people who answered four questions, some of them not all."""
    rng = np.random.default_rng(5)
    return [
        {"profile": {"country": ["Peru", "Laos", "Chad"][person % 3]}, "question": f"Question {question}?"}
        | {"question_id": f"q{question}", "options": OPTIONS, "answer": int(rng.integers(3)), "person_id": f"p{person}"}
        for person in range(120)
        for question in range(8)
        if rng.random() < 0.8
    ]


def test_held_out_questions_have_everybodys_answers_and_no_other_split_has_any(tmp_path) -> None:
    rows = answers()
    settings = {"heldout_question_fraction": 0.4, "split_seed": 1}
    data = load(write_jsonl(tmp_path / "a.jsonl", rows), heldout_fraction=0.3, split_seed=1)
    held = load(tmp_path / "a.jsonl", **settings)
    expected = {f"q{question}" for question in range(8) if draw(1, "question", f"q{question}") < 0.4}
    assert 0 < len(expected) < 8
    assert held.evaluation_splits == ["test", "heldout_questions"]
    for name, split in held.splits.items():
        asked = set(split["question_id"])
        assert asked == expected if name == "heldout_questions" else not asked & expected
    of_them = [row for row in rows if row["question_id"] in expected]
    assert held.manifest["splits"]["heldout_questions"]["answers"] == len(of_them)
    assert sum(split.answers().sum() for split in held.splits.values()) == len(rows)
    assert "heldout_questions" not in data.splits
    assert "heldout_question_fraction" not in data.manifest

    held.save(tmp_path / "prepared")
    again = load(tmp_path / "prepared", **settings)
    assert again.splits["heldout_questions"].to_list() == held.splits["heldout_questions"].to_list()
    with pytest.raises(DataError, match=r"prepared with heldout_question_fraction 0\.4, but the recipe says"):
        load(tmp_path / "prepared", split_seed=1)


def test_pairs_of_held_out_questions_are_held_out(tmp_path) -> None:
    rows = answers()
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    pairs = load(file, heldout_question_fraction=0.4, split_seed=1, kind="preference")
    held = {prompt[0]["content"].split("?")[0] for prompt in pairs.splits["heldout_questions"]["prompt"]}
    others = {prompt[0]["content"].split("?")[0] for prompt in pairs.splits["train"]["prompt"]}
    assert held
    assert not held & others
    assert sum(map(len, pairs.splits.values())) == len(rows)
    chat = {"profile": "x", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(DataError, match="but rows of kind chat have no questions"):
        load(write_jsonl(tmp_path / "b.jsonl", [chat, chat]), heldout_question_fraction=0.4)


def test_one_question_stays_for_training_and_a_warning_says_that_none_is_held_out(tmp_path) -> None:
    rows = [row for row in answers() if row["question_id"] in ("q0", "q1")]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    most = load(file, heldout_question_fraction=0.999)
    assert len(set(most.splits["train"]["question_id"])) == 1
    low = min(draw(0, "question", name) for name in ("q0", "q1")) / 2
    with pytest.warns(UserWarning, match=r"none of the 2 questions is held out with heldout_question_fraction"):
        load(file, heldout_question_fraction=low)


def test_the_command_reads_tables(tmp_path, launch) -> None:
    file = write_opinions(tmp_path / "global_opinions.csv")
    done = launch("prepare_data", "global-opinions", "--root", str(file), "--out", str(tmp_path / "prepared"))
    assert done.code == 0, done.err
    assert "published distributions" in done.out
    assert json.loads((tmp_path / "prepared" / "manifest.json").read_text())["source"] == "global-opinions"
