"""Community Alignment, PRISM and own files of every kind: what becomes of each record, and what is refused."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import pandas as pd
import pytest
from raw_data import alignment_row, draw, prism_conversation, prism_user, write_alignment, write_jsonl, write_prism

from cuma_ds.config import DataSection
from cuma_ds.data import PreparedData, load_data, prepare
from cuma_ds.data.build import build
from cuma_ds.data.raw import ReadOptions
from cuma_ds.data.sources.files import find_input
from cuma_ds.data.sources.gather import read_records
from cuma_ds.data.sources.records import as_is
from cuma_ds.errors import DataError

CHOICES = [
    {"profile": {"country": f"C{i % 5}", "age": 20 + i % 7}, "question": f"Q{i % 3}?", "options": ["Yes", "No", "?"],
     "answer": i % 3, "person_id": f"p{i % 40}"}
    for i in range(120)
]  # fmt: skip
CHATS = [
    {"profile": {"country": f"C{i % 5}"}, "person_id": f"p{i % 20}",
     "messages": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Yo"}]}
    for i in range(60)
]  # fmt: skip
PREFERENCES = [
    {
        "profile": {"country": f"C{i % 5}"},
        "prompt": f"Tea {i}?",
        "chosen": "Yes",
        "rejected": "No",
        "person_id": f"p{i % 20}",
    }
    for i in range(60)
]


def rows(data: PreparedData) -> list[dict]:
    return [row for split in data.splits.values() for row in split]


def texts(data: PreparedData, key: str) -> Counter:
    return Counter(json.dumps(row[key]) for row in rows(data))


def alignment(path, kind=None, **settings) -> PreparedData:
    return load_data(DataSection(source="community-alignment", path=str(path), kind=kind, **settings), "wvs")


def prism(path, kind=None, **settings) -> PreparedData:
    return load_data(DataSection(source="prism", path=str(path), kind=kind, **settings), "wvs")


def said(turns) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for prompt, answer in turns
        for role, text in (("user", prompt), ("assistant", answer))
    ]


@pytest.fixture
def dialogues(tmp_path):
    return write_alignment(tmp_path / "filtered.csv", [alignment_row(number) for number in range(36)])


def alignment_turns(number: int):
    letter = "abcd"[number % 3]
    return [
        (f'{turn} question {number % 4},\nwith "quotes"', f"{turn} answer {letter} to {number % 4}")
        for turn in ("first", "second")
    ]


def test_alignment_conversations_follow_the_preferred_answers(dialogues):
    data = alignment(dialogues)
    assert data.kind == "chat"
    assert texts(data, "messages") == Counter(json.dumps(said(alignment_turns(number))) for number in range(36))
    assert "A man aged 18 to 34 living in India whose highest education is some post-secondary." in data.sentences
    assert any("living in the United States" in sentence for sentence in data.sentences)
    assert not any("refer not to say" in sentence for sentence in data.sentences)


def test_alignment_preferences_set_the_preferred_answer_against_each_other(dialogues):
    data = alignment(dialogues, "preference")
    expected = Counter()
    for number in range(36):
        turns = alignment_turns(number)
        for place, (prompt, chosen) in enumerate(turns):
            for letter in "abcd":
                other = chosen.replace(f"answer {'abcd'[number % 3]}", f"answer {letter}")
                if other != chosen:
                    expected[
                        json.dumps([[*said(turns[:place]), {"role": "user", "content": prompt}], chosen, other])
                    ] += 1
    assert Counter(json.dumps([row["prompt"], row["chosen"], row["rejected"]]) for row in rows(data)) == expected
    assert sum(expected.values()) == 36 * 2 * 3


def test_alignment_discrimination_merges_equal_first_turns(dialogues):
    data = alignment(dialogues, "choice", heldout_fraction=0)
    assert len(set(data.splits["train"]["question_id"])) == 4
    counts = Counter()
    for row in rows(data):
        assert row["options"] == [f"first answer {letter} to {row['question'][15]}" for letter in "abcd"]
        assert row["scale"] == "nominal"
        for option, count in enumerate(row["counts"]):
            counts[row["question"][15], option] += count
    assert +counts == Counter((str(number % 4), number % 3) for number in range(36))


def test_a_prepared_folder_is_of_one_kind(dialogues, tmp_path):
    alignment(dialogues, "choice").save(tmp_path / "out")
    assert alignment(tmp_path / "out").kind == alignment(tmp_path / "out", "choice").kind == "choice"
    with pytest.raises(DataError, match=r"prepared as kind choice, but the recipe says data\.kind: chat"):
        alignment(tmp_path / "out", "chat")


@pytest.mark.parametrize("kind", ["chat", "choice", "preference"])
@pytest.mark.parametrize("seed", [0, 1])
def test_annotators_and_held_out_countries_stay_on_one_side(dialogues, kind, seed):
    """Annotator a0 to a8 have three countries; each person's country and age are known from the number."""
    data = alignment(dialogues, kind, split_seed=seed, heldout_fraction=0.34)
    countries = {name: set(split["group"]) for name, split in data.splits.items()}
    names = ["India", "United States", "Italy"]
    heldout = {name for name in names if draw(seed, "unit", name) < 0.34}
    assert countries["heldout"] == heldout
    assert not countries["heldout"] & (countries["train"] | countries["test"])
    others = [number for number in range(9) if names[number % 3] not in heldout]
    testers = [number for number in others if draw(seed, "person", f"a{number}") < 0.3]
    testers = testers or [min(others, key=lambda number: draw(seed, "person", f"a{number}"))]
    people = {name: sizes["people"] for name, sizes in data.manifest["splits"].items()}
    assert people == {"train": len(others) - len(testers), "test": len(testers), "heldout": 9 - len(others)}


