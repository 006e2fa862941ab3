"""What a recipe makes of the data: sentences, a draw of people and answers, prompts and targets."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from raw_data import alignment_row, survey_people, write_alignment, write_survey

from cuma_ds.config import DataSection
from cuma_ds.data import PreparedData, load_data, prepare
from cuma_ds.data.asked import conversation
from cuma_ds.data.batch import encode_example
from cuma_ds.data.rendering import Renderer
from cuma_ds.errors import ConfigError, DataError
from cuma_ds.profiles import Wording
from cuma_ds.recipe import load_config

OPINIONS = Path(__file__).parent / "opinions.jsonl"


@pytest.fixture(scope="module")
def survey(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("survey")
    write_survey(folder, survey_people(300))
    return folder


def wvb(folder: Path, wording: Wording | str = "wvs", **settings) -> PreparedData:
    return load_data(DataSection(source="wvb", path=str(folder), **settings), wording)


# Sentences


@pytest.mark.parametrize("from_prepared", [False, True])
def test_sentences_are_worded_as_the_recipe_says_and_reports_still_know_every_field(
    survey, tmp_path, from_prepared
) -> None:
    wording = Wording(format="From {country}[, {religion}]")
    plain, place = wvb(survey), survey
    if from_prepared:
        place = tmp_path / "prepared"
        prepare(DataSection(source="wvb", path=str(survey)), "generic").save(place)
    data = wvb(place, wording)
    assert set(data.sentences) <= {
        f"From {country}{religion}"
        for country in {profile["fields"]["country"] for profile in plain.profiles}
        for religion in ("", ", Do not belong to a denomination", ", Muslim", ", Buddhist")
    }
    assert len(set(data.sentences)) < len(data.profiles)
    assert {profile["fields"].get("gender") for profile in data.profiles} >= {"Male", "Female"}
    assert data.manifest["format"] == wording.format
    saved = data.save(tmp_path / "saved")
    assert PreparedData.load(saved.root).with_wording(wording).sentences == data.sentences


def test_people_without_the_fields_are_left_out_and_counted(survey) -> None:
    data, everybody = wvb(survey, Wording(fields=("religion",))), wvb(survey)
    asked = [profile["fields"].get("religion") for profile in everybody.profiles]
    for name, split in everybody.splits.items():
        kept = [row for row in split if asked[row["profile"]]]
        assert [row["counts"] for row in data.splits[name]] == [row["counts"] for row in kept]
        assert data.manifest["splits"][name]["answers"] == sum(sum(row["counts"]) for row in kept)
    missing = sum(not asked[row["profile"]] for split in everybody.splits.values() for row in split)
    assert data.manifest["skipped"]["rows of profiles without the fields that are read"] == missing > 0


@pytest.mark.parametrize(
    ("wording", "key"), [(Wording(fields=("contry",)), "fields"), (Wording(format="{contry}"), "format")]
)
def test_a_field_nobody_has_is_refused(wording, key) -> None:
    config = DataSection(source="jsonl", path=str(OPINIONS))
    with pytest.raises(
        ConfigError, match=rf"^profiles.{key}: no profile has the field 'contry' .did you mean 'country'"
    ):
        load_data(config, wording)


# A draw


def person_answers(data: PreparedData, split: str = "train") -> Counter[tuple[int, str, int]]:
    """(person, question, option) of each answer, by a walk over the rows."""
    found: Counter[tuple[int, str, int]] = Counter()
    for row in data.splits[split]:
        options = [option for option, count in enumerate(row["counts"]) for _ in range(int(count))]
        found.update(zip(row["people"], [row["question_id"]] * len(options), options, strict=True))
    return found


def test_people_are_drawn_and_then_their_answers(survey) -> None:
    everything, people = person_answers(wvb(survey)), wvb(survey, max_people=40)
    drawn = person_answers(people)
    names = {person for person, _, _ in drawn}
    assert len(names) == 40
    assert drawn == Counter({key: count for key, count in everything.items() if key[0] in names})
    both = person_answers(wvb(survey, max_people=40, max_examples=50))
    assert both.total() == 50
    assert not both - drawn
    assert person_answers(wvb(survey, max_people=20)) < drawn  # fewer people are part of more
    assert person_answers(wvb(survey, max_people=40, sample_seed=1)) != drawn
    assert person_answers(people, "test") == person_answers(wvb(survey), "test")
    assert people.manifest["splits"]["train"]["people"] == 40
    assert people.manifest["splits"]["train"]["answers"] == drawn.total()


def test_answers_are_drawn_from_everybody_where_people_are_not(survey) -> None:
    data = wvb(survey, max_examples=100, histogram_targets=False)
    assert len(data.splits["train"]) == 100
    assert len({row["people"][0] for row in data.splits["train"]}) > 60


def test_conversations_are_drawn_with_their_people(tmp_path) -> None:
    file = write_alignment(tmp_path / "ca.csv", [alignment_row(number) for number in range(36)])
    config = DataSection(source="community-alignment", path=str(file), max_people=3)
    data = load_data(config)
    assert len({row["people"][0] for row in data.splits["train"]}) == 3
    config = config.model_copy(update={"max_examples": 5, "max_people": None, "kind": "preference"})
    assert len(load_data(config).splits["train"]) == 5


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        ({"max_people": 5000}, r"data.max_people is 5000, but only \d+ people are there to learn from; lower it"),
        ({"max_examples": 90000}, r"data.max_examples is 90000, but only \d+ answers of theirs are there"),
        ({"max_people": 2, "max_examples": 9}, r"data.max_examples is 9, but only [2-8] answers of theirs are there"),
    ],
)
def test_more_than_there_is_is_refused(survey, limits, problem) -> None:
    with pytest.raises(DataError, match=f"^{problem}"):
        wvb(survey, **limits)


# Prompts and targets


def test_the_codebook_s_label_is_asked_on_one_line(survey, tokenizer, tmp_path) -> None:
    data = wvb(survey, prompt_style="codebook", questions=["Q1"])
    data = data.save(tmp_path / "prepared")  # labels are kept
    renderer = Renderer(tokenizer, 400, prompt_style="codebook")
    row = data.splits["train"][0]
    text = "Q1\nA. Very good B. Rather good C. Not good\nYou can only choose one option."
    assert conversation(row, renderer) == [{"role": "user", "content": text}]
    section = DataSection(prompt_style="codebook")
    ids = encode_example(row, renderer, data.sentences, section).input_ids
    assert tokenizer.decode(ids).split("<|im_start|>user\n")[1].startswith(text)
    letters = conversation(row, Renderer(tokenizer, 400, prompt_style="letters"))[0]["content"]
    assert letters.startswith("What about Q1?\nA. Very good\nB.")


def test_labels_are_asked_for_where_there_are_none() -> None:
    with pytest.raises(
        DataError, match=r"^data.prompt_style is codebook, but the questions of this data have no short"
    ):
        load_data(DataSection(source="jsonl", path=str(OPINIONS), prompt_style="codebook"))


def test_pairs_of_answers_are_asked_by_label(survey) -> None:
    data = wvb(survey, prompt_style="codebook", kind="preference", questions=["Q56"])
    assert data.splits["train"][0]["prompt"][0]["content"].startswith("Q56\nA. More B. ")


CHAT = [
    {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"},
    {"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "Bye"},
]  # fmt: skip


@pytest.mark.parametrize(
    ("loss_on", "learned"), [("all", "Good day<|im_end|>Yes<|im_end|>"), ("last", "Yes<|im_end|>")]
)
def test_the_last_answer_alone_can_be_learned(tokenizer, loss_on, learned) -> None:
    row, renderer = {"profile": 0, "messages": CHAT}, Renderer(tokenizer, 400)
    example = encode_example(row, renderer, [""], DataSection(loss_on=loss_on))
    assert tokenizer.decode(example.target_token) == learned
    ids = example.input_ids
    assert [ids[position + 1] for position in example.target_position] == example.target_token
    if loss_on == "last":
        ((same, positions),) = renderer.encode_answers(CHAT[:3], ["Yes"], "")
        assert (ids, example.target_position) == (same, positions)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({}, "You are answering for this person: Anna."), ({"profile_prompt": "Be {profile} Always."}, "Be Anna. Always."),
     ({"profile_prompt": "{profile}"}, "Anna.")],
)  # fmt: skip
def test_the_text_around_the_profile_is_the_recipe_s(tokenizer, settings, said) -> None:
    renderer = Renderer.of(tokenizer, DataSection(profile_in_prompt=True, **settings))
    text = tokenizer.decode(renderer.encode_prompt([{"role": "user", "content": "Hi"}], "Anna."))
    assert text.startswith(f"<|im_start|>system\n{said}<|im_end|>")


@pytest.mark.parametrize("text", ["You are somebody.", "{profile} {profile}"])
def test_text_without_a_place_for_the_profile_is_refused(tmp_path, text) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{path: m}}\ndata: {{profile_prompt: '{text}'}}\nadapters: {{method: lora}}\n")
    with pytest.raises(
        ConfigError, match=rf"^{recipe}:2: data: profile_prompt is '{text}'; it must have {{profile}} once"
    ):
        load_config(recipe)


def test_the_draw_costs_nothing_of_what_is_not_drawn(survey) -> None:
    """Counts and people of a row that is drawn in part still belong together."""
    for row in wvb(survey, max_people=100, max_examples=77).splits["train"]:
        assert sum(row["counts"]) == len(row["people"])
        assert np.asarray(row["counts"]).min() >= 0
