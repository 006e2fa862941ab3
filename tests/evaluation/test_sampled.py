"""A report on a sample of people says so, and is that of the people who were drawn."""

from pathlib import Path

import numpy as np
import pytest
from raw_data import SCALES, survey_people, write_benchmark
from run_folder import OPINIONS, content, make_run

from cuma_ds.config import DataSection
from cuma_ds.data import prepare
from cuma_ds.data.prepared import PreparedData
from cuma_ds.data.sampling import Limits, sample
from cuma_ds.errors import ConfigError
from cuma_ds.evaluation.predictions import read_predictions
from cuma_ds.evaluation.report.model import read_report
from cuma_ds.evaluation.run import evaluate, evaluate_run
from cuma_ds.evaluation.subject import subject
from cuma_ds.inference.open import open_model


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama, tiny_encoder) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one"
    settings = {"min_answers": 2, "bootstrap": 5}
    make_run(folder, tiny_llama, tiny_encoder, {}, source=OPINIONS, evaluation=settings)
    return folder


def test_only_drawn_people_are_asked_and_the_report_says_so(run) -> None:
    whole = evaluate_run(run)
    assert "sample" not in content(whole)["splits"]["test"]
    kept = sample(PreparedData.load(run / "data").splits["test"], Limits(people=5, examples=8, seed=3))
    limits = ["evaluation.max_people=5", "evaluation.max_examples=8", "evaluation.sample_seed=3"]
    report = evaluate_run(run, overrides=limits)
    of_people, of_answers = whole.splits["test"].people, whole.splits["test"].answers
    assert content(report)["splits"]["test"]["sample"] == {
        "people": kept.people, "of_people": of_people, "answers": 8, "of_answers": of_answers, "seed": 3,
    }  # fmt: skip
    assert report.splits["test"].answers == 8
    predicted = read_predictions(run / "evaluation")["test"]
    assert [people.tolist() for people in predicted.people] == kept.split["people"]
    assert read_report(run / "evaluation") == report
    text = (run / "evaluation" / "report.md").read_text()
    assert f"Sample (seed 3): {kept.people} of {of_people} people, 8 of {of_answers} answers." in text


def test_a_sample_larger_than_the_split_is_the_split(run) -> None:
    report = evaluate_run(run, overrides=["evaluation.max_people=100000"])
    assert "sample" not in content(report)["splits"]["test"]


def test_a_sample_of_nobody_is_refused(run) -> None:
    with pytest.raises(ConfigError, match="max_people"):
        evaluate_run(run, overrides=["evaluation.max_people=0"])


def test_the_probe_is_evaluated_whole_by_its_questions(tmp_path, tiny_llama) -> None:
    """With five people of each kind no group has enough answers, so that only questions have distances."""
    people = survey_people(80, seed=6)
    write_benchmark(
        tmp_path / "raw", people, {"train": [*range(40)], "valid": [*range(40, 70)], "test": [*range(70, 80)]}
    )
    samples = [f"{question}\t{person}" for question in SCALES for person in people["D_INTERVIEW"].iloc[40:60]]
    (tmp_path / "samples.tsv").write_text("\n".join(["Question\tD_INTERVIEW", *samples]) + "\n")
    section = DataSection(source="wvb", path=str(tmp_path / "raw"), probe=str(tmp_path / "samples.tsv"))
    prepared = prepare(section, "wvs").save(tmp_path / "prepared")
    limits = ["evaluation.max_people=4", "evaluation.bootstrap=5"]
    model = subject(open_model(str(tiny_llama), limits), tmp_path / "prepared")
    report = evaluate(model, tmp_path / "report")
    assert list(report.splits) == ["test", "probe"]
    assert report.splits["test"].sample.people == 4
    probe = report.splits["probe"]
    assert "sample" not in content(report)["splits"]["probe"]
    assert probe.answers == prepared.manifest["splits"]["probe"]["answers"]
    assert probe.rows["before"].emd is None
    distances = [question.rows["before"].emd_questions for question in probe.questions.values()]
    assert len(distances) == len(SCALES)
    assert probe.rows["before"].questions_median == pytest.approx(float(np.median(distances)), abs=1e-6)
    assert probe.floor["sampler"].emd_questions > probe.floor["truth"].emd_questions > 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "## WVB-probe" in text
    assert "noise floor: a perfect sampler" in text
