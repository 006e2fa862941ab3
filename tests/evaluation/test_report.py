"""What a report leaves for programs: report.json and predictions.npz."""

import json
from pathlib import Path

import numpy as np
import pytest
from run_folder import OPINIONS, content, make_run

from cuma_ds.data.prepared import PreparedData
from cuma_ds.errors import CheckpointError, ConfigError, DataError
from cuma_ds.evaluation.predictions import read_predictions
from cuma_ds.evaluation.report import plots
from cuma_ds.evaluation.report.model import ChoiceReport, read_report
from cuma_ds.evaluation.run import Scope, evaluate, evaluate_run
from cuma_ds.evaluation.scores import Scorer
from cuma_ds.evaluation.subject import run_subject
from cuma_ds.locks import locked
from cuma_ds.recipe import load_started

GOLDEN = Path(__file__).parents[1] / "golden" / "0.1.0" / "run" / "evaluation"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama, tiny_encoder) -> Path:
    settings = {"min_answers": 2, "bootstrap": 10}
    folder = tmp_path_factory.mktemp("runs") / "one"
    make_run(folder, tiny_llama, tiny_encoder, {}, source=OPINIONS, evaluation=settings)
    return folder


@pytest.fixture(scope="module")
def report(run) -> ChoiceReport:
    return evaluate_run(run)


def test_a_report_is_read_as_it_was_written(run, report) -> None:
    read = read_report(run / "evaluation")
    assert read == report
    assert content(read) == json.loads((run / "evaluation" / "report.json").read_text())
    assert read_report(run / "data") is None


def test_a_report_has_every_key_that_0_1_0_wrote(report) -> None:
    def keys(value, place=""):
        if isinstance(value, dict):
            return {place} | {key for name, inner in value.items() for key in keys(inner, f"{place}.{name}")}
        if isinstance(value, list):
            return {place} | {key for inner in value for key in keys(inner, f"{place}[]")}
        return {place}

    before = keys(json.loads((GOLDEN / "report.json").read_text()))
    now = keys(content(report))
    splits = (".splits.test", ".splits.heldout")
    general = {key for key in before if not key.startswith(splits)}
    assert {key for key in general if not key.startswith(".routing.information.fields.")} <= now
    for name in ("people", "groups", "answers", "compared.cells", "rows.trained.interval.emd[]", "cells[].emd.trained"):
        assert {f"{split}.{name}" for split in splits} <= before & now


def test_a_report_of_0_1_0_is_read_by_attribute() -> None:
    values = json.loads((GOLDEN / "report.json").read_text())
    report = read_report(GOLDEN)
    assert content(report) == values
    assert report.splits["test"].rows["trained"].emd == values["splits"]["test"]["rows"]["trained"]["emd"]
    assert report.splits["test"].distance == "EMD"
    assert report.splits["test"].letter_mass == {}
    with pytest.raises(DataError, match="has report format 2, not 3"):
        read_report(GOLDEN, earlier=False)


