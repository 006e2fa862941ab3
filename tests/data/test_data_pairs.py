"""Preferences drawn from people's answers: the question as it is asked, the person's option against another one."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from conftest import character_tokenizer
from raw_data import survey_people, write_benchmark, write_jsonl, write_survey

from cuma_ds.config import DataSection
from cuma_ds.data import PreparedData, load_data, prepare
from cuma_ds.data.batch import encode_example, encode_pair
from cuma_ds.data.rendering import LETTERS, Renderer
from cuma_ds.errors import DataError

ANSWERS = [
    {
        "profile": {"country": f"C{person % 7}", "age": str(person)},
        "question": f"Question {number}?",
        "options": [f"Option {place} of {number}" for place in range(2 + number)],
        "answer": (person + number) % (2 + number),
        "question_id": f"q{number}",
        "person_id": f"p{person}",
    }
    for person in range(40)
    for number in range(4)
]


@pytest.fixture
def sources(tmp_path) -> dict[str, DataSection]:
    write_jsonl(tmp_path / "answers.jsonl", ANSWERS)
    people = survey_people(40)
    write_survey(tmp_path / "survey", people)
    order = list(range(40))
    write_benchmark(tmp_path / "benchmark", people, {"train": order[:24], "valid": order[24:30], "test": order[30:]})
    return {
        "jsonl": DataSection(path=str(tmp_path / "answers.jsonl"), heldout_fraction=0.4),
        "survey": DataSection(source="wvb", path=str(tmp_path / "survey"), heldout_fraction=0.4),
        "benchmark": DataSection(source="wvb", path=str(tmp_path / "benchmark")),
        "wvs-sample": DataSection(source="wvs-sample", heldout_profile_fraction=0.1),
    }


def pairs_of(config: DataSection, **changes) -> PreparedData:
    return load_data(config.model_copy(update={"kind": "preference", **changes}))


def everything(data: PreparedData) -> list[tuple[str, str, str, str]]:
    """Each pair in words: the sentence of the profile, the prompt, both letters."""
    return [
        (data.sentences[row["profile"]], row["prompt"][0]["content"], row["chosen"], row["rejected"])
        for split in data.splits.values()
        for row in split
    ]


@pytest.mark.parametrize("name", ["jsonl", "survey", "benchmark", "wvs-sample"])
def test_a_person_stands_on_the_side_they_have_as_an_answerer(sources, name):
    choice, pairs = load_data(sources[name]), pairs_of(sources[name])
    assert (choice.kind, pairs.kind) == ("choice", "preference")
    assert list(choice.splits) == list(pairs.splits)
    for split in choice.splits:
        answered = Counter((row["profile"], person) for row in choice.splits[split] for person in row["people"])
        assert Counter((row["profile"], *row["people"]) for row in pairs.splits[split]) == answered
        sizes = choice.manifest["splits"][split]
        assert pairs.manifest["splits"][split] == {**sizes, "examples": sizes["answers"]}
    assert sum(len(split) > 0 for split in pairs.splits.values()) > 2
    assert choice.profiles == pairs.profiles


@pytest.mark.parametrize("order", ["fixed", "reversed"])
@pytest.mark.parametrize("style", ["letters", "metadata"])
def test_the_prompt_and_the_chosen_letter_are_those_of_the_choice_question(tmp_path, order, style):
    """Rendered, they are the prompt of the choice question and the one label that its answer is."""
    scale = "On a scale of 1 to 3, 1 meaning 'low' and 3 meaning 'high', how warm is it?"
    rows = [{**row, "question": scale} if row["question_id"] == "q1" else row for row in ANSWERS]
    config = DataSection(
        path=str(write_jsonl(tmp_path / "a.jsonl", rows)), prompt_style=style, option_order=order, heldout_fraction=0
    )
    choice, pairs = load_data(config.model_copy(update={"histogram_targets": False})), pairs_of(config)
    renderer = Renderer.of(character_tokenizer(), config.model_copy(update={"max_length": 1000}))
    expected, found, differ = Counter(), Counter(), 0
    for row in choice.splits["train"]:
        encoded = encode_example(row, renderer, choice.sentences, config)
        label = encoded.target_token[encoded.target_weight.index(1.0)]
        expected[(*encoded.input_ids, label, encoded.profile)] += 1
    for row in pairs.splits["train"]:
        chosen, rejected = encode_pair(row, renderer, pairs.sentences)
        found[(*chosen.input_ids[: chosen.target_position[0] + 1], chosen.target_token[0], chosen.profile)] += 1
        assert (
            chosen.input_ids[: chosen.target_position[0] + 1] == rejected.input_ids[: rejected.target_position[0] + 1]
        )
        differ += chosen.target_token[0] != rejected.target_token[0]
        assert row["margin"] is None
        shown = row["prompt"][0]["content"].count("\n") - 1
        assert row["rejected"] in LETTERS[:shown]
    assert found == expected
    assert differ == len(pairs.splits["train"])


def test_the_other_option_depends_on_seed_person_and_question_alone(tmp_path):
    config = DataSection(path=str(write_jsonl(tmp_path / "a.jsonl", ANSWERS)), heldout_fraction=0)
    pairs = Counter(everything(pairs_of(config)))
    some = [row for row in ANSWERS[::-1] if row["person_id"] != "p3" and row["question_id"] != "q2"]
    fewer = pairs_of(config, path=str(write_jsonl(tmp_path / "b.jsonl", some)))
    assert len(everything(fewer)) == len(some)
    assert not Counter(everything(fewer)) - pairs
    assert Counter(everything(pairs_of(config, split_seed=1))) != pairs


def test_every_other_option_is_drawn_about_equally_often():
    data = pairs_of(DataSection(source="wvs-sample", questions=("immigration",)))
    others: dict[str, Counter[str]] = defaultdict(Counter)
    for row in data.splits["train"]:
        others[row["chosen"]][row["rejected"]] += 1
    for chosen, counted in others.items():
        assert set(counted) == set("ABCD") - {chosen}
        total = sum(counted.values())
        # Five standard deviations of a share of 1/3.
        assert all(abs(count / total - 1 / 3) < 5 * (2 / 9 / total) ** 0.5 for count in counted.values())


def test_a_folder_of_pairs_keeps_how_its_questions_are_asked(sources, tmp_path):
    config = sources["jsonl"].model_copy(update={"kind": "preference"})
    saved = prepare(config, spool=None).save(tmp_path / "pairs")
    again = config.model_copy(update={"path": str(tmp_path / "pairs")})
    assert everything(load_data(again)) == everything(saved)
    for key, value, before in (("option_order", "reversed", "fixed"), ("prompt_style", "metadata", "letters")):
        with pytest.raises(DataError, match=f"prepared with {key} {before}, but the recipe says data.{key}: {value}"):
            load_data(again.model_copy(update={key: value}))
    manifest = json.loads((Path(tmp_path) / "pairs" / "manifest.json").read_text())
    assert manifest["kind"] == "preference"


def test_what_is_not_there_cannot_be_made(sources, tmp_path):
    with pytest.raises(DataError, match=r"data\.kind is chat, but the rows are of kind choice"):
        load_data(sources["jsonl"].model_copy(update={"kind": "chat"}))
    weighted = write_jsonl(tmp_path / "weighted.jsonl", [{**row, "weight": 2} for row in ANSWERS])
    with pytest.raises(DataError, match=r"only choice questions have weights, not kind preference"):
        load_data(DataSection(path=str(weighted), kind="preference", weights=True))
