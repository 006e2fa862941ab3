"""Training on published shares is training on the answers behind them; a report tells them apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_recipes
from raw_data import write_jsonl
from run_folder import content, make_run
from small_runs import recipe

from cuma_ds.evaluation.run import evaluate
from cuma_ds.evaluation.subject import run_subject
from cuma_ds.parallel.stored import find_checkpoint, read_adapters
from cuma_ds.recipe import load_config
from cuma_ds.runs import Run

OPTIONS = ["Yes", "No", "Maybe"]
COUNTRIES = ("Peru", "Laos", "Chad", "Cuba", "Fiji", "Togo")


def counts() -> dict[tuple[str, int], list[int]]:
    """Answers of six countries to four questions, of 40 to 80 people each; one option that nobody chose."""
    rng = np.random.default_rng(4)
    drawn = {
        (country, question): rng.multinomial(int(rng.integers(40, 80)), rng.dirichlet([1, 1, 1])).tolist()
        for country in COUNTRIES
        for question in range(4)
    }
    drawn["Peru", 0] = [30, 0, 20]
    return drawn


def asked(country: str, question: int) -> dict[str, Any]:
    row = {"profile": {"country": country}, "question": f"Question {question}?", "question_id": f"q{question}"}
    return {**row, "options": OPTIONS}


def tables() -> list[dict[str, Any]]:
    """Shares and the number of people behind them."""
    return [
        {**asked(*cell), "shares": [count / sum(numbers) for count in numbers], "weight": sum(numbers)}
        for cell, numbers in counts().items()
    ]


def answers() -> list[dict[str, Any]]:
    """The same answers one by one, of people who are tested where the distribution is."""
    return [
        {**asked(country, question), "answer": option, "person_id": f"q{question}\0Country: {country}."}
        for (country, question), numbers in counts().items()
        for option, count in enumerate(numbers)
        for _ in range(count)
    ]


@pytest.mark.multirank
def test_training_on_shares_equals_training_on_counts(tmp_path, tiny_llama, tiny_encoder) -> None:
    recipes = {}
    for example_weight in ("uniform", "answers"):
        for name, rows in (("shares", tables()), ("counts", answers())):
            file = write_jsonl(tmp_path / f"{name}.jsonl", rows)
            data = {"path": str(file), "heldout_fraction": 0.0, "example_weight": example_weight}
            training = {"max_grad_norm": 0.5}
            recipes[example_weight, name] = recipe(
                tmp_path, tiny_llama, tiny_encoder, f"{name}-{example_weight}", data=data, training=training
            )
    run_recipes(1, list(recipes.values()))
    trained = {}
    for key, path in recipes.items():
        run = Run(load_config(path).run_dir)
        assert 0 < len(run.data().splits["train"]) < len(counts())
        rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        losses = torch.tensor([row["loss"] for row in rows])
        assert float(losses.std()) > 0
        trained[key] = {**read_adapters(find_checkpoint(run.checkpoints)), "losses": losses}
    for example_weight in ("uniform", "answers"):
        for name, tensor in trained[example_weight, "counts"].items():
            torch.testing.assert_close(trained[example_weight, "shares"][name], tensor, rtol=0, atol=1e-6, msg=name)
    weighed = [trained[example_weight, "shares"]["losses"] for example_weight in ("uniform", "answers")]
    assert not torch.equal(*weighed)


def evaluated(tmp_path: Path, models: tuple[Path, Path], rows: list[dict[str, Any]], **data: Any) -> tuple[dict, str]:
    """The report of a run with random adapters on these rows, and its text."""
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    settings = {"data": {"heldout_fraction": 0, **data}, "evaluation": {"min_answers": 5, "bootstrap": 50}}
    folder, _, _ = make_run(tmp_path / "runs" / "tables", *models, {}, source=file, **settings)
    report = evaluate(run_subject(folder), tmp_path / "evaluation")
    return content(report), (tmp_path / "evaluation" / "report.md").read_text()


def test_a_report_on_distributions_has_the_scores_of_the_answers_behind_them(
    tmp_path, tiny_llama, tiny_encoder
) -> None:
    models = (tiny_llama, tiny_encoder)
    (tmp_path / "shares").mkdir()
    (tmp_path / "counts").mkdir()
    tables_report, text = evaluated(tmp_path / "shares", models, tables())
    answers_report, _ = evaluated(tmp_path / "counts", models, answers())
    found, expected = (report["splits"]["test"] for report in (tables_report, answers_report))
    assert found["distributions"] == len(found["cells"])
    assert (found["people"], found["weighted"]) == (None, False)
    assert "effective_answers" not in found
    assert expected["distributions"] is None
    for contender, scores in expected["rows"].items():
        for name, value in scores.items():
            if name != "interval":
                assert found["rows"][contender][name] == pytest.approx(value, abs=1e-5), (contender, name)
    assert found["answers"] == expected["answers"]
    assert f"{found['distributions']} published distributions, {found['answers']:,} answers;" in text
    assert "bootstrap samples of published distributions." in text
    assert "## Held-out distributions of groups seen in training" in text
    assert "Held-out people" not in text


def test_held_out_questions_are_a_split_of_the_report(tmp_path, tiny_llama, tiny_encoder) -> None:
    rows = [{key: value for key, value in row.items() if key != "person_id"} for row in answers()]
    settings = {"heldout_question_fraction": 0.5, "split_seed": 2}
    report, text = evaluated(tmp_path, (tiny_llama, tiny_encoder), rows, **settings)
    split = report["splits"]["heldout_questions"]
    learned = set(report["splits"]["test"]["questions"])
    assert not learned & set(split["questions"])
    held = {f"q{question}" for question in range(4)} - learned
    assert set(split["questions"]) == held
    total = sum(sum(numbers) for (_, question), numbers in counts().items() if f"q{question}" in held)
    assert split["answers"] == total
    assert "oracle" not in split["rows"]
    for cell in split["cells"]:
        numbers = counts()[cell["group"], int(cell["question_id"][1:])]
        assert cell["observed"] == pytest.approx([count / sum(numbers) for count in numbers], abs=1e-6)
        assert cell["predicted"]["collapse"] == pytest.approx([1 / 3] * 3, abs=1e-6)
    assert "## Questions held out entirely (zero-shot)" in text
    assert "One global distribution has nothing to go by there and is uniform" in text