@pytest.mark.parametrize("seed", range(4))
def test_all_kinds_of_a_source_test_the_same_people(tmp_path, seed):
    """One annotator has no four different answers, so that the choice questions lack them."""
    dialogues = [
        alignment_row(number, annotator_id=f"a{number % 40}", annotator_age=f"{number % 40}") for number in range(80)
    ]
    for number in (5, 45):
        dialogues[number]["first_turn_response_b"] = dialogues[number]["first_turn_response_c"]
    file = write_alignment(tmp_path / "a.csv", dialogues)

    def split_of(kind):
        data = alignment(file, kind, split_seed=seed)
        return {
            data.profiles[row["profile"]]["fields"]["age"]: name for name, split in data.splits.items() for row in split
        }

    chat, choice, preference = map(split_of, ("chat", "choice", "preference"))
    assert set(chat) - set(choice) == {"5"}
    assert choice == {age: side for age, side in chat.items() if age != "5"}
    assert preference == chat


def test_alignment_leaves_out_what_cannot_be_used_and_counts_it(tmp_path):
    nothing = dict.fromkeys(
        [f"annotator_{field}" for field in ("age", "gender", "education_level", "political", "ethnicity", "country")]
    )
    odd = [
        alignment_row(100, first_turn_preferred_response=None),
        alignment_row(101, **nothing),
        alignment_row(102, first_turn_response_b="first answer a to 2"),
        alignment_row(103, second_turn_prompt=None),
    ]
    file = write_alignment(tmp_path / "a.csv", [alignment_row(number) for number in range(18)] + odd)
    chats = alignment(file)
    assert chats.manifest["skipped"] == {
        "conversations without a first prompt and a preferred answer to it": 1,
        "conversations of people of whom nothing is known": 1,
    }
    assert len(rows(chats)) == 20
    assert Counter(len(row["messages"]) for row in rows(chats)) == {4: 19, 2: 1}
    skipped = alignment(file, "choice").manifest["skipped"]
    assert skipped["conversations whose four first answers are not four different texts"] == 1


def test_a_folder_with_one_csv_is_enough_and_gzip_is_read(tmp_path):
    (tmp_path / "data").mkdir()
    plain = write_alignment(tmp_path / "data" / "full.csv", [alignment_row(number) for number in range(18)])
    expected = texts(alignment(tmp_path), "messages")
    (tmp_path / "data" / "full.csv.gz").write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(DataError, match=r"holds 2 CSV files \(full\.csv, full\.csv\.gz\); name one"):
        alignment(tmp_path)
    plain.unlink()
    assert texts(alignment(tmp_path), "messages") == expected


@pytest.mark.parametrize(("separator", "encoding"), [(";", "utf-8"), ("\t", "utf-8-sig"), (",", "utf-8-sig")])
def test_dialogues_saved_in_another_way_are_the_same(tmp_path, separator, encoding):
    plain = write_alignment(tmp_path / "a.csv", [alignment_row(number) for number in range(18)])
    other = tmp_path / "b.csv"
    pd.read_csv(plain).to_csv(other, sep=separator, encoding=encoding, index=False)
    assert texts(alignment(other), "messages") == texts(alignment(plain), "messages")


