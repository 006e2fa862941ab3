"""On a GPU the commands do what they do on the CPU. Skipped where torch sees no GPU."""

from __future__ import annotations

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
from ranks import ROOT, environment, finish, run, run_recipes, start
from single_process import train_single
from small_runs import assert_same_training, metrics, recipe

from cuma_ds.config import load_config
from cuma_ds.parallel.stored import find_checkpoint
from cuma_ds.runs import Run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees")
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


@pytest.mark.parametrize("adapters", [{}, GROUPED], ids=["dense", "grouped"])
def test_killed_in_the_middle_the_same_command_resumes_bit_identically(
    adapters, tmp_path, tiny_llama, tiny_encoder
) -> None:
    options = {
        "model": {"dtype": "bfloat16"},
        "parallel": {"deepspeed_config": "zero2_sharded_backbone"},
        "checkpoint": {"every": 20},
        "training": {"steps": 200, "warmup_steps": 2},
        "adapters": {"dropout": 0.1, **adapters},
    }
    whole, broken = (recipe(tmp_path, tiny_llama, tiny_encoder, name, **options) for name in ("whole", "broken"))
    checkpoints = Run(load_config(broken).run_dir).checkpoints
    undisturbed = start(1, [TRAIN, "--config", str(whole)], fresh=True)
    killed = start(1, [TRAIN, "--config", str(broken)], fresh=True)
    deadline = time.monotonic() + 120
    while not (checkpoints / "step-40" / "state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    killed[0].send_signal(signal.SIGKILL)
    finish(killed)
    assert not (checkpoints / "step-200").exists(), "the kill came too late to mean anything"
    ((code, printed),) = run(1, [TRAIN, "--config", str(broken)], fresh=True)
    assert code == 0, printed
    assert "resuming" in printed
    assert [code for code, _ in finish(undisturbed)] == [0]
    one, other = (all_tensors(find_checkpoint(Run(load_config(path).run_dir).checkpoints)) for path in (whole, broken))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


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
    for arguments in (
        ("evaluate", "--run", str(run), "--gradients", "--out", report),
        ("export", "--run", str(run), "--format", "lora", *norway, "--calibration", "8", "--out", lora),
        ("export", "--run", str(run), "--format", "hf", "--out", export),
    ):
        command(*arguments, without_gpu=without_gpu)
    prompt = (*norway, *ghana, "--prompt", "Can people be trusted?", "--max-new-tokens", "12")
    models = (("--run", str(run)), ("--export", export))
    said = [command("generate", *model, *prompt, without_gpu=without_gpu) for model in models]
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
