"""How long a run is: steps or epochs, and a schedule that the run may leave early."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from ranks import run_recipes
from small_runs import metrics, recipe

from cuma_ds.config import TrainingSection
from cuma_ds.errors import ConfigError
from cuma_ds.learned_settings import fingerprint
from cuma_ds.recipe import load_config, make_config
from cuma_ds.runs import Run
from cuma_ds.training.schedule import learning_rate, with_steps

LORA = {"model": {"path": "m"}, "adapters": {"method": "lora"}}


def config(section: str = "training", **training):
    objective = {"grpo": {"rewards": ["answer"], "iterations": 2}} if training.get("objective") == "grpo" else {}
    rest = {"checkpoint": {"every": 0}} if objective else {}
    return make_config({**LORA, **objective, **rest, section: training})


@pytest.mark.parametrize(
    ("epochs", "examples", "batch", "steps"),
    [(3, 50_000, 16, 9375), (1, 2000, 16, 125), (1, 17, 8, 3), (0.5, 10, 5, 1), (0.01, 10, 5, 1), (0.3, 10, 1, 3)],
)
def test_epochs_are_whole_steps(epochs, examples, batch, steps) -> None:
    resolved = with_steps(config(epochs=epochs, global_batch_size=batch), examples)
    assert resolved.training.steps == steps
    assert with_steps(config(steps=7), examples).training.steps == 7


def test_epochs_of_rollouts_end_with_a_rollout() -> None:
    resolved = with_steps(config(objective="grpo", epochs=3, global_batch_size=8), 20)
    assert resolved.training.steps == 2 * math.ceil(3 * 20 / 8)


def test_steps_and_epochs_are_one_or_the_other(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"training: steps is 5 and epochs is 2; leave one of them out"):
        config(steps=5, epochs=2)
    written = tmp_path / "both.yaml"
    written.write_text("model: {path: m}\nadapters: {method: lora}\ntraining: {epochs: 2, steps: 5}\n")
    with pytest.raises(ConfigError, match=rf"^{written}:3: training: steps is 5 and epochs is 2"):
        load_config(written)


def test_a_later_file_or_the_command_line_replaces_the_other_one(tmp_path) -> None:
    epochs, steps = tmp_path / "epochs.yaml", tmp_path / "steps.yaml"
    epochs.write_text("model: {path: m}\nadapters: {method: lora}\ntraining: {epochs: 2}\n")
    steps.write_text("model: {path: m}\nadapters: {method: lora}\ntraining: {steps: 9}\n")
    found = load_config([epochs, steps]).training
    assert (found.steps, found.epochs) == (9, None)
    found = load_config([steps, epochs]).training
    assert found.epochs == 2
    assert "steps" not in found.model_fields_set
    found = load_config(epochs, ["training.steps=4"]).training
    assert (found.steps, found.epochs) == (4, None)
    assert load_config(steps, ["training.epochs=4"]).training.epochs == 4
    with pytest.raises(ConfigError, match="steps is 4 and epochs is 1"):
        load_config(epochs, ["training.steps=4", "training.epochs=1"])


def test_a_recipe_that_is_written_out_says_epochs_alone(tmp_path) -> None:
    resolved = with_steps(config(epochs=2, global_batch_size=4), 12)
    (tmp_path / "again.yaml").write_text(resolved.to_yaml())
    assert load_config(tmp_path / "again.yaml").training.epochs == 2
    assert "steps" not in yaml.safe_load(resolved.to_yaml())["training"]


def test_what_a_warm_up_and_a_schedule_need_is_checked_once_the_steps_are_known() -> None:
    with pytest.raises(ConfigError, match=r"^training.epochs 1 of 12 examples: warmup_steps is 9 but steps is 3"):
        with_steps(config(epochs=1, global_batch_size=4, warmup_steps=9), 12)
    with pytest.raises(ConfigError, match=r"^training.epochs 2 of 12 examples: schedule_steps is 5 but steps is 6"):
        with_steps(config(epochs=2, global_batch_size=4, schedule_steps=5), 12)
    with pytest.raises(ConfigError, match="training: schedule_steps is 5 but steps is 6; nothing would be learned"):
        config(steps=6, schedule_steps=5)


def test_a_schedule_can_be_longer_than_the_run() -> None:
    """625 steps of a linear schedule of 1000 with 100 of warm-up, as the authors' scripts have it."""
    training = TrainingSection(steps=625, schedule_steps=1000, warmup_steps=100, schedule="linear", learning_rate=2e-5)
    assert learning_rate(0, training) == pytest.approx(2e-7)
    for step in (100, 400, 624):
        assert learning_rate(step, training) == pytest.approx(2e-5 * (1000 - step) / 900)


def test_the_schedule_is_learned_and_the_length_is_not() -> None:
    plain = config(steps=10)
    assert fingerprint(config(epochs=2)) == fingerprint(plain) == fingerprint(config(steps=20))
    assert fingerprint(config(steps=10, schedule_steps=30)) != fingerprint(plain)


@pytest.mark.multirank
def test_a_run_of_epochs_is_a_run_of_as_many_steps_and_goes_on_after_a_stop(tmp_path, tiny_llama, tiny_encoder) -> None:
    def written(name: str, **training) -> Path:
        return recipe(tmp_path, tiny_llama, tiny_encoder, name, training={"schedule": "linear", **training})

    first = written("epochs", epochs=1)
    text = yaml.safe_load(first.read_text())
    del text["training"]["steps"]  # the helper's
    first.write_text(yaml.safe_dump(text))
    run_recipes(1, [first])
    rows = metrics(load_config(first))
    examples = len(Run(tmp_path / "runs" / "epochs").data().splits["train"])
    assert len(rows) == math.ceil(examples / 8)
    same = written("steps", steps=len(rows))
    run_recipes(1, [same])
    assert [row["loss"] for row in metrics(load_config(same))] == [row["loss"] for row in rows]
    text["training"]["epochs"] = 1.5
    first.write_text(yaml.safe_dump(text))
    run_recipes(1, [first])
    assert len(metrics(load_config(first))) == math.ceil(1.5 * examples / 8)