def test_one_first_turn_in_two_spellings_is_one_question(tmp_path):
    first = {
        name: text
        for name, text in alignment_row(0).items()
        if name.startswith(("first_turn_prompt", "first_turn_response"))
    }
    other = {name: f"{text}\u200b" for name, text in first.items()}
    dialogues = [
        alignment_row(4 * number, conversation_id=f"c{number}", **(other if number % 2 else {})) for number in range(18)
    ]
    data = alignment(write_alignment(tmp_path / "a.csv", dialogues), "choice")
    assert {row["question_id"] for row in rows(data)} == {data.splits["train"][0]["question_id"]}


BAD_ALIGNMENT = {
    "answer": (
        {"second_turn_preferred_response": "response_e"},
        r"a\.csv: row 2: second_turn_preferred_response is 'response_e'; allowed",
    ),
    "nobody": ({"annotator_id": None}, r"a\.csv: row 2: annotator_id is empty"),
    "no person": ({"annotator_id": "unknown"}, r"a\.csv: row 2: annotator_id is unknown; each conversation names"),
    "twice": ({"conversation_id": "c0"}, r"a\.csv: row 2: the id 'c0' has come before"),
}


@pytest.mark.parametrize(("changes", "problem"), BAD_ALIGNMENT.values(), ids=BAD_ALIGNMENT.keys())
def test_a_bad_alignment_row_is_named(tmp_path, changes, problem):
    with pytest.raises(DataError, match=problem):
        alignment(write_alignment(tmp_path / "a.csv", [alignment_row(0), alignment_row(1, **changes)]))


