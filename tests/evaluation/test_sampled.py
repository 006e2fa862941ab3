"""A report on a sample of people says so, and is that of the people who were drawn."""

from pathlib import Path

import pytest
from run_folder import OPINIONS, content, make_run

from cuma_ds.data.prepared import PreparedData
from cuma_ds.data.sampling import Limits, sample
from cuma_ds.errors import ConfigError
from cuma_ds.evaluation.predictions import read_predictions
from cuma_ds.evaluation.report.model import read_report
from cuma_ds.evaluation.run import evaluate_run


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
