"""On a GPU the commands do what they do on the CPU. Skipped where torch sees no GPU."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from commands import TRAIN, all_tensors
from pairs import pair_recipe
from ranks import ROOT, environment, finish, run, run_recipes, start
from single_process import train_single
from small_runs import assert_same_training, metrics, recipe

from cuma_ds.parallel.stored import find_checkpoint
from cuma_ds.recipe import load_config
from cuma_ds.runs import Run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees")
MANY = str(ROOT / "tests" / "helpers" / "train_many.py")
WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": ""}
SAME_AS_SHARDED = ("offloaded", "offloaded-optimizer", "whole", "stage-3")
# As wide as grouped products need in 16 bits, and with so many experts that they are the cheaper way on a GPU too.
GROUPED = {"num_experts": 64, "lora_r": 32}


def command(name: str, *arguments: str, without_gpu: bool = False) -> str:
    """What ``python launchers/NAME.py ARGUMENTS`` prints."""
    variables = environment() | (WITHOUT_GPU if without_gpu else {})
    call = [sys.executable, str(ROOT / "launchers" / f"{name}.py"), *arguments]
    done = subprocess.run(call, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def tiny_qwen(tmp_path_factory, tiny_llama) -> Path:
    """A random 2-layer Qwen3 with the character tokenizer."""
    from transformers import AutoConfig, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-qwen"
    shutil.copytree(tiny_llama, folder)
    sizes = AutoConfig.from_pretrained(tiny_llama).to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    ends = ("num_key_value_heads", "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range")
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3", head_dim=8, **{name: sizes[name] for name in (*kept, *ends)})
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def test_float32_training_equals_a_single_process_on_the_cpu(tmp_path, tiny_llama, tiny_qwen, tiny_encoder) -> None:
    variants = {
        "sharded": {"parallel": {"deepspeed_config": "zero2_sharded_backbone"}},
        "offloaded": {"parallel": {"deepspeed_config": "zero2_sharded_offload_backbone"}},
        "offloaded-optimizer": {"parallel": {"deepspeed_config": "zero2_sharded_offload_optimizer"}},
        "whole": {"parallel": {"deepspeed_config": "zero1"}, "model": {"gradient_checkpointing": True}},
        "stage-3": {"parallel": {"deepspeed_config": "zero3"}},
        "grouped": {"parallel": {"deepspeed_config": "zero2_sharded_backbone"}, "adapters": GROUPED},
        "shared-a": {"parallel": {"deepspeed_config": "zero2"}, "adapters": {"method": "hydralora", "num_experts": 4}},
        "qwen": {"parallel": {"deepspeed_config": "zero2_sharded_backbone"}, "adapters": {"router": "mlp"}},
    }
    paths = {
        name: recipe(tmp_path, tiny_qwen if name == "qwen" else tiny_llama, tiny_encoder, name, **sections)
        for name, sections in variants.items()
    }
    run_recipes(1, list(paths.values()), fresh=True)
    singles = {name: train_single(load_config(path)) for name, path in paths.items() if name not in SAME_AS_SHARDED}
    for name, path in paths.items():
        row = metrics(load_config(path))[-1]
        assert row["gpu_memory_gib"] > 0, "it did not train on the GPU"
        assert_same_training(path, singles["sharded" if name in SAME_AS_SHARDED else name], tolerance=2e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_training_stays_near_the_cpu(dtype, tmp_path, tiny_llama, tiny_encoder) -> None:
    """Within 2 % in every loss and 5 % in every gradient norm, as between placements on the CPU."""
    parallel = {"deepspeed_config": "zero2_sharded_backbone"}
    paths = {
        name: recipe(
            tmp_path, tiny_llama, tiny_encoder, name, parallel=parallel, model={"dtype": dtype}, adapters=adapters
        )
        for name, adapters in (("dense", {}), ("grouped", GROUPED))
    }
    run_recipes(1, list(paths.values()), fresh=True)
    for name, path in paths.items():
        rows, single = metrics(load_config(path)), train_single(load_config(path))
        for row, loss, norm in zip(rows, single.losses, single.grad_norms, strict=True):
            assert row["loss"] == pytest.approx(loss, rel=2e-2), name
            assert row["grad_norm"] == pytest.approx(norm, rel=5e-2), name
            assert row.get("loss_scale") == (4096 if dtype == "float16" else None)


def preferences(folder: Path, tiny_llama: Path, tiny_encoder: Path, name: str, **sections: dict) -> Path:
    """A recipe of objective dpo or grpo, as its name begins."""
    training = {"steps": 6} | sections.pop("training", {})
    if name.startswith("dpo"):
        return pair_recipe(folder, tiny_llama, tiny_encoder, name, training=training, **sections)
    grpo = {"rewards": ["own_rewards:characters"], "group_size": 4, "kl_weight": 0.1, "iterations": 2}
    training |= {"objective": "grpo", "global_batch_size": 4, "micro_batch_size": 16}
    rollout = {"max_new_tokens": 8, "keep": 100}
    return recipe(folder, tiny_llama, tiny_encoder, name, training=training, grpo=grpo, rollout=rollout, **sections)


def test_float32_preferences_are_learned_as_on_the_cpu(tmp_path, tiny_llama, tiny_encoder, monkeypatch) -> None:
    parallel = {"deepspeed_config": "zero2_sharded_backbone"}
    places = {}
    for place in ("gpu", "cpu"):
        (tmp_path / place).mkdir()
        monkeypatch.setenv(
            "CUDA_VISIBLE_DEVICES", "" if place == "cpu" else os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        )
        recipes = [
            preferences(tmp_path / place, tiny_llama, tiny_encoder, name, parallel=parallel) for name in ("dpo", "grpo")
        ]
        places[place] = recipes, start(1, [MANY, json.dumps([str(path) for path in recipes])], fresh=True)
    for _, ranks in places.values():
        ((code, printed),) = finish(ranks)
        assert code == 0, printed
    for path, other in zip(places["gpu"][0], places["cpu"][0], strict=True):
        config, expected = load_config(path), load_config(other)
        rows, others = metrics(config), metrics(expected)
        assert rows[-1]["gpu_memory_gib"] > 0, "it did not train on the GPU"
        names = [name for name in others[-1] if not name.endswith(("seconds", "per_second", "gib"))]
        assert len(names) > 10
        for row, theirs in zip(rows, others, strict=True):
            found = {name: row[name] for name in names}
            assert found == pytest.approx({name: theirs[name] for name in names}, rel=1e-3, abs=1e-4), path.stem
        completions, written = (Run(one.run_dir).completions for one in (config, expected))
        assert completions.exists() == (path.stem == "grpo")
        assert not completions.exists() or completions.read_text() == written.read_text()


# By name: steps and steps between checkpoints, both long enough to be killed between them.
KILLED = {"dense": (200, 20), "grouped": (200, 20), "dpo": (80, 10), "grpo": (40, 4)}


@pytest.mark.parametrize("name", KILLED)
def test_killed_in_the_middle_the_same_command_resumes_bit_identically(
    name, tmp_path, tiny_llama, tiny_encoder
) -> None:
    steps, every = KILLED[name]
    options = {
        "model": {"dtype": "bfloat16"},
        "parallel": {"deepspeed_config": "zero2_sharded_backbone"},
        "checkpoint": {"every": every},
        "training": {"steps": steps, "warmup_steps": 2},
        "adapters": {"dropout": 0.1} | (GROUPED if name == "grouped" else {}),
    }
    make = preferences if name in ("dpo", "grpo") else recipe
    whole, broken = (
        make(tmp_path, tiny_llama, tiny_encoder, f"{name}-{which}", **copy.deepcopy(options))
        for which in ("whole", "broken")
    )
    checkpoints = Run(load_config(broken).run_dir).checkpoints
    undisturbed = start(1, [TRAIN, "--config", str(whole)], fresh=True)
    killed = start(1, [TRAIN, "--config", str(broken)], fresh=True)
    deadline = time.monotonic() + 120
    while _newest(checkpoints) < 2 * every and time.monotonic() < deadline:
        assert killed[0].poll() is None, killed[0].communicate()
        time.sleep(0.02)
    killed[0].send_signal(signal.SIGKILL)
    finish(killed)
    assert not (checkpoints / f"step-{steps}").exists(), "the kill came too late to mean anything"
    ((code, printed),) = run(1, [TRAIN, "--config", str(broken)], fresh=True)
    assert code == 0, printed
    assert "resuming" in printed
    assert [code for code, _ in finish(undisturbed)] == [0]
    one, other = (all_tensors(find_checkpoint(Run(load_config(path).run_dir).checkpoints)) for path in (whole, broken))
    assert one.keys() == other.keys()
    assert [tensor for tensor in one if not torch.equal(one[tensor], other[tensor])] == []
    rows = metrics(load_config(whole))
    assert all(row["loss"] is not None for row in rows)


def _newest(checkpoints: Path) -> int:
    """The step of the newest complete checkpoint, or 0."""
    complete = checkpoints.glob("step-*[0-9]/state.json")
    return max((int(state.parent.name.removeprefix("step-")) for state in complete), default=0)


def test_what_a_trained_model_says_is_the_same_without_a_gpu(tmp_path, tiny_llama, tiny_encoder) -> None:
    """Evaluation, answers of a run and of its export, and a plain LoRA."""
    path = recipe(
        tmp_path, tiny_llama, tiny_encoder, "asked", parallel={"deepspeed_config": "zero2_sharded_backbone"},
        data={"test_fraction": 0.4}, evaluation={"min_answers": 2, "bootstrap": 5},
    )  # fmt: skip
    command("train", "--config", str(path))
    run = load_config(path).run_dir
    with ThreadPoolExecutor(2) as pool:
        (said, numbers), (said_without, numbers_without) = pool.map(
            lambda without_gpu: _asked(run, tmp_path / f"{without_gpu}", without_gpu), (False, True)
        )
    assert said[0] == said[1] == said_without[0] == said_without[1]
    assert len(numbers) > 50
    assert numbers == pytest.approx(numbers_without, rel=1e-3, abs=1e-4)


def _asked(run: Path, out: Path, without_gpu: bool) -> tuple[list[str], dict[str, float]]:
    """Answers of a run and of its export to two people, and the numbers of its reports."""
    norway, ghana = ("--profile", '{"country": "Norway"}'), ("--profile", '{"country": "Ghana"}')
    report, export, lora = (str(out / name) for name in ("report", "export", "lora"))
    calls = (
        ("evaluate", "--run", str(run), "--gradients", "--out", report),
        ("export", "--run", str(run), "--format", "lora", *norway, "--calibration", "8", "--out", lora),
        ("export", "--run", str(run), "--format", "hf", "--out", export),
    )
    prompt = (*norway, *ghana, "--prompt", "Can people be trusted?", "--max-new-tokens", "12")
    models = (("--run", str(run)), ("--export", export))
    with ThreadPoolExecutor(len(calls)) as pool:
        list(pool.map(lambda call: command(*call, without_gpu=without_gpu), calls))
        said = list(pool.map(lambda model: command("generate", *model, *prompt, without_gpu=without_gpu), models))
    judged, folded = (json.loads(Path(folder, "report.json").read_text()) for folder in (report, lora))
    return said, dict(_numbers([judged["splits"], folded["profiles"]]))


def _numbers(value: object, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a report, by where it is."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}{os.sep}{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _numbers(inner, f"{name}{os.sep}{index}")
    elif isinstance(value, int | float):
        yield name, float(value)
