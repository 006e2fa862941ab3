"""Runs of objective grpo: any number of ranks and any interruption end where one process ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import run_recipes
from small_runs import metrics, recipe

from cuma_ds.config import load_config
from cuma_ds.parallel.stored import find_checkpoint, read_adapters
from cuma_ds.runs import Run

pytestmark = pytest.mark.multirank

TRAINING = {"objective": "grpo", "steps": 4, "global_batch_size": 5, "micro_batch_size": 32}
GRPO = {"rewards": ["own_rewards:characters"], "group_size": 4, "scale_rewards": "batch"}


def grpo_recipe(folder: Path, tiny_llama: Path, tiny_encoder: Path, name: str, **sections: dict) -> Path:
    values = {
        "training": TRAINING | sections.pop("training", {}),
        "grpo": GRPO | sections.pop("grpo", {}),
        "rollout": {"max_new_tokens": 6, "keep": 100, **sections.pop("rollout", {})},
    }
    return recipe(folder, tiny_llama, tiny_encoder, name, **values, **sections)


def kept(path: Path) -> list[dict]:
    return [json.loads(line) for line in Run(load_config(path).run_dir).completions.read_text().splitlines()]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return read_adapters(find_checkpoint(Run(load_config(path).run_dir).checkpoints))


def assert_same(path: Path, other: Path, tolerance: float = 1e-5) -> None:
    rows, others = metrics(load_config(path)), metrics(load_config(other))
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, expected in zip(rows, others, strict=True):
        for name in ("loss", "reward", "grad_norm", "completions/mean_length"):
            assert row[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name
    found = tensors(path)
    for name, tensor in tensors(other).items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance)


def test_two_and_three_ranks_equal_one_process(tmp_path, tiny_llama, tiny_encoder) -> None:
    one = grpo_recipe(tmp_path, tiny_llama, tiny_encoder, "one")
    run_recipes(1, [one])
    placements = {
        2: [{"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2}, {"deepspeed_config": "zero3"}],
        3: [{"deepspeed_config": "zero2_sharded_backbone"}],
    }
    for world, parallels in placements.items():
        paths = [
            grpo_recipe(tmp_path, tiny_llama, tiny_encoder, f"w{world}-{number}", parallel=parallel)
            for number, parallel in enumerate(parallels)
        ]
        run_recipes(world, paths)
        for path in paths:
            assert_same(path, one)
            assert [line for line in kept(one) if line in kept(path)] == kept(path)