def broken(values: dict, place: str) -> dict:
    *path, last = place.split(".")
    inner = values
    for key in path:
        inner = inner[key]
    inner[last] = "?"
    return values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: [], "has report format None, not 3"),
        (lambda values: {**values, "format_version": 99}, "has report format 99, not 3"),
        (lambda values: {key: value for key, value in values.items() if key != "main"}, "lacks main;"),
        (lambda values: {**values, "kind": "poem"}, "holds something else at kind:"),
        (lambda values: broken(values, "splits.test"), "holds something else at splits.test:"),
        (lambda values: broken(values, "splits.test.rows.trained.emd"), "at splits.test.rows.trained.emd:"),
        (lambda values: broken(values, "routing.routers"), "holds something else at routing.routers:"),
    ],
)
def test_a_broken_or_foreign_report_is_one_line(change, message, run, report, tmp_path) -> None:
    values = json.loads((run / "evaluation" / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps(change(values)))
    with pytest.raises(DataError) as error:
        read_report(tmp_path)
    assert message in str(error.value)
    assert str(error.value).startswith("report.json ")
    assert str(error.value).endswith("; evaluate again with launchers/evaluate.py")
    assert "\n" not in str(error.value)


def test_scores_follow_from_the_predictions_beside_the_report(run, report) -> None:
    kept, data = read_predictions(run / "evaluation"), PreparedData.load(run / "data")
    assert list(kept) == ["test", "heldout"]
    for name, split in kept.items():
        rows = data.splits[name]
        assert split.questions == rows["question_id"]
        assert [people.tolist() for people in split.people] == rows["people"]
        assert len(set(split.ids)) == len(rows)
        assert list(split.predicted) == list(report.splits[name].rows)
        for example, counts in enumerate(rows["counts"]):
            assert split.counts_MN[example, : len(counts)].tolist() == counts
            assert np.isnan(split.counts_MN[example, len(counts) :]).all()
        answers_MN = np.nan_to_num(split.counts_MN)
        for contender, predicted_MN in split.predicted.items():
            assert np.nansum(predicted_MN, axis=1) == pytest.approx(1, abs=1e-5)
            top_MN = predicted_MN == np.nanmax(predicted_MN, axis=1, keepdims=True)
            right = (answers_MN * top_MN / top_MN.sum(axis=1, keepdims=True)).sum() / answers_MN.sum()
            assert report.splits[name].rows[contender].accuracy == pytest.approx(right, abs=1e-6)


def test_examples_have_the_same_ids_in_every_run_on_the_same_data(run, report, tmp_path, tiny_llama, tiny_encoder):
    settings = {"min_answers": 2, "bootstrap": 0}
    folder, data = tmp_path / "other", {"test_fraction": 0.5, "split_seed": 3}
    make_run(folder, tiny_llama, tiny_encoder, {}, source=OPINIONS, evaluation=settings, data=data)
    evaluate_run(folder)
    known = []
    for place in (run, folder):
        splits = read_predictions(place / "evaluation").values()
        asked = [
            (key, question, *who)
            for s in splits
            for key, question, who in zip(s.ids, s.questions, s.people, strict=True)
        ]
        known.append({key: rest for key, *rest in asked})
    common = known[0].keys() & known[1].keys()
    assert 0 < len(common) < len(known[0])
    assert {key: known[0][key] for key in common} == {key: known[1][key] for key in common}
    assert {tuple(rest) for rest in known[0].values()} & {tuple(rest) for rest in known[1].values()} == {
        tuple(known[0][key]) for key in common
    }


def test_all_scores_and_intervals_follow_from_the_predictions_alone(run, report) -> None:
    settings = load_started(run / "config.yaml").evaluation
    for name, split in read_predictions(run / "evaluation").items():
        scorer = Scorer(split.examples(), {}, settings.min_answers, settings.min_subgroup)
        again = scorer.scores({who: split.of(who) for who in split.predicted}, settings.bootstrap)
        known = report.splits[name]
        for who, scores in again.rows.items():
            for metric in scores.keys() - {"inequity"}:  # needs the fields of profiles
                assert scores[metric].value == pytest.approx(getattr(known.rows[who], metric), abs=2e-5), metric
                if scores[metric].interval is not None:
                    assert scores[metric].interval == pytest.approx(known.rows[who].interval[metric], abs=1e-4), metric
        assert (scorer.answers.people, len(scorer.cells.keys)) == (known.people, known.compared.cells)


def test_only_the_splits_that_were_asked_for(tmp_path, tiny_llama, tiny_encoder) -> None:
    data = {"valid_fraction": 0.2}
    folder = tmp_path / "one"
    make_run(folder, tiny_llama, tiny_encoder, {}, evaluation={"min_answers": 2, "bootstrap": 0}, data=data)
    assert list(evaluate(run_subject(folder), tmp_path / "all").splits) == ["test", "heldout"]
    chosen = evaluate(run_subject(folder), tmp_path / "valid", scope=Scope(["valid"], brief=True))
    assert list(chosen.splits) == ["valid"]
    assert set(read_predictions(tmp_path / "valid")) == {"valid"}
    assert set(chosen.splits["valid"].rows) == {"collapse", "oracle", "nearest", "trained"}
    assert {file.name for file in (tmp_path / "valid").iterdir()} == {
        "report.json",
        "report.html",
        "report.md",
        "predictions.npz",
    }
    assert "## People held out for choosing settings" in (tmp_path / "valid" / "report.md").read_text()
    with pytest.raises(ConfigError, match=r"--splits heldout_profiles: there is nobody .*; this data has valid, test"):
        evaluate(run_subject(folder), tmp_path / "none", scope=Scope(["heldout_profiles"]))


@pytest.mark.parametrize("damaged", [b"", b"PK\x03\x04", None])
def test_damaged_predictions_are_one_line(damaged, tmp_path) -> None:
    if damaged is not None:
        (tmp_path / "predictions.npz").write_bytes(damaged)
    with pytest.raises(DataError, match=r"predictions.npz cannot be read .*; evaluate again"):
        read_predictions(tmp_path)


def test_a_picture_that_cannot_be_drawn_costs_no_number(run, report, tmp_path, monkeypatch) -> None:
    """The numbers are on the disk before the first picture is drawn, and a warning names what is missing."""
    written = []
    draw = plots._write

    def fails_once(figure, path: Path) -> None:
        written.append(sorted(file.name for file in tmp_path.glob("*.[jn]*")))
        if path.name == "expert-load.png":
            raise ValueError("no such font")
        draw(figure, path)

    monkeypatch.setattr(plots, "_write", fails_once)
    with pytest.warns(UserWarning, match=r"expert-load\.png could not be drawn: no such font"):
        found = evaluate(run_subject(run), tmp_path)
    assert all(names == ["predictions.npz", "report.json"] for names in written)
    assert set(report.pictures) - set(found.pictures) == {"expert-load.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == set(found.pictures)
    assert found.splits == report.splits


def test_two_evaluations_do_not_write_into_one_folder(run, tmp_path) -> None:
    with locked(tmp_path), pytest.raises(CheckpointError, match="is in use by process"):
        evaluate(run_subject(run), tmp_path)
