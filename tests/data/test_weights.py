"""Survey weights: what is read from rows and from the survey's CSV, counted again by pandas alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from raw_data import survey_people, write_benchmark, write_jsonl, write_survey
from run_folder import content, make_run

from cuma_ds.config import DataSection
from cuma_ds.data import PreparedData, load_data
from cuma_ds.data.batch import Batch, collate, encode_example
from cuma_ds.data.rendering import Renderer
from cuma_ds.errors import ConfigError, DataError
from cuma_ds.evaluation.run import evaluate
from cuma_ds.evaluation.subject import run_subject
from cuma_ds.recipe import load_started, make_config

OPTIONS = ["Yes", "No", "Maybe"]
KEYS = ["country", "question", "option"]
OLD_FOLDER = Path(__file__).parents[1] / "data" / "prepared-0.1.0"


def answers(count: int = 120) -> list[dict[str, Any]]:
    """People of three countries; every fifth has no weight."""
    rng = np.random.default_rng(3)
    rows = []
    for person in range(count):
        weight = {} if person % 5 == 0 else {"weight": float(rng.lognormal())}
        for question in ("tea", "bus"):
            country = ["Peru", "Laos", "Chad"][person % 3]
            row = {"profile": {"country": country}, "question": question, "options": OPTIONS}
            rows.append({**row, "answer": int(rng.integers(3)), "person_id": f"p{person}", **weight})
    return rows


def load(path: Path, **settings: Any) -> PreparedData:
    return load_data(DataSection(path=str(path), heldout_fraction=0, **settings), "wvs")


def table(data: PreparedData, names: list[str] | None = None) -> pd.Series:
    """(country, question, option) to count."""
    found = [
        (row["group"], row["question"], option, count)
        for name in names or data.splits
        for row in data.splits[name]
        for option, count in enumerate(row["counts"])
        if count
    ]
    return pd.DataFrame(found, columns=[*KEYS, "count"]).groupby(KEYS)["count"].sum()


def by_hand(rows: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows)
    frame["weight"] = frame["weight"].fillna(1.0)
    frame["weight"] /= frame["weight"].mean()
    return frame.assign(country=[profile["country"] for profile in frame["profile"]], option=frame["answer"])


@pytest.mark.parametrize("workers", [None, 2])
def test_counts_are_sums_of_weights_with_mean_one(tmp_path, workers) -> None:
    from cuma_ds.data import prepare

    section = DataSection(path=str(write_jsonl(tmp_path / "a.jsonl", answers())), heldout_fraction=0, weights=True)
    data = prepare(section, "wvs", workers=workers)
    expected = by_hand(answers())
    pd.testing.assert_series_equal(table(data), expected.groupby(KEYS)["weight"].sum(), check_names=False)
    assert table(data).sum() == pytest.approx(240)
    assert sum(sizes["answers"] for sizes in data.manifest["splits"].values()) == 240
    of_person = expected.groupby("person_id")["weight"].first()
    names = sorted(of_person.index)
    for split in data.splits.values():
        assert split.answers().sum() == len([person for row in split for person in row["people"]])
        for row in split:
            assert row["weights"] == pytest.approx([of_person[names[person]] for person in row["people"]])
            chosen = np.repeat(np.arange(3), row["answers"])
            assert row["counts"] == pytest.approx(np.bincount(chosen, row["weights"], 3).tolist())


def test_a_folder_with_weights_reads_back_and_is_told_apart(tmp_path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", answers())
    data = load(file, weights=True)
    data.save(tmp_path / "prepared")
    again = load(tmp_path / "prepared", weights=True)
    assert list(again.splits) == list(data.splits)
    assert all(again.splits[name].to_list() == split.to_list() for name, split in data.splits.items())
    assert again.splits["train"]["counts"] == [row["counts"] for row in again.splits["train"]]
    assert set(again.splits["train"].column_names) == set(again.splits["train"][0])
    with pytest.raises(DataError, match=r"was prepared with weights True, but the recipe says data\.weights: False"):
        load(tmp_path / "prepared")


def test_old_folders_and_old_recipes_have_no_weights(tmp_path) -> None:
    with pytest.warns(UserWarning, match="0.1.0"):
        assert not load_data(DataSection(path=str(OLD_FOLDER)), "generic").splits["train"].weighted
    with pytest.warns(UserWarning, match="0.1.0"), pytest.raises(DataError, match="was prepared with weights False"):
        load_data(DataSection(path=str(OLD_FOLDER), weights=True), "generic")
    (tmp_path / "config.yaml").write_text("model: {path: m}\nadapters: {method: lora}\n")
    assert not load_started(tmp_path / "config.yaml").data.weights


@pytest.mark.parametrize("weight", [1, 3, 0.1])
def test_equal_weights_are_no_weights(tmp_path, tokenizer, weight) -> None:
    rows = [{**row, "weight": weight} for row in answers()]
    alike = load(write_jsonl(tmp_path / "a.jsonl", rows), weights=True)
    with pytest.warns(UserWarning, match="rows have weights that count nothing, because data.weights is false"):
        plain = load(tmp_path / "a.jsonl")
    pd.testing.assert_series_equal(table(alike), table(plain), check_dtype=False, check_exact=True)

    def batch(data: PreparedData) -> Batch:
        renderer = Renderer(tokenizer, 512)
        return collate(
            [encode_example(row, renderer, data.sentences, DataSection()) for row in data.splits["train"]], 0
        )

    batches = [batch(data) for data in (alike, plain)]
    assert batches[0].targets.weight_L.tolist() == batches[1].targets.weight_L.tolist()
    assert batches[0].input_ids_BS.tolist() == batches[1].input_ids_BS.tolist()


def test_single_answers_keep_their_weights(tmp_path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", answers())
    single = load(file, weights=True, histogram_targets=False, example_weight="answers")
    merged = load(file, weights=True)
    train = single.splits["train"]
    assert all(sum(count > 0 for count in counts) == 1 for counts in train["counts"])
    assert len(train) == merged.manifest["splits"]["train"]["answers"]
    assert [sum(counts) for counts in train["counts"]] == [weight for weights in train["weights"] for weight in weights]
    pd.testing.assert_series_equal(table(single, ["train"]), table(merged, ["train"]))
    with pytest.raises(ValueError, match="set example_weight: answers"):
        DataSection(weights=True, histogram_targets=False)


@pytest.mark.parametrize(
    ("weight", "problem"),
    [
        *((bad, rf"weight is {shown}; allowed: a positive number \(1 where a row has none\)$") for bad, shown in
          ((0, "0"), (-1, "-1"), (True, "True"), ("2", "str"), ([1], "list"))),
        *((bad, "") for bad in (float("nan"), float("inf"))),  # no JSON
    ],
)  # fmt: skip
def test_a_bad_weight_is_told_with_its_place(tmp_path, weight, problem) -> None:
    rows = answers(10)
    rows[4]["weight"] = weight
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=rf"a\.jsonl:5: {problem}") as caught:
        load(tmp_path / "a.jsonl", weights=True)
    assert "\n" not in str(caught.value)


def test_a_bad_weight_in_a_table_is_told_with_its_row(tmp_path) -> None:
    frame = pd.DataFrame(answers(10)).assign(weight=1.0)
    frame.loc[3, "weight"] = np.inf
    frame.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: row 4: weight is inf; allowed: a positive number"):
        load(tmp_path / "a.parquet", weights=True)


def test_weights_where_there_are_none_are_refused_in_one_line(tmp_path) -> None:
    bare = [{key: value for key, value in row.items() if key != "weight"} for row in answers(9)]
    with pytest.raises(DataError, match=r"data\.weights is true, but no row of a\.jsonl has a weight"):
        load(write_jsonl(tmp_path / "a.jsonl", bare), weights=True)
    chat = {"profile": "x", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(
        DataError, match=r"data\.weights is true, but only choice questions have weights, not kind chat"
    ):
        load(write_jsonl(tmp_path / "b.jsonl", [chat, chat]), weights=True)
    far = [{**row, "weight": (1e-200, 1e200)[number % 2]} for number, row in enumerate(bare)]
    with pytest.raises(DataError, match="too far to be added up"):
        load(write_jsonl(tmp_path / "c.jsonl", far), weights=True)
    for source in ("wvs-sample", "prism", "community-alignment"):
        recipe = {"model": {"path": "m"}, "adapters": {"method": "lora"}, "data": {"source": source, "weights": True}}
        with pytest.raises(ConfigError, match=f"source {source} has no survey weights; only jsonl, wvb and survey may"):
            make_config(recipe)


def test_a_report_says_that_answers_are_weighted(tmp_path, tiny_llama, tiny_encoder) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", answers())
    settings = {"data": {"weights": True, "heldout_fraction": 0}, "evaluation": {"min_answers": 2, "bootstrap": 20}}
    folder, _, _ = make_run(tmp_path / "runs" / "weighted", tiny_llama, tiny_encoder, {}, source=file, **settings)
    report = evaluate(run_subject(folder), tmp_path / "evaluation")
    split = content(report)["splits"]["test"]
    expected = by_hand(answers())
    # People are numbered by their sorted ids.
    names = sorted(set(expected["person_id"]))
    tested = {names[person] for row in PreparedData.load(folder / "data").splits["test"] for person in row["people"]}
    test, train = (expected[expected["person_id"].isin(tested) == part] for part in (True, False))
    assert (split["weighted"], split["people"]) == (True, len(tested))
    assert split["answers"] == pytest.approx(test["weight"].sum(), abs=0.01)
    effective = test["weight"].sum() ** 2 / (test["weight"] ** 2).sum()
    assert split["effective_answers"] == pytest.approx(effective, abs=0.01)
    for cell in split["cells"]:
        for part, shares in ((test, cell["observed"]), (train, cell["predicted"]["oracle"])):
            members = part[part["country"] == cell["group"]]
            asked = members["question"] == split["questions"][cell["question_id"]]["question"]
            sums = members[asked].groupby("option")["weight"].sum()
            assert shares == pytest.approx((sums / sums.sum()).reindex(range(3), fill_value=0.0).tolist(), abs=1e-5)
    assert split["rows"]["trained"]["interval"]["accuracy"]
    text = (tmp_path / "evaluation" / "report.md").read_text()
    assert f"{split['answers']:,} answers ({split['effective_answers']:,} effective);" in text
    assert "Answers count by their survey weights" in text


def test_the_command_reads_weights_and_says_so_in_the_recipe(tmp_path, launch) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", answers())
    places = ("--root", str(file), "--out", str(tmp_path / "prepared"))
    done = launch("prepare_data", "jsonl", *places, "--weights", "--heldout-fraction", "0")
    assert done.code == 0
    assert "weights: true" in done.out
    assert load(tmp_path / "prepared", weights=True).splits["train"].weighted


@pytest.fixture
def survey(tmp_path) -> tuple[Path, pd.DataFrame]:
    people = survey_people(150)
    people["W_WEIGHT"] = np.random.default_rng(0).lognormal(size=150)
    write_survey(tmp_path, people)
    return tmp_path, people


def test_the_surveys_weights_are_those_of_its_people(survey) -> None:
    root, people = survey
    data = load(root, source="wvb", weights=True)
    plain = load(root, source="wvb")
    ids = people["D_INTERVIEW"].to_numpy()
    weight_of = dict(zip(ids.tolist(), people["W_WEIGHT"], strict=True))
    # Everybody answers and has a profile here, so that people are numbered as the file names them.
    number = {person: weight_of[int(person_id)] for person, person_id in enumerate(ids)}
    chosen = [person for split in data.splits.values() for row in split for person in row["people"]]
    scale = np.mean([number[person] for person in chosen])
    for name, split in data.splits.items():
        for row, before in zip(split, plain.splits[name], strict=True):
            assert (row["people"], row["answers"]) == (before["people"], before["counts"])
            expected = pd.Series([number[person] / scale for person in row["people"]])
            sums = expected.groupby(np.repeat(np.arange(len(row["answers"])), row["answers"])).sum()
            assert row["counts"] == pytest.approx(sums.reindex(range(len(row["answers"])), fill_value=0.0).tolist())


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (0.0, "W_WEIGHT is 0"),
        (-2.0, "W_WEIGHT is -2"),
        (np.nan, "W_WEIGHT is empty"),
        ("much", "W_WEIGHT is 'much', which is no number"),
    ],
)
def test_a_bad_weight_of_the_survey_is_told_with_its_row(survey, value, problem) -> None:
    root, people = survey
    people = people.astype({"W_WEIGHT": object})
    people.loc[4, "W_WEIGHT"] = value
    write_survey(root, people)
    with pytest.raises(DataError, match=rf"\.csv: row 6: {problem}"):
        load(root, source="wvb", weights=True)


def test_benchmark_files_and_a_survey_without_weights_are_refused(tmp_path) -> None:
    people = survey_people(60)
    (tmp_path / "a").mkdir()
    write_survey(tmp_path / "a", people)
    with pytest.raises(DataError, match=r"\.csv: column W_WEIGHT is missing"):
        load(tmp_path / "a", source="wvb", weights=True)
    write_benchmark(tmp_path / "b", people, {"full": list(range(60))})
    with pytest.raises(DataError, match="the benchmark's files hold no weights; only the WVS-7 CSV has them"):
        load(tmp_path / "b", source="wvb", weights=True)