def test_bad_alignment_files_are_told_in_one_line(tmp_path, dialogues):
    pd.read_csv(dialogues).drop(columns="first_turn_response_c").to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(DataError, match=r"b\.csv: column first_turn_response_c is missing; the file has 33 columns"):
        alignment(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_bytes(dialogues.read_text().replace("first answer", "première").encode("latin-1"))
    with pytest.raises(DataError, match=r"c\.csv: not UTF-8 text"):
        alignment(tmp_path / "c.csv")
    (tmp_path / "u.csv").write_text(dialogues.read_text(), encoding="utf-16")
    with pytest.raises(DataError, match=r"u\.csv: not UTF-8 text; save it as UTF-8, e\.g\. with iconv -f UTF-16"):
        alignment(tmp_path / "u.csv")
    (tmp_path / "d.csv.gz").write_bytes(gzip.compress(dialogues.read_bytes() * 40)[:-200])
    with pytest.raises(DataError, match=r"d\.csv\.gz: cannot be read"):
        alignment(tmp_path / "d.csv.gz")
    with pytest.raises(DataError, match=r"there is no data at .*absent"):
        alignment(tmp_path / "absent")


@pytest.fixture
def talks(tmp_path):
    users = [prism_user(number) for number in range(12)]
    return write_prism(tmp_path / "prism", users, [prism_conversation(number, number % 12) for number in range(40)])


def prism_turns(number: int):
    return [(f"Prompt {turn} of {number}", f"Answer {number % 2} in turn {turn} of {number}") for turn in (0, 1)]


def test_prism_conversations_follow_the_chosen_answers(talks):
    data = prism(talks)
    assert texts(data, "messages") == Counter(json.dumps(said(prism_turns(number))) for number in range(40))
    expected = (
        "A non-religious woman aged 18 to 24 living in France whose highest education is university Bachelors Degree."
        " Country of birth: Kenya. Ethnicity: White. Marital status: Never been married."
    )
    assert expected in data.sentences
    assert not any("Kenya" in sentence.split(".", 1)[1] for sentence in data.sentences if "living in Kenya" in sentence)


def test_prism_preferences_set_the_chosen_answer_against_each_other(talks):
    expected = Counter()
    for number in range(40):
        turns = prism_turns(number)
        for place, answers in ((0, 3), (1, 2)):
            for other in range(answers):
                if other != number % 2:
                    prompt = [*said(turns[:place]), {"role": "user", "content": turns[place][0]}]
                    expected[json.dumps([prompt, turns[place][1], f"Answer {other} in turn {place} of {number}"])] += 1
    found = Counter(
        json.dumps([row["prompt"], row["chosen"], row["rejected"]]) for row in rows(prism(talks, "preference"))
    )
    assert found == expected


def test_margins_are_differences_of_scores_where_there_are_scores(talks, dialogues, tmp_path):
    """raw_data gives answer number i the score 50 + i, and the chosen one 10 more."""
    pairs = rows(prism(talks, "preference"))
    assert {row["margin"] for row in pairs} == {8, 9, 11}
    for row in pairs:
        chosen, rejected = (int(row[key].split()[1]) for key in ("chosen", "rejected"))
        assert row["margin"] == 10 + chosen - rejected
    unscored = prism_conversation(0, 0)
    for entry in unscored["conversation_history"]:
        entry.pop("score", None)
    folder = write_prism(tmp_path / "unscored", [prism_user(0), prism_user(1)], [unscored, prism_conversation(1, 1)])
    missing = [row["margin"] for row in rows(prism(folder, "preference")) if row["chosen"].endswith("of 0")]
    assert missing == [None] * 3
    unscored["conversation_history"][1]["score"] = "good"
    write_prism(folder, [prism_user(0), prism_user(1)], [prism_conversation(1, 1), unscored])
    with pytest.raises(
        DataError, match=r"conversations\.jsonl:2: score is str; allowed: a number from 1 to 100, or null"
    ):
        prism(folder, "preference")
    assert {row["margin"] for row in rows(alignment(dialogues, "preference"))} == {None}
    own = [{**row, "margin": [None, 0.5, 3][i % 3]} for i, row in enumerate(PREFERENCES)]
    data = load_data(DataSection(path=str(write_jsonl(tmp_path / "a.jsonl", own))))
    assert {row["prompt"][0]["content"]: row["margin"] for row in rows(data)} == {r["prompt"]: r["margin"] for r in own}


def test_pairs_with_a_smaller_margin_are_left_out_and_counted(talks, tmp_path):
    every = rows(prism(talks, "preference"))
    data = prism(talks, "preference", min_margin=9)
    assert [row["margin"] for row in rows(data)].count(9) == sum(row["margin"] == 9 for row in every) > 0
    assert {row["margin"] for row in rows(data)} == {9, 11}
    left_out = sum(row["margin"] == 8 for row in every)
    assert data.manifest["skipped"] == {"pairs with a margin below data.min_margin": left_out}
    own = [{**row, "margin": [None, 0, -3][i % 3]} for i, row in enumerate(PREFERENCES)]
    path = str(write_jsonl(tmp_path / "a.jsonl", own))
    data = load_data(DataSection(path=path))
    assert [row["margin"] for row in rows(data)].count(None) == 20
    assert {row["margin"] for row in rows(data)} == {None, 0}
    assert data.manifest["skipped"] == {"pairs with a margin below data.min_margin": 20}
    data.save(tmp_path / "prepared")
    with pytest.raises(DataError, match=r"prepared with min_margin 0\.0, but the recipe says data\.min_margin: 2\.0"):
        load_data(DataSection(path=str(tmp_path / "prepared"), min_margin=2))
    write_jsonl(tmp_path / "a.jsonl", [row for row in own if row["margin"] == -3])
    with pytest.raises(
        DataError, match=r"holds no rows; .* \(left out: 20 pairs with a margin below data\.min_margin\)"
    ):
        load_data(DataSection(path=path))


def test_a_model_of_prism_that_said_nothing_gave_no_answer(tmp_path):
    silent = prism_conversation(0, 0)
    silent["conversation_history"][5]["content"] = "EMPTY STRING"  # the chosen answer of the second turn
    beside = prism_conversation(1, 1, conversation_id=7)
    beside["conversation_history"][1]["content"] = "EMPTY STRING"  # an answer that was not chosen
    folder = write_prism(
        tmp_path, [prism_user(0), prism_user(1), prism_user(2)], [silent, beside, prism_conversation(2, 2)]
    )
    said = [message["content"] for row in rows(prism(folder)) for message in row["messages"]]
    assert "EMPTY STRING" not in said
    assert sum("of 0" in text for text in said) == 2
    assert not any(row["rejected"] == "EMPTY STRING" for row in rows(prism(folder, "preference")))


def test_prism_people_stay_on_one_side(talks):
    data = prism(talks, heldout_fraction=0)
    sides = {
        name: {int(row["messages"][0]["content"].split()[-1]) % 12 for row in split}
        for name, split in data.splits.items()
    }
    assert not sides["train"] & sides["test"]
    assert sides["test"] == {number for number in range(12) if draw(0, "person", f"user{number}") < 0.3} != set()
    people = {name: sizes["people"] for name, sizes in data.manifest["splits"].items()}
    assert people == {"train": 12 - len(sides["test"]), "test": len(sides["test"]), "heldout": 0}


BAD_PRISM = {
    "stranger": ([], [prism_conversation(1, 77)], r"conversations\.jsonl:2: user_id 'user77' is not in the survey"),
    "twice": ([prism_user(0)], [], r"survey\.jsonl:3: the user_id 'user0' has come before"),
    "same conversation": ([], [prism_conversation(0, 1)], r"conversations\.jsonl:2: the id 'k0' has come before"),
    "survey key": ([{"user_id": "x"}], [], r"survey\.jsonl:3: key 'location' is missing"),
    "broken line": ([], ['{"user_id": '], r"conversations\.jsonl:2: broken JSON"),
    "history": (
        [],
        [prism_conversation(1, 0, conversation_history="x")],
        r"conversations\.jsonl:2: conversation_history is str",
    ),
    "role": (
        [],
        [prism_conversation(1, 0, conversation_history=[{"turn": 0, "role": "bot", "content": "x"}])],
        "entry 1 .* role 'bot'",
    ),
    "turn": (
        [],
        [prism_conversation(1, 0, conversation_history=[{"role": "user", "content": "x"}])],
        "entry 1 .* lacks a whole number",
    ),
    "location": (
        [prism_user(5, location="Chile")],
        [],
        r"survey\.jsonl:3: location is str; allowed: an object with reside_country",
    ),
}


@pytest.mark.parametrize(("users", "conversations", "problem"), BAD_PRISM.values(), ids=BAD_PRISM.keys())
def test_a_bad_prism_line_is_named(tmp_path, users, conversations, problem):
    write_prism(tmp_path, [prism_user(0), prism_user(1), *users], [prism_conversation(0, 0), *conversations])
    with pytest.raises(DataError, match=problem) as caught:
        prism(tmp_path)
    assert "\n" not in str(caught.value)


def test_bad_prism_folders_are_told(tmp_path, talks):
    with pytest.raises(DataError, match="prism holds no choice questions"):
        prism(talks, "choice")
    (talks / "survey.jsonl").unlink()
    with pytest.raises(
        DataError, match=r"survey\.jsonl is missing; source prism reads conversations\.jsonl and survey\.jsonl"
    ):
        prism(talks)


def same(first: PreparedData, second: PreparedData) -> None:
    assert [split.to_list() for split in first.splits.values()] == [split.to_list() for split in second.splits.values()]
    assert first.profiles == second.profiles


@pytest.mark.parametrize("given", [CHOICES, CHATS, PREFERENCES], ids=["choice", "chat", "preference"])
def test_one_data_set_in_any_container_is_one_data_set(tmp_path, given):
    from datasets import Dataset, DatasetDict

    expected = load_data(DataSection(path=str(write_jsonl(tmp_path / "a.jsonl", given))))
    assert len(rows(expected)) > 10
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    dataset = Dataset.from_list(given)
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    dataset.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": dataset, "other": dataset.select([0])}).save_to_disk(str(tmp_path / "several"))
    for name in ("a.jsonl.gz", "a.parquet", "one", "several"):
        same(load_data(DataSection(path=str(tmp_path / name))), expected)
    expected.save(tmp_path / "out")
    same(PreparedData.load(tmp_path / "out"), expected)


def test_other_containers_name_their_bad_rows(tmp_path):
    from datasets import Dataset

    Dataset.from_list([*CHOICES[:5], {**CHOICES[5], "answer": 9}]).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match=r"a\.parquet: row 6: answer is 9; allowed: 0 to 2"):
        load_data(DataSection(path=str(tmp_path / "a.parquet")))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not quite")
    with pytest.raises(DataError, match=r"b\.parquet: cannot be read as parquet"):
        load_data(DataSection(path=str(tmp_path / "b.parquet")))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="broken cannot be read as a datasets folder"):
        load_data(DataSection(path=str(tmp_path / "broken")))


