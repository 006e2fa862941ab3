"""WorldValuesBench: what is read from the benchmark's files and from the survey's CSV, counted again by pandas."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from raw_data import (
    ADJUSTMENT,
    CHOICES,
    PROFILE,
    SCALES,
    adjusted,
    draw,
    survey_people,
    write_benchmark,
    write_codebook,
    write_survey,
)

from cuma_ds.config import DataSection
from cuma_ds.data import PreparedData, load_data
from cuma_ds.errors import DataError
from cuma_ds.profiles import ProfileTable, linearize

PEOPLE = 240
GIVEN = {"train": range(0, 150), "valid": range(150, 190), "test": range(190, PEOPLE)}
NAMES = ["country", "age", "gender", "education", "marital status", "religion", "ethnicity", "employment"]
SPOKEN = {
    "Early childhood education (ISCED 0) / no education": "Early childhood education or no education",
    "Primary education (ISCED 1)": "Primary education",
    "Bachelor (ISCED 6)": "Bachelor",
    "AL: First group": "First group",
    "AR: White": "White",
    "AR: Light brown": "Light brown",
    "Full time (30 hours a week or more)": "Full time",
}


def load(path: Path, **settings) -> PreparedData:
    return load_data(DataSection(source="wvb", path=str(path), **settings), "wvs")


def sentence(person: pd.Series) -> str:
    texts = {name: CHOICES[column].get(str(person[column])) for column, name in zip(PROFILE, NAMES, strict=True)}
    return linearize({name: SPOKEN.get(text, text) for name, text in texts.items() if text}, "wvs")


def counted(people: pd.DataFrame) -> dict[tuple[str, str, int], int]:
    """(sentence, question, option) to number of people, by a loop over a long table."""
    who = people.apply(sentence, axis=1)
    long = people.assign(who=who).melt("who", list(SCALES), "question", "code")
    long["point"] = [adjusted(question, code) for question, code in zip(long["question"], long["code"], strict=True)]
    long = long.dropna(subset="point")
    long["option"] = [
        int(point) - SCALES[question][0] for question, point in zip(long["question"], long["point"], strict=True)
    ]
    return long.groupby(["who", "question", "option"]).size().to_dict()


def prepared(data: PreparedData, names=None) -> dict[tuple[str, str, int], int]:
    found: dict[tuple[str, str, int], int] = {}
    for name in names or data.splits:
        for row in data.splits[name]:
            for option, count in enumerate(row["counts"]):
                key = (data.sentences[row["profile"]], row["question_id"], option)
                if count:
                    found[key] = found.get(key, 0) + count
    return found


@pytest.fixture(scope="module")
def people() -> pd.DataFrame:
    return survey_people(PEOPLE)


@pytest.fixture(scope="module")
def benchmark(people, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wvb")
    write_benchmark(folder, people, {split: list(rows) for split, rows in GIVEN.items()})
    return folder


@pytest.fixture
def survey(people, tmp_path) -> Path:
    write_survey(tmp_path / "raw", people)
    return tmp_path / "raw"


def test_every_answer_of_the_survey_is_counted_once(people, survey):
    assert prepared(load(survey)) == counted(people)


def test_the_benchmarks_files_give_the_same_answers_and_keep_its_people_apart(people, benchmark):
    data = load(benchmark, heldout_fraction=0)
    for split, rows in GIVEN.items():
        expected = counted(people.iloc[list(rows)])
        assert prepared(data, [split]) == expected
        sizes = data.manifest["splits"][split]
        assert sizes["answers"] == sum(expected.values())
        assert sizes["examples"] == len({key[:2] for key in expected}) == len(data.splits[split])
        assert sizes["people"] == len(rows)
        assert sizes["profiles"] == people.iloc[list(rows)].apply(sentence, axis=1).nunique()


def test_whole_files_are_split_by_us(people, tmp_path):
    write_benchmark(tmp_path, people, {"full": list(range(PEOPLE))})
    data = load(tmp_path, heldout_fraction=0, test_fraction=0.25)
    assert set(data.splits) == {"train", "test", "heldout"}
    assert data.manifest["splits"]["test"]["people"] == sum(
        draw(0, "person", number) < 0.25 for number in people["D_INTERVIEW"]
    )
    assert prepared(data) == counted(people)


def test_options_are_the_scale_in_its_order(benchmark):
    questions = {row["question_id"]: row for row in load(benchmark).splits["train"]}
    assert questions["Q1"]["options"] == ["Very good", "Rather good", "Not good"]
    assert questions["Q56"]["options"] == ["More", "The same", "Less"]
    assert questions["Q111"]["options"] == ["Trees", "Roads"]
    assert questions["Q241"]["options"] == ["Not needed", "2", "3", "Needed"]
    assert questions["Q56"]["question"] == "What about Q56?"
    assert {question["scale"] for question in questions.values()} == {"ordinal"}


def test_the_benchmarks_metadata_says_which_questions_have_no_order(people, tmp_path):
    write_benchmark(tmp_path, people, {"full": list(range(PEOPLE))})
    file = tmp_path / "dataset_construction" / "question_metadata.json"
    metadata = json.loads(file.read_text())
    metadata["Q111"]["answer_data_type"] = "non_ordinal"
    file.write_text(json.dumps(metadata))
    scales = {row["question_id"]: row["scale"] for row in load(tmp_path).splits["train"]}
    assert scales == {"Q1": "ordinal", "Q56": "ordinal", "Q111": "nominal", "Q241": "ordinal"}


@pytest.mark.parametrize("seed", range(3))
def test_held_out_countries_and_profiles_are_seen_nowhere_else(benchmark, seed):
    data = load(benchmark, heldout_fraction=0.3, heldout_profile_fraction=0.2, split_seed=seed)
    profiles = {name: set(split["profile"]) for name, split in data.splits.items()}
    countries = {name: set(split["group"]) for name, split in data.splits.items()}
    names = set().union(*countries.values())
    assert countries["heldout"] == {name for name in names if draw(seed, "unit", name) < 0.3} != set()
    for name in ("train", "valid", "test", "heldout_profiles"):
        assert profiles[name], name
        assert not countries["heldout"] & countries[name]
    others = set().union(*profiles.values()) - profiles["heldout"]
    assert profiles["heldout_profiles"] == {
        profile for profile in others if draw(seed, "profile", data.sentences[profile]) < 0.2
    }
    for name in ("train", "valid", "test", "heldout"):
        assert not profiles["heldout_profiles"] & profiles[name]
    assert sum(sizes["people"] for sizes in data.manifest["splits"].values()) == PEOPLE
    assert data.evaluation_splits == ["test", "heldout", "heldout_profiles"]


def test_a_prepared_folder_trains_and_is_told_apart_from_other_settings(benchmark, tmp_path):
    section = DataSection(source="wvb", path=str(benchmark), heldout_fraction=0.2)
    load_data(section, "wvs").save(tmp_path / "out")
    folder = section.model_copy(update={"path": str(tmp_path / "out")})
    again = load_data(folder, "wvs")
    assert prepared(again) == prepared(load_data(section, "wvs"))
    single = load_data(folder.model_copy(update={"histogram_targets": False}), "wvs")
    assert len(single.splits["train"]) == again.manifest["splits"]["train"]["answers"]
    assert prepared(single) == prepared(again)
    with pytest.raises(DataError, match=r"prepared with source wvb, but the recipe says data\.source: prism"):
        load_data(folder.model_copy(update={"source": "prism"}), "wvs")


def test_questions_can_be_chosen(benchmark):
    assert set(load(benchmark, questions=("Q56",)).splits["train"]["question_id"]) == {"Q56"}
    with pytest.raises(DataError, match=r"there is no question 'Q65'.*did you mean 'Q56'"):
        load(benchmark, questions=("Q65",))


def test_people_without_answers_or_profile_are_left_out_and_counted(people, tmp_path):
    people = people.copy()
    people.loc[:2, list(SCALES)] = -2
    people.loc[5, PROFILE] = -1
    write_survey(tmp_path, people)
    data = load(tmp_path)
    assert data.manifest["skipped"] == {"people without any answer": 3, "people of whom nothing is known": 1}
    assert sum(sizes["people"] for sizes in data.manifest["splits"].values()) == PEOPLE - 4
    people[list(SCALES)] = -4
    write_survey(tmp_path / "nobody", people)
    with pytest.raises(DataError, match="nothing is left of 240 people: 240 people without any answer"):
        load(tmp_path / "nobody")


@pytest.mark.parametrize(("separator", "encoding"), [(";", "utf-8"), ("\t", "utf-8-sig"), (",", "utf-8-sig")])
def test_a_survey_saved_in_another_way_is_the_same(people, survey, separator, encoding):
    """Also with labels in place of codes in the columns that say who somebody is."""
    file = next(survey.glob("*.csv"))
    frame = pd.read_csv(file, dtype=str)
    for column in PROFILE:
        frame[column] = frame[column].map(lambda code, column=column: CHOICES[column].get(code, code))
    frame.to_csv(file, sep=separator, encoding=encoding, index=False)
    assert prepared(load(survey)) == counted(people)


def test_a_survey_in_utf_16_is_told_how_to_convert(survey):
    file = next(survey.glob("*.csv"))
    file.write_text(file.read_text(encoding="utf-8"), encoding="utf-16")
    with pytest.raises(
        DataError, match=r"\.csv: not UTF-8 text; save it as UTF-8, e\.g\. with iconv -f UTF-16 -t UTF-8 FILE > NEW"
    ):
        load(survey)


def test_the_interview_number_used_twice_by_the_survey_is_left_out(people, tmp_path):
    people = people.copy()
    people.loc[[3, 8], "D_INTERVIEW"] = 858069901
    write_survey(tmp_path, people)
    assert prepared(load(tmp_path)) == counted(people.drop([3, 8]))


def change(file: Path, edit) -> None:
    separator = "\t" if file.suffix == ".tsv" else ","
    frame = pd.read_csv(file, sep=separator, dtype=str)
    edit(frame).to_csv(file, sep=separator, index=False)


def set_cell(column, value):
    def edit(frame):
        frame.loc[4, column] = value
        return frame

    return edit


BAD_SURVEYS = {
    "value column": (
        lambda frame: frame.drop(columns=["Q56", "Q1"]),
        r"\.csv: column Q1, Q56 is missing; the file has 13 columns",
    ),
    "profile column": (lambda frame: frame.drop(columns="Q289"), r"\.csv: column Q289 is missing"),
    "value code": (
        set_cell("Q56", "7"),
        r"\.csv: row 6: Q56 is 7; codes the codebook knows: 1, 2, 3, and negative ones",
    ),
    "broken number": (set_cell("Q56", "1.5"), r"\.csv: row 6: Q56 is 1\.5"),
    "label": (
        set_cell("Q56", "often"),
        r"\.csv: row 6: Q56 is 'often', which is no number; save the codes, not their labels",
    ),
    "decimal comma": (
        set_cell("Q56", "1,0"),
        r"\.csv: row 6: Q56 is '1,0', which is no number; save numbers with a decimal point",
    ),
    "labels in the header": (
        lambda frame: frame.rename(columns={"Q56": "Standard of living"}),
        r"\.csv: column Q56 is missing; .*the names of the variables, not their labels",
    ),
    "profile code": (set_cell("Q289", "77"), r"\.csv: Q289 is '77', which codebook\.json does not know"),
    "twice": (set_cell("D_INTERVIEW", "10003"), r"\.csv: D_INTERVIEW 10003 comes more than once"),
    "nobody": (lambda frame: frame.iloc[:0], r"\.csv holds no people"),
    "no id": (set_cell("D_INTERVIEW", ""), r"\.csv: D_INTERVIEW is empty in 1 rows"),
}


@pytest.mark.parametrize(("edit", "problem"), BAD_SURVEYS.values(), ids=BAD_SURVEYS.keys())
def test_a_bad_survey_is_told_in_one_line(survey, edit, problem):
    change(next(survey.glob("*.csv")), edit)
    with pytest.raises(DataError, match=problem) as caught:
        load(survey)
    assert "\n" not in str(caught.value)


def test_bad_benchmark_folders_are_told_in_one_line(people, tmp_path):
    write_benchmark(tmp_path, people, {split: list(rows) for split, rows in GIVEN.items()})
    value = tmp_path / "train" / "train_value_qa.tsv"
    good = value.read_bytes()
    change(value, set_cell("D_INTERVIEW", "77"))
    with pytest.raises(DataError, match=r"train_value_qa\.tsv: D_INTERVIEW 77 is not in train_demographic_qa\.tsv"):
        load(tmp_path)
    change(value, set_cell("Q1", "4"))
    value.write_bytes(good)
    change(value, set_cell("Q1", "4"))
    with pytest.raises(DataError, match=r"train_value_qa\.tsv: row 6: Q1 is 4; codes the codebook knows: 1, 2, 3"):
        load(tmp_path)
    value.write_bytes(good)
    who = tmp_path / "test" / "test_demographic_qa.tsv"
    content = who.read_text(encoding="utf-8")
    who.write_bytes(content.replace("Albania", "Albanía").encode("latin-1"))
    with pytest.raises(DataError, match=r"test_demographic_qa\.tsv: not UTF-8 text; save it as UTF-8, e.g. with iconv"):
        load(tmp_path)
    who.write_text(content.replace("Albania", "Atlantis"), encoding="utf-8")
    with pytest.raises(DataError, match=r"B_COUNTRY is 'Atlantis', which codebook\.json does not know"):
        load(tmp_path)
    who.unlink()
    with pytest.raises(
        DataError, match=r"test_demographic_qa\.tsv is missing; the benchmark's train, valid and test files belong"
    ):
        load(tmp_path)
    (tmp_path / "dataset_construction" / "codebook.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"codebook\.json is not JSON"):
        load(tmp_path)
    (tmp_path / "dataset_construction" / "codebook.json").unlink()
    with pytest.raises(
        DataError, match=r"codebook\.json is missing in .*dataset_construction/ of the benchmark's public repository"
    ):
        load(tmp_path)
    with pytest.raises(DataError, match="there is no data at"):
        load(tmp_path / "absent")
    write_codebook(tmp_path / "alone")
    with pytest.raises(DataError, match=r"holds neither the benchmark's .*nor one WVS-7 CSV \(0 CSV files\)"):
        load(tmp_path / "alone")


def test_one_person_in_two_splits_is_refused(people, tmp_path):
    write_benchmark(
        tmp_path, people, {"train": list(range(150)), "valid": list(range(149, 190)), "test": list(range(190, PEOPLE))}
    )
    with pytest.raises(DataError, match=f"D_INTERVIEW {people['D_INTERVIEW'][149]} comes more than once"):
        load(tmp_path)


def test_a_codebook_that_does_not_fit_its_scale_is_refused(people, tmp_path):
    write_survey(tmp_path, people)
    file = tmp_path / "answer_adjustment.json"
    file.write_text(json.dumps({**ADJUSTMENT, "Q56": {"3": "9"}}))
    with pytest.raises(DataError, match="code 3 of Q56 means 9, outside its scale 1 to 3"):
        load(tmp_path)
    file.write_text(json.dumps({**ADJUSTMENT, "Q56": {"3": "2"}}))
    with pytest.raises(DataError, match=r"Q56 has no option for \[3\]"):
        load(tmp_path)


def test_the_command_prepares_embeds_and_writes_the_line_for_the_recipe(benchmark, tmp_path, tiny_encoder, launch):
    out = tmp_path / "new" / "wvb"
    options = ("--heldout-fraction", "0.3", "--questions", "Q1", "Q56", "--cache-dir", str(tmp_path / "cache"))
    done = launch(
        "prepare_data", "wvb", "--root", str(benchmark), "--out", str(out), "--encoder", str(tiny_encoder), *options
    )
    assert done.code == 0, done.err
    line = f"in a recipe: data: {{source: wvb, path: {out}, questions: [Q1, Q56], heldout_fraction: 0.3}}"
    assert line in done.out.replace("\n", "")
    assert [file.name for file in out.parent.iterdir()] == ["wvb"]
    section = yaml.safe_load(line.removeprefix("in a recipe: "))["data"]
    data = load_data(DataSection(**section), "wvs")
    assert prepared(data) == prepared(load(benchmark, questions=("Q1", "Q56"), heldout_fraction=0.3))
    table = ProfileTable.load(out / "profiles.safetensors")
    assert table.sentences == data.sentences
    assert len(set(table.sentences)) == len(table.embeddings)


@pytest.mark.parametrize(
    "moment", ["cuma_ds.data.sources.worldvaluesbench.question_file", "cuma_ds.data.prepared.file_sha256", "os.replace"]
)
def test_a_command_that_stops_midway_leaves_nothing(benchmark, tmp_path, launch, monkeypatch, moment):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(moment, stop)
    done = launch("prepare_data", "wvb", "--root", str(benchmark), "--out", str(tmp_path / "deep" / "wvb"))
    assert done.code == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(
    "CUMA_WVB_CODEBOOK" not in os.environ, reason="CUMA_WVB_CODEBOOK names no folder with the benchmark's JSON files"
)
def test_the_real_codebook_is_understood(tmp_path):
    """239 questions, and counts as pandas finds them in files made from the real codebook."""
    import sys

    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from make_wvb import make

    make(Path(os.environ["CUMA_WVB_CODEBOOK"]), tmp_path / "raw", people=400)
    data = load(tmp_path / "raw", heldout_fraction=0)
    for split in ("train", "valid", "test"):
        value = pd.read_csv(tmp_path / "raw" / split / f"{split}_value_qa.tsv", sep="\t").set_index("D_INTERVIEW")
        assert value.shape[1] == 239
        scales = json.loads((tmp_path / "raw" / "dataset_construction" / "question_metadata.json").read_text())
        totals: dict[str, np.ndarray] = {}
        for row in data.splits[split]:
            totals[row["question_id"]] = totals.get(row["question_id"], 0) + np.array(row["counts"])
        assert data.manifest["splits"][split]["answers"] == value.notna().sum().sum()
        for name in value.columns:
            low, high = scales[name]["answer_scale_min"], scales[name]["answer_scale_max"]
            expected = value[name].value_counts().reindex(range(low, high + 1), fill_value=0)
            assert totals[name].tolist() == expected.tolist(), name
