"""Small runs and what two of them have in common."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from single_process import SingleRun

from cuma_ds.config import RunConfig
from cuma_ds.parallel.stored import find_checkpoint, read_adapters
from cuma_ds.recipe import load_config
from cuma_ds.runs import Run

DATA = Path(__file__).parents[1] / "data" / "opinions.jsonl"


STEPS = 6


def recipe(folder: Path, tiny_llama: Path, tiny_encoder: Path, name: str, **sections: dict) -> Path:
    """Write a small recipe; ``sections`` update its sections."""
    values = {
        "run": {"name": name, "output_dir": str(folder / "runs"), "seed": 3},
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "profiles": {"encoder": str(tiny_encoder), "cache_dir": str(folder / "cache")},
        "adapters": {
            "num_experts": 4, "top_k": 2, "lora_r": 4, "balance_weight": 0.05,
            "target_modules": ["q_proj", "v_proj", "up_proj"],
        },
        "data": {"source": "jsonl", "path": str(DATA)},
        "training": {
            "steps": STEPS, "global_batch_size": 8, "micro_batch_size": 8, "learning_rate": 0.01, "warmup_steps": 2,
            "weight_decay": 0.02, "adam_eps": 1.0e-5, "max_grad_norm": 0.05,
        },
        "checkpoint": {"every": 0},
        "telemetry": {"tensorboard": False},
    }  # fmt: skip
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def metrics(config: RunConfig) -> list[dict[str, float]]:
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(path: Path, expected: SingleRun, tolerance: float = 1e-5) -> None:
    config = load_config(path)
    rows = metrics(config)
    assert [row["step"] for row in rows] == list(range(1, config.training.steps + 1))
    for row, loss, norm in zip(rows, expected.losses, expected.grad_norms, strict=True):
        assert row["loss"] == pytest.approx(loss, rel=tolerance, abs=tolerance), path.stem
        assert row["grad_norm"] == pytest.approx(norm, rel=tolerance, abs=tolerance), path.stem
    trained = read_adapters(find_checkpoint(Run(config.run_dir).checkpoints))
    for name, tensor in expected.state.items():
        torch.testing.assert_close(
            trained[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{path.stem} {n}: {m}"
        )