def test_a_hub_id_is_asked_of_the_hub(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name):
        asked.append(name)
        return {"train": datasets.Dataset.from_list(CHOICES), "test": datasets.Dataset.from_list(CHOICES[:2])}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    expected = load_data(DataSection(path=str(write_jsonl(tmp_path / "a.jsonl", CHOICES))))
    same(load_data(DataSection(path="someone/opinions")), expected)
    assert asked == ["someone/opinions"]

    def refuse(name):
        raise ConnectionError("no way\nout")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        DataError, match=r"someone/opinions is neither a file or folder here nor a data set the hub gives us: no way$"
    ):
        load_data(DataSection(path="someone/opinions"))


@pytest.mark.parametrize(("given", "workers"), [(CHOICES, 0), (CHATS, 2)], ids=["choice", "chat"])
def test_processes_and_chunks_change_nothing(tmp_path, monkeypatch, given, workers):
    """Chunks of a few lines, read by other processes or this one and spooled to disk, give what one process reads in
    one go.
    """
    path = write_jsonl(tmp_path / "a.jsonl", given)
    expected = load_data(DataSection(path=str(path)))
    monkeypatch.setattr("cuma_ds.data.sources.files.CHUNK_BYTES", 2_000)
    chunks = find_input(path)
    assert len(list(chunks.chunks())) > 3
    told = []
    spool = tmp_path / "spool"
    spool.mkdir()
    options = ReadOptions(DataSection(), "generic", spool, workers, lambda done, total: told.append((done, total)))
    data = build(read_records(chunks, as_is, options), DataSection(), spool)
    same(data, expected)
    assert told == sorted(told)
    assert told[-1] == (chunks.size, chunks.size)


