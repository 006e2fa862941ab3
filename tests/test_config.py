"""Recipes and JSON that people write: each value means what it says, and no key stands twice."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from cuma_ds.errors import ConfigError
from cuma_ds.recipe import load_config, make_config
from cuma_ds.strict_json import read_json

MODEL = "model: {path: m}\nadapters: {method: lora}\n"


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MODEL + text, encoding="utf-8")
    return path


MEANT = {
    "leading zero": ("run.seed", "010", 10),
    "thousands": ("training.steps", "1_000", 1000),
    "exponent": ("training.learning_rate", "1e-3", 0.001),
    "a country": ("data.questions", "[NO, yes, 010, 1:30]", ("NO", "yes", "010", "1:30")),
    "a date": ("run.name", "2024-01-31", "2024-01-31"),
    "a number as a name": ("run.name", "08", "08"),
    "off": ("model.gradient_checkpointing", "off", False),
    "yes": ("model.gradient_checkpointing", "yes", True),
    "null": ("data.kind", "null", None),
    "numbers in a list": ("training.adam_betas", "[0.5, .75]", (0.5, 0.75)),
}


@pytest.mark.parametrize(("key", "text", "value"), MEANT.values(), ids=MEANT.keys())
def test_a_value_is_read_as_a_careful_person_means_it(tmp_path, key, text, value):
    section, name = key.split(".")
    written = load_config(
        recipe(tmp_path, f"{section}: {{{name}: {text}}}\n" if section != "model" else ""), [f"{key}={text}"]
    )
    assert getattr(getattr(written, section), name) == value
    if section != "model":
        assert load_config(recipe(tmp_path, f"{section}: {{{name}: {text}}}\n")) == written
    (tmp_path / "again.yaml").write_text(written.to_yaml())
    assert load_config(tmp_path / "again.yaml") == written


REFUSED = {
    "true for a number": ("training.steps", "true", "training.steps is 'true': Input should be a valid integer"),
    "minutes for a number": ("training.steps", "1:30", "training.steps is '1:30': Input should be a valid integer"),
    "infinity": ("training.learning_rate", "inf", "training.learning_rate is inf: Input should be a finite number"),
    "out of range": ("training.steps", "0", "training.steps is 0: Input should be greater than or equal to 1"),
}


@pytest.mark.parametrize(("key", "text", "problem"), REFUSED.values(), ids=REFUSED.keys())
def test_a_value_of_another_kind_is_refused_with_its_line(tmp_path, key, text, problem):
    section, name = key.split(".")
    path = recipe(tmp_path, f"{section}:\n  {name}: {text}\n")
    with pytest.raises(ConfigError) as in_file:
        load_config(path)
    assert str(in_file.value).startswith(f"{path}:4: {problem}")
    with pytest.raises(ConfigError) as in_override:
        load_config(recipe(tmp_path, ""), [f"{key}={text}"])
    assert str(in_override.value).startswith(f"--set {key}={text}: {problem}")
    assert "\n" not in str(in_file.value) + str(in_override.value)


def test_a_section_without_keys_has_its_defaults(tmp_path):
    assert load_config(recipe(tmp_path, "data:\ntraining:\n")) == load_config(recipe(tmp_path, ""))


def test_methods_compare_what_a_recipe_says_with_what_they_mean(tmp_path):
    path = tmp_path / "recipe.yaml"
    for shared in ("true", "yes"):
        path.write_text(f"model: {{path: m}}\nadapters: {{method: hydralora, shared_a: {shared}}}\n")
        assert load_config(path).adapters.shared_a
    path.write_text("model: {path: m}\nadapters: {method: hydralora, shared_a: false}\n")
    with pytest.raises(ConfigError, match="method 'hydralora' means shared_a: True, but shared_a: false was asked for"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("run: {name: a}\nrun: {name: b}\n", "recipe.yaml:4: .*key 'run' stands twice, in lines 3 and 4; keep one"),
        (
            "training:\n  steps: 3\n  warmup_steps: 1\n  steps: 4\n",
            "recipe.yaml:6: .*key 'training.steps' stands twice, in lines 4 and 6",
        ),
    ],
)
def test_a_key_that_stands_twice_in_a_recipe_is_refused_with_both_lines(tmp_path, text, problem):
    with pytest.raises(ConfigError, match=problem):
        load_config(recipe(tmp_path, text))


def test_files_merge_from_left_to_right_and_overrides_win(tmp_path):
    backbone = tmp_path / "backbone.yaml"
    backbone.write_text("model: {path: m, dtype: float32}\ntraining: {steps: 5, warmup_steps: 1}\n")
    task = tmp_path / "task.yaml"
    task.write_text("training:\n  steps: 7\nadapters: {method: lora}\nmodel:\ndata: {max_length: 99}\n")
    method = tmp_path / "method.yaml"
    groups = "gradient_mask: groups, num_experts: 2, gradient_groups: {country: {Norway: [0]}}"
    method.write_text(f"adapters: {{method: mixlora, {groups}}}\n")
    together = load_config([backbone, task, method], ["data.max_length=98"])
    assert (together.model.path, together.model.dtype) == ("m", "float32")
    assert (together.training.steps, together.training.warmup_steps) == (7, 1)
    assert (together.adapters.method, together.data.max_length) == ("mixlora", 98)
    assert load_config([task, backbone]).training.steps == 5
    later = tmp_path / "later.yaml"
    later.write_text("adapters:\n  gradient_groups: {country: {Peru: [1]}}\n")
    assert load_config([backbone, method, later]).adapters.gradient_groups == {"country": {"Peru": (1,)}}


@pytest.mark.parametrize(
    ("first", "second", "problem"),
    [
        ("training:\n  steps: 3\nmodel: {path: m}\n", "training:\n  steps: x\n", "{second}:2: training.steps is 'x'"),
        (
            "training:\n  steps: x\nmodel: {path: m}\n",
            "training:\n  warmup_steps: 1\n",
            "{first}:2: training.steps is 'x'",
        ),
        ("model: {path: m}\n", "trainign: {}\n", "{second}:1: unknown key 'trainign'"),
        ("model: {path: m}\n", "model: 3\n", "{second}:1: model is 3"),
        ("run: {name: a}\n", "run: {seed: 1}\n", "{first} + {second}: key 'model' is missing"),
        ("run: {name: a}\n", "run: {seed: 1}\nrun: {seed: 2}\n", "{second}:2: broken YAML: key 'run' stands twice"),
    ],
)
def test_a_mistake_in_one_of_several_files_is_named_with_its_own_place(tmp_path, first, second, problem):
    files = {"first": tmp_path / "first.yaml", "second": tmp_path / "second.yaml"}
    files["first"].write_text(first)
    files["second"].write_text(second)
    with pytest.raises(ConfigError) as raised:
        load_config(list(files.values()))
    assert str(raised.value).startswith(problem.format(**files))


def test_recipes_that_come_with_the_package_go_by_their_names(tmp_path):
    by_name = load_config(["quickstart"], ["training.steps=30"])
    assert by_name == load_config(
        Path(__file__).parents[1] / "launchers/recipes/quickstart.yaml", ["training.steps=30"]
    )
    with pytest.raises(ConfigError, match=r"cannot read the recipe quickstrat: .*quickstart.*; recipes that come with"):
        load_config("quickstrat")
    with pytest.raises(ConfigError, match=r"recipe paper/task/ca-dbo: .*did you mean 'paper/task/ca-dpo'"):
        load_config("paper/task/ca-dbo")


def test_the_last_of_two_overrides_wins_and_keys_within_one_stand_once():
    values = {"model": {"path": "m"}, "adapters": {"method": "lora"}}
    assert make_config(values, ["training.steps=3", "training.steps=4"]).training.steps == 4
    with pytest.raises(ConfigError, match=r"--set adapters\.gradient_groups=.*key 'country\.NO' stands twice"):
        make_config(values, ["adapters.gradient_groups={country: {NO: [1], NO: [2]}}"])


def test_json_with_a_repeated_key_is_refused_with_its_lines_and_without_its_values():
    assert read_json('{"a": {"b": 1}, "c": [{"b": 2}, {"b": 3}]}') == {"a": {"b": 1}, "c": [{"b": 2}, {"b": 3}]}
    with pytest.raises(ValueError, match=r"^key 'b' stands twice; keep one$"):
        read_json('{"a": [{"b": 1, "b": {"c": null}}]}')
    text = json.dumps({"b": '}{"b":', "zero": {"stage": 2, "x": 1}}, indent=1).replace('"x"', '"stage"')
    with pytest.raises(ValueError, match="key 'stage' stands twice, in lines 4 and 5; keep one"):
        read_json(text)
    for bad in ("[" * 100_000, '{"a": 1' + "0" * 5000 + "}"):
        with pytest.raises(ValueError, match=r"within one another|digits"):
            read_json(bad)


def test_a_profile_on_the_command_line_has_each_key_once(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "launchers"))
    read_profile = importlib.import_module("_cli").read_profile
    assert read_profile('{"country": "Norway", "age": 3}') == {"country": "Norway", "age": 3}
    with pytest.raises(ConfigError, match="--profile: key 'country' stands twice; keep one"):
        read_profile('{"country": "Norway", "country": "Peru"}')


def test_a_file_that_names_the_method_removes_what_earlier_files_say_of_others(tmp_path) -> None:
    """The same holds for --set. In one file, such keys are mistakes."""
    task, method = tmp_path / "task.yaml", tmp_path / "method.yaml"
    task.write_text("model: {path: m}\nadapters: {num_experts: 16, top_k: 4, lora_r: 32, gate_norm: softmax}\n")
    for name in ("full", "dora", "lora", "vanilla", "hydralora-original"):
        method.write_text(f"adapters: {{method: {name}}}\n")
        for config in (load_config([task, method]), load_config(task, [f"adapters.method={name}"])):
            assert config.adapters.method == name
            assert config.adapters.lora_r == (8 if name in ("full", "vanilla") else 32)
            assert config.adapters.num_experts == (16 if name == "hydralora-original" else 1)
    method.write_text("adapters: {method: full, lora_r: 8, num_experts: 16}\n")
    with pytest.raises(ConfigError, match="method 'full' does not read num_experts, but num_experts: 16 was given"):
        load_config([task, method])
    with pytest.raises(ConfigError, match="method 'full' does not read lora_r"):
        load_config(task, ["adapters.method=full", "adapters.lora_r=4"])
