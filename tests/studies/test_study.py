"""A STUDY.yaml: what it means, and one line for every mistake in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cuma_ds.errors import ConfigError
from cuma_ds.recipe import load_config
from cuma_ds.studies.study import Task, load_study, run_config
from cuma_ds.studies.tuning import at_edge, best_rate, next_rate

BASE = {
    "name": "small",
    "recipes": {"survey": {"config": ["recipe.yaml"]}},
    "methods": {"cuma": {}, "lora": {"set": ["adapters.method=lora", "adapters.num_experts=1", "adapters.top_k=1"]}},
    "budgets": [4],
    "tuning": {"learning_rates": [0.001, 0.003]},
}


def study(folder: Path, **changes: object) -> Path:
    recipe = {
        "model": {"path": "m"},
        "profiles": {"encoder": "e"},
        "data": {"path": "d.jsonl", "valid_fraction": 0.2},
        "training": {"global_batch_size": 4},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    values = {**BASE, "recipes": {"survey": {"config": [str(folder / "recipe.yaml")]}}, **changes}
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return file


def test_a_run_is_recipe_then_method_then_what_the_study_decides(tmp_path) -> None:
    read = load_study(study(tmp_path, methods={"lora": {"set": ["adapters.method=lora", "training.warmup_steps=1"]}}))
    task = Task("survey", "lora", 4, 7, 0.003)
    config = run_config(read, task)
    assert (config.adapters.method, config.training.warmup_steps, config.training.global_batch_size) == ("lora", 1, 4)
    assert (config.training.steps, config.training.learning_rate, config.run.seed) == (4, 0.003, 7)
    assert str(config.run_dir) == "studies/small/runs/survey.lora.4-steps.lr-0.003.seed-7"


# What is changed, and what the line says.
MISTAKES = {
    "unknown key": (
        {"method": {}},
        "study.yaml:3: unknown key 'method' (did you mean 'methods'?); a study allows: name",
    ),
    "unknown key of a method": (
        {"methods": {"cuma": {"sets": []}}},
        "unknown key 'methods.cuma.sets' (did you mean 'set'?); methods.cuma allows: config, set, learning_rates",
    ),
    "missing": ({"budgets": None}, "key 'budgets' is missing"),
    "unknown method": (
        {"methods": {"moe": {"set": ["adapters.method=moe"]}}},
        "with method 'moe', 4 steps: --set adap",
    ),
    "unknown key of a recipe": ({"methods": {"a": {"set": ["adapters.rank=4"]}}}, "unknown key 'adapters.rank'"),
    "unknown main": ({"main": "dora"}, "main is 'dora', but the methods are cuma, lora"),
    "no file": ({"recipes": {"survey": {}}}, "names no recipe file; add config to one of them"),
    "a file that is not there": ({"recipes": {"s": {"config": ["nowhere"]}}}, "cannot read the recipe nowhere"),
    "a negative rate": ({"tuning": {"learning_rates": [0.1, -1]}}, "each must be a different number above 0"),
    "a grid of one": ({"tuning": {"learning_rates": [0.1]}}, "the grid of cuma has one learning rate"),
    "nothing that chooses": (
        {"tuning": None, "methods": {"cuma": {"learning_rates": [0.1, 0.2]}}},
        "methods.cuma has 2 learning rates, but nothing chooses one; add tuning",
    ),
    "twice the same seed": ({"seeds": [1, 1]}, "seeds are [1, 1]; each must be a different number from 0 on"),
    "no budget": ({"budgets": []}, "budgets is []: Tuple should have at least 1 item"),
    "warm-up beyond the budget": (
        {"methods": {"cuma": {"set": ["training.warmup_steps=9"]}}},
        "warmup_steps is 9 but steps is 4",
    ),
    "expert parallelism": (
        {"methods": {"cuma": {"set": ["parallel.ep_size=2"]}}},
        "parallel.ep_size 2 does not divide the study's 1 ranks",
    ),
    "nobody to choose on": (
        {"methods": {"cuma": {"set": ["data.valid_fraction=0"]}}},
        "chosen on the split valid, but data.valid_fraction is 0",
    ),
    "a name with a space": ({"methods": {"my method": {}}}, "'my method' is no name; letters, digits, _ and - are all"),
    "no mapping": ({"recipes": ["a"]}, "recipes is ['a']: Input should be a valid dictionary"),
}


@pytest.mark.parametrize(("changes", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_that_names_the_file(changes, message, tmp_path) -> None:
    file = study(tmp_path, **changes)
    with pytest.raises(ConfigError) as error:
        load_study(file)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{file}:")
    assert "\n" not in str(error.value)


def test_broken_yaml_and_a_missing_file_are_one_line(tmp_path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("name: [")
    with pytest.raises(ConfigError, match=r"study.yaml:1: broken YAML"):
        load_study(file)
    file.write_text("- a\n")
    with pytest.raises(ConfigError, match=r"study.yaml:1: a study is a mapping of keys \(name, "):
        load_study(file)
    with pytest.raises(ConfigError, match=r"cannot read the study .*no.yaml: No such file"):
        load_study(tmp_path / "no.yaml")


def tune(best: float, grid: list[float], extend: int) -> dict[float, float | None]:
    """Try rates as a study does, of a method that is best at ``best`` (on a logarithmic scale)."""
    tried: dict[float, float | None] = {}
    while (rate := next_rate(grid, tried, extend)) is not None:
        tried[rate] = abs(rate - best) if rate < best else abs(rate / best - 1)
    return tried


def test_the_grid_grows_until_the_best_is_inside() -> None:
    inside = tune(0.003, [0.001, 0.003, 0.009], 2)
    assert list(inside) == [0.001, 0.003, 0.009]
    above = tune(0.027, [0.001, 0.003, 0.009], 3)
    assert list(above) == [0.001, 0.003, 0.009, 0.027, 0.081]
    assert (best_rate(above), at_edge(above)) == (0.027, False)
    below = tune(0.0001, [0.001, 0.004], 2)
    assert list(below) == [0.001, 0.004, 0.00025, 6.25e-05]
    assert at_edge(below) is (best_rate(below) == 6.25e-05)


def test_the_grid_stops_growing_at_its_bound() -> None:
    tried = tune(1e9, [0.1, 1.0], 2)
    assert list(tried) == [0.1, 1.0, 10.0, 100.0]
    assert at_edge(tried)


def test_a_rate_that_failed_is_worse_than_any_other() -> None:
    tried = {0.001: 0.3, 0.01: 0.2, 0.1: None}
    assert next_rate([0.001, 0.01, 0.1], tried, 2) is None
    assert best_rate(tried) == 0.01
    nothing = dict.fromkeys(tried)
    assert next_rate([0.001, 0.01, 0.1], nothing, 2) is None
    assert best_rate(nothing) is None


def test_a_study_that_is_not_there_is_told_apart_from_recipes() -> None:
    with pytest.raises(ConfigError, match="cannot read the study nope: ") as raised:
        load_study("nope")
    assert str(raised.value).endswith(
        "studies that come with the package: studies/cuma_options, studies/mean_collapse, studies/quick"
    )
    with pytest.raises(ConfigError, match="cannot read the recipe nope: ") as raised:
        load_config("nope")
    assert "studies/quick" not in str(raised.value)
    assert "studies/survey, survey, synthetic" in str(raised.value)
