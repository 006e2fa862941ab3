"""Backbones that cannot be held as a recipe says: one line, and exit code 2 on every rank."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import TRAIN, one_line
from ranks import ROOT, environment, finish, free_port, run
from small_runs import recipe
from transformers import GPT2Config, GPT2LMHeadModel

from cuma_ds.parallel.ds_config import DS_CONFIGS

pytestmark = pytest.mark.multirank
both = pytest.mark.parametrize("world", [1, 2])


@pytest.fixture
def write(tmp_path, tiny_llama, tiny_encoder):
    """Write a recipe of one step with a shard group and other settings of the model."""

    def go(size: object = "world", **model: str) -> Path:
        settings = json.loads((DS_CONFIGS / "zero2_sharded_backbone.json").read_text())
        settings["frozen_backbone"]["shard_group"] = size
        (tmp_path / "deepspeed.json").write_text(json.dumps(settings))
        sections = {
            "model": {"path": str(tiny_llama), "dtype": "float32", **model},
            "parallel": {"deepspeed_config": str(tmp_path / "deepspeed.json"), "timeout_seconds": 60},
            "training": {"steps": 1, "warmup_steps": 0},
        }
        return recipe(tmp_path, tiny_llama, tiny_encoder, "run", **sections)

    return go


def train(path: Path, world: int) -> list[tuple[int | None, str]]:
    return run(world, [TRAIN, "--config", str(path)])


def train_with(path: Path, told: list[dict[str, str]]) -> list[tuple[int | None, str]]:
    """In fresh processes, one rank per environment."""
    port, streams = free_port(), {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, TRAIN, "--config", str(path)]
    environments = [environment(len(told), rank, port) | variables for rank, variables in enumerate(told)]
    return finish([subprocess.Popen(command, cwd=ROOT, env=one, **streams) for one in environments])


@both
def test_a_shard_group_that_does_not_divide_the_ranks(world, write) -> None:
    fits = {1: "1, machine, world", 2: "1, 2, machine, world"}[world]
    problem = f"frozen_backbone.shard_group is 3, which does not divide the {world} ranks; what fits: {fits}"
    one_line(train(write(3), world), problem)


def test_a_shard_group_that_splits_a_machine(write) -> None:
    told = [{"LOCAL_WORLD_SIZE": "3", "LOCAL_RANK": str(rank)} for rank in range(3)]
    results = train_with(write(2), [*told, {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}])
    one_line(results, "ranks 2 to 3 would be one group, on 2 machines of 3 and 1 ranks; what fits: 1, 4, machine")


@both
def test_a_model_with_weights_that_are_no_linears(world, write, tmp_path, tiny_llama) -> None:
    folder, sizes = tmp_path / "gpt2", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 512}
    shutil.copytree(tiny_llama, folder)
    (folder / "model.safetensors").unlink()
    GPT2LMHeadModel(GPT2Config(vocab_size=128, **sizes)).save_pretrained(folder)
    one_line(train(write(path=str(folder), quantisation="nf4"), world), "transformer.h.0.mlp.c_fc.weight")


@pytest.mark.parametrize("ranks", ["the only one", "all", "the second"])
def test_without_bitsandbytes(ranks, write, tmp_path) -> None:
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "bitsandbytes.py").write_text("raise ModuleNotFoundError('No module named bitsandbytes')")
    without = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path / "without")])}
    told = {"the only one": [without], "all": [without, without], "the second": [{}, without]}[ranks]
    one_line(train_with(write(quantisation="nf4"), told), "nf4 needs the package bitsandbytes", "cuma-ds[quantisation]")


@pytest.mark.parametrize("kind", ["none", "int8"])
@both
def test_a_base_that_is_quantised_already(world, kind, write, tiny_llama, tmp_path) -> None:
    folder = tmp_path / "quantised"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    one_line(train(write(path=str(folder), quantisation=kind), world), "are quantised already", "name the 16-bit model")


@both
def test_a_resumed_run_that_changes_its_quantisation(world, write) -> None:
    path = write(quantisation="int8")
    assert [code for code, _ in train(path, world)] == [0] * world
    path = write(quantisation="nf4")
    one_line(train(path, world), "holds a run with model.quantisation: int8, but this recipe says nf4")