def test_mistakes_in_later_chunks_keep_their_line(tmp_path, monkeypatch):
    monkeypatch.setattr("cuma_ds.data.sources.files.CHUNK_BYTES", 500)
    other = {**CHOICES[0], "question_id": "q", "options": ["No", "Yes", "?"]}
    path = write_jsonl(tmp_path / "a.jsonl", [{**CHOICES[0], "question_id": "q"}, *CHOICES, other])
    with pytest.raises(DataError, match=r"a\.jsonl:122: question_id 'q' has another text, .* than at .*a\.jsonl:1;"):
        load_data(DataSection(path=str(path)))
    path = write_jsonl(tmp_path / "b.jsonl", [*CHOICES, CHATS[0]])
    with pytest.raises(DataError, match=r"b\.jsonl:121: a chat row after choice rows"):
        load_data(DataSection(path=str(path)))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"prompt": ""}, "message 1 has no text"),
        (
            {"prompt": [{"role": "assistant", "content": "x"}]},
            "a prompt starts with a user message .* ends with a user message",
        ),
        ({"chosen": " "}, "chosen is empty or not text"),
        ({"rejected": 3}, "rejected is empty or not text"),
        ({"rejected": ""}, "rejected is empty or not text"),
        ({"rejected": "Yes"}, "chosen and rejected are the same answer; allowed: two different answers"),
        ({"rejected": "\tYes\n"}, "chosen and rejected are the same answer"),
        ({"prompt": [*CHATS[0]["messages"]]}, "a prompt .* ends with a user message"),
        ({"prompt": []}, "messages is empty"),
        ({"margin": "3"}, "margin is str; allowed: a number"),
        ({"margin": True}, "margin is True; allowed: a number"),
        ({"margin": 1e300}, r"margin is 1e\+300; allowed: a number"),
    ],
)
def test_a_bad_preference_is_named(tmp_path, change, problem):
    with pytest.raises(DataError, match=f":2: {problem}"):
        load_data(
            DataSection(path=str(write_jsonl(tmp_path / "a.jsonl", [PREFERENCES[0], {**PREFERENCES[1], **change}])))
        )


@pytest.mark.parametrize("source", ["jsonl", "wvb", "community-alignment", "prism"])
def test_a_source_without_its_files_says_what_it_needs(source, tmp_path):
    from cuma_ds.errors import ConfigError

    with pytest.raises(ConfigError, match=rf"data\.path is missing; source {source} needs "):
        prepare(DataSection(source=source))
    with pytest.raises(DataError, match=r"absent|missing"):
        prepare(DataSection(source=source, path=str(tmp_path / "absent" / "here")))
