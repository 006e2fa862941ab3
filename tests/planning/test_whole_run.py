"""How long a whole run takes: counted again by hand from shapes, and what the command says."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import yaml

from cuma_ds.planning.cost import Hardware, Work
from cuma_ds.planning.plan import Planner
from cuma_ds.planning.skeleton import read_model_config
from cuma_ds.planning.whole_run import step_work, whole_run
from cuma_ds.recipe import load_config

BASE = {
    "model": {"path": "m", "dtype": "bfloat16"},
    "profiles": {"encoder": "not-read-here"},
    "adapters": {"num_experts": 4, "lora_r": 4, "target_modules": ["q_proj", "v_proj"]},
    "data": {"max_length": 64},
    "parallel": {"deepspeed_config": "zero2"},
}
GRPO = {
    "training": {"objective": "grpo", "steps": 6, "global_batch_size": 8, "micro_batch_size": 6},
    "grpo": {"rewards": ["answer"], "group_size": 4, "kl_weight": 0.1},
    "rollout": {"max_new_tokens": 16, "batch_size": 10},
}
MACHINE = Hardware(memory=80e9, flops=1e15, efficiency=0.5, memory_bandwidth=2e12)


def planner(folder: Path, model: Path, **sections: dict) -> Planner:
    values = {**BASE, **{name: {**BASE.get(name, {}), **section} for name, section in sections.items()}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return Planner(load_config(path), read_model_config(model), 16)


CUT = {
    "whole": ({"global_batch_size": 16, "micro_batch_size": 2}, 8, Work(2, 64, 64, 1)),
    "accumulated": ({"global_batch_size": 20, "micro_batch_size": 4}, 2, Work(4, 64, 64, 3)),
    "pairs": ({"objective": "dpo", "global_batch_size": 8, "micro_batch_size": 1}, 4, Work(2, 64, 64, 2)),
}


@pytest.mark.parametrize(("training", "gpus", "work"), CUT.values(), ids=CUT.keys())
def test_a_step_is_cut_as_training_cuts_it(tmp_path, tiny_llama, training, gpus, work) -> None:
    assert step_work(planner(tmp_path, tiny_llama, training=training).config, gpus, 64) == work


def test_days_are_steps_times_what_a_step_takes(tmp_path, tiny_llama) -> None:
    plans = planner(tmp_path, tiny_llama, training={"steps": 500, "global_batch_size": 16, "micro_batch_size": 2})
    run = whole_run(plans, 4, 64, MACHINE)
    step = sum(plans.plan(4, Work(2, 64, 64, 2), MACHINE).seconds.values())
    assert run.days == pytest.approx(500 * step / 86_400)
    assert (run.rollout_seconds, run.reference_seconds, run.fits) == (0.0, 0.0, True)


def test_dpo_asks_the_reference_once_for_every_pair(tmp_path, tiny_llama) -> None:
    plans = planner(
        tmp_path, tiny_llama, training={"objective": "dpo", "steps": 10, "global_batch_size": 4, "micro_batch_size": 4}
    )
    run, sizes = whole_run(plans, 1, 64, MACHINE), plans.sizes
    of_token = 2 * (sizes.multiplied + sizes.shared + sizes.expert) + sizes.attention * 64
    assert run.reference_seconds == pytest.approx(10 * 8 * 64 * of_token / (1e15 * 0.5))
    assert run.days * 86_400 == pytest.approx(10 * run.update_seconds + run.reference_seconds)


def test_rollouts_are_read_written_and_scored(tmp_path, tiny_llama) -> None:
    """On two ranks: 16 completions each, 10 at a time, of 48 + 16 tokens."""
    plans = planner(tmp_path, tiny_llama, **GRPO)
    run, sizes, text = whole_run(plans, 2, 64, MACHINE), plans.sizes, plans.setup.text
    trained = sizes.shared + sizes.expert
    of_token, speed = 2 * (sizes.multiplied + trained), 1e15 * 0.5
    reading = 16 * 48 * (of_token + sizes.attention * 48) / speed
    scoring = 3 * 6 * 64 * (of_token + sizes.attention * 64) / speed  # 16 completions as 3 x 6
    assert run.work == Work(6, 64, 16, 3)
    keys = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    read = 2 * sizes.backbone_parameters + 4 * trained + 10 * (48 + 8) * keys  # bytes of one step, of two waves of 16
    assert run.rollout_seconds == pytest.approx(reading + 2 * 16 * read / (2e12 * 0.5) + scoring)
    assert run.memory >= sum(plans.layout(2, run.work, MACHINE).held().values()) + 10 * 64 * keys
    once = {**GRPO, "grpo": {**GRPO["grpo"], "kl_weight": 0.0}}
    cheaper = whole_run(planner(tmp_path, tiny_llama, **once), 2, 64, MACHINE)
    assert cheaper.rollout_seconds == pytest.approx(run.rollout_seconds - scoring)


def test_a_sharded_backbone_is_gathered_once_or_for_each_token(tmp_path, tiny_llama) -> None:
    def seconds(backbone: str, memory: float) -> float:
        sections = {
            **GRPO, "rollout": {**GRPO["rollout"], "backbone": backbone},
            "parallel": {"deepspeed_config": "zero2_sharded_backbone"},
        }  # fmt: skip
        machine = dataclasses.replace(MACHINE, memory=memory, reserved=0.0)
        return whole_run(planner(tmp_path, tiny_llama, **sections), 2, 64, machine).rollout_seconds

    gathered, sharded = seconds("gathered", 80e9), seconds("sharded", 80e9)
    assert sharded > gathered
    assert seconds("auto", 80e9) == gathered
    assert seconds("auto", 1e5) == sharded


def test_the_command_says_how_many_days(tmp_path, tiny_llama, launch) -> None:
    recipe = tmp_path / "recipe.yaml"
    values = {**BASE, "training": {"epochs": 3, "global_batch_size": 16, "micro_batch_size": 2}}
    recipe.write_text(yaml.safe_dump(values))
    ask = ("plan", "--config", str(recipe), "--model-config", str(tiny_llama), "--gpus", "8", "--profile-dim", "16")
    done = launch(*ask)
    assert done.code == 0, done.err
    assert "whole run: give --examples" in done.out
    done = launch(*ask, "--examples", "50000")
    assert "whole run: 9,375 steps of 16 examples, all of 64 tokens" in done.out
    assert " days (" in done.out
    told = json.loads(launch(*ask, "--json", "--set", "data.max_examples=100").out)
    (plan,) = next(iter(told.values()))
    assert plan["whole_run"]["steps"] == math.ceil(300 / 16)
    assert plan["whole_run"]["days"] > 0
    full = launch(*ask, "--examples", "10", "--set", "adapters.method=full", "parallel.deepspeed_config=zero3")
    assert "0.00 B frozen, 0.0 M trained parameters (100.00%)" in full.out
