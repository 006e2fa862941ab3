"""WVB-probe: a file of the form of the benchmark's samples.tsv, counted again by pandas."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from raw_data import SCALES, adjusted, survey_people, write_benchmark, write_survey

from cuma_ds.config import DataSection
from cuma_ds.data import PreparedData, load_data, prepare
from cuma_ds.errors import DataError

PEOPLE = 200
GIVEN = {"train": range(0, 120), "valid": range(120, 160), "test": range(160, PEOPLE)}
COLUMNS = ["Question", "Question Category", "Continent", "Urban / Rural", "Education", "D_INTERVIEW"]


@pytest.fixture(scope="module")
def people() -> pd.DataFrame:
    return survey_people(PEOPLE, seed=4)


@pytest.fixture(scope="module")
def raw(people, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_benchmark(folder, people, {name: list(rows) for name, rows in GIVEN.items()})
    return folder


def write_samples(file: Path, samples: list[tuple[str, int]]) -> Path:
    """As the benchmark writes it: tabulators, six columns, no answers."""
    rows = [(question, "Economic Values", "Asia", "Urban", "Tertiary", person) for question, person in samples]
    file.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, columns=COLUMNS).to_csv(file, sep="\t", index=False)
    return file


def chosen(people: pd.DataFrame, rows: range, each: int = 9) -> list[tuple[str, int]]:
    """Some people of ``rows`` for each of two questions; some of them gave no answer."""
    return [
        (question, int(person))
        for place, question in enumerate(("Q1", "Q111"))
        for person in people["D_INTERVIEW"].iloc[rows[place : each + place]]
    ]


def section(raw: Path, probe: Path | None, **settings) -> DataSection:
    return DataSection(source="wvb", path=str(raw), probe=None if probe is None else str(probe), **settings)


def answered(people: pd.DataFrame, samples: list[tuple[str, int]]) -> Counter:
    """(question, option) to answers."""
    code = people.set_index("D_INTERVIEW")
    points = [(question, adjusted(question, int(code.loc[person, question]))) for question, person in samples]
    return Counter((question, point - SCALES[question][0]) for question, point in points if point is not None)


def counted(data: PreparedData, name: str) -> Counter:
    found: Counter = Counter()
    for row in data.splits[name]:
        found.update({(row["question_id"], option): count for option, count in enumerate(row["counts"]) if count})
    return found


def test_the_probe_is_a_split_of_the_named_answers(people, raw, tmp_path) -> None:
    samples = chosen(people, GIVEN["valid"])
    data = prepare(section(raw, write_samples(tmp_path / "samples.tsv", samples)), "wvs")
    expected = answered(people, samples)
    assert 0 < sum(expected.values()) < len(samples)
    assert counted(data, "probe") == expected
    assert data.manifest["splits"]["probe"]["answers"] == sum(expected.values())
    assert data.manifest["skipped"]["samples of the probe without an answer"] == len(samples) - sum(expected.values())
    assert data.evaluation_splits == ["test", "probe"]
    # The benchmark's own split of people is as without a probe, and nobody of the probe is trained on.
    without = prepare(section(raw, None), "wvs")
    for name in ("train", "valid", "test"):
        assert data.splits[name].to_list() == without.splits[name].to_list()
    probed = {person for row in data.splits["probe"] for person in row["people"]}
    assert probed <= {person for row in data.splits["valid"] for person in row["people"]}


def test_people_of_the_probe_are_never_trained_on(people, raw, tmp_path) -> None:
    samples = chosen(people, GIVEN["train"])
    data = prepare(section(raw, write_samples(tmp_path / "samples.tsv", samples)), "wvs")
    by_split = {name: {person for row in split for person in row["people"]} for name, split in data.splits.items()}
    assert by_split["probe"]
    assert not by_split["probe"] & by_split["train"]
    assert by_split["probe"] <= by_split["test"]


def test_a_survey_without_a_split_of_its_own_takes_a_probe_too(people, tmp_path) -> None:
    write_survey(tmp_path / "raw", people)
    samples = chosen(people, range(PEOPLE), each=40)
    file = write_samples(tmp_path / "samples.tsv", samples)
    data = prepare(section(tmp_path / "raw", file, test_fraction=0.2), "wvs")
    assert counted(data, "probe") == answered(people, samples)
    by_split = {name: {person for row in split for person in row["people"]} for name, split in data.splits.items()}
    assert not by_split["probe"] & by_split["train"]


def test_samples_of_other_people_and_questions_are_counted(people, raw, tmp_path) -> None:
    samples = [*chosen(people, GIVEN["valid"]), ("Q1", 5), ("Q1", 6)]
    file = write_samples(tmp_path / "samples.tsv", samples)
    skipped = prepare(section(raw, file, questions=("Q1", "Q56")), "wvs").manifest["skipped"]
    assert skipped["samples of the probe whose person is not in the data"] == 2
    assert skipped["samples of the probe whose question is left out"] == 9


def test_a_saved_folder_keeps_its_probe(people, raw, tmp_path) -> None:
    file = write_samples(tmp_path / "samples.tsv", chosen(people, GIVEN["valid"]))
    saved = prepare(section(raw, file), "wvs").save(tmp_path / "prepared")
    loaded = load_data(section(tmp_path / "prepared", None), "wvs")
    assert loaded.splits["probe"].to_list() == saved.splits["probe"].to_list()
    assert load_data(section(tmp_path / "prepared", file), "wvs").evaluation_splits == ["test", "probe"]
    prepare(section(raw, None), "wvs").save(tmp_path / "without")
    with pytest.raises(DataError, match=r"was prepared without a probe, but the recipe says data\.probe"):
        load_data(section(tmp_path / "without", file), "wvs")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.rename(columns={"D_INTERVIEW": "ID"}), "column D_INTERVIEW is missing"),
        (lambda table: table.assign(Question="Q999"), "row 2: there is no question 'Q999'"),
        (lambda table: table.iloc[[0, 1, 1]], "row 4: this person and question have come before"),
        (lambda table: table.assign(D_INTERVIEW=7 + table.index), "none of its 18 samples is of a person in the data"),
        (lambda table: table.assign(D_INTERVIEW="somebody"), "row 2: D_INTERVIEW is 'somebody', which is no number"),
        (lambda table: table.iloc[:0], "holds no samples"),
    ],
)
def test_a_probe_that_does_not_fit_is_one_line(people, raw, tmp_path, change, message) -> None:
    file = write_samples(tmp_path / "samples.tsv", chosen(people, GIVEN["valid"]))
    change(pd.read_csv(file, sep="\t")).to_csv(file, sep="\t", index=False)
    with pytest.raises(DataError) as error:
        prepare(section(raw, file), "wvs")
    assert message in str(error.value)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_probe_needs_its_file_and_its_source(raw, tmp_path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        prepare(section(raw, tmp_path / "nowhere.tsv"), "wvs")
    with pytest.raises(ValueError, match="source jsonl has none; only wvb has"):
        DataSection(source="jsonl", path="x", probe="samples.tsv")
