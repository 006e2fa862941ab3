"""Full fine-tuning equals a plain loop over transformers' own model, on any number of ranks and at any ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pairs import LearnedPairs, pair_recipe
from ranks import run
from rivals import by_hand, rival
from single_process import Learned
from small_runs import assert_same_training
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cuma_ds.config import load_config

ROOT = Path(__file__).parents[2]
FULL = {"method": "full"}
SMALL = {"learning_rate": 1e-3, "max_grad_norm": 0.5}


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory, tiny_llama) -> Path:
    """The tiny Llama with one matrix as its embedding and as its head."""
    folder = tmp_path_factory.mktemp("models") / "tied-llama"
    config = AutoConfig.from_pretrained(tiny_llama, tie_word_embeddings=True)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


def trained_by_hand(path: Path, learns: type[Learned]):
    config = load_config(path)
    return by_hand(config, AutoModelForCausalLM.from_pretrained(config.model.path), learns)


@pytest.mark.multirank
@pytest.mark.parametrize("objective", ["sft", "dpo"])
@pytest.mark.parametrize(("world", "stages"), [(1, ("zero1", "zero3")), (2, ("zero1", "zero2", "zero3"))])
def test_full_is_a_plain_loop(world, stages, objective, tmp_path, tied_llama) -> None:
    make, learns = {"sft": ({}, Learned), "dpo": ({"make": pair_recipe}, LearnedPairs)}[objective]
    paths = []
    for stage in stages:
        for name, steps in (("first", 2), ("whole", 4)):
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            own = {"training": {**SMALL, "steps": steps, "schedule": "constant", "micro_batch_size": 2}}
            parallel = {"deepspeed_config": stage}
            place = {"run": {"output_dir": str(tmp_path / "runs"), "name": stage}}
            paths.append(rival(folder, tied_llama, stage, FULL, **make, **own, parallel=parallel, **place))
    results = run(world, [str(ROOT / "tests" / "helpers" / "train_many.py"), json.dumps([str(p) for p in paths])])
    assert [code for code, _ in results] == [0] * world, results[0][1][-3000:]
    assert results[0][1].count("after step 2") == len(stages)
    expected = trained_by_hand(paths[-1], learns)
    assert expected.losses[-1] < expected.losses[0]
    for path in paths[1::2]:
        assert_same_training(path, expected)
