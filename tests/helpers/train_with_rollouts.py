"""One rank that trains recipes and generates with the training engine before each step; started by a test."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch

from cuma_ds.config import RunConfig, load_config
from cuma_ds.data.rendering import Renderer
from cuma_ds.inference.generate import Completion, generate
from cuma_ds.inference.open import open_engine
from cuma_ds.inference.sampling import Sampling
from cuma_ds.parallel.backbone import load_tokenizer
from cuma_ds.parallel.engine import AdapterEngine
from cuma_ds.parallel.topology import start_processes, with_expert_groups
from cuma_ds.training import run
from cuma_ds.training.inputs import TrainingInputs
from cuma_ds.training.step import StepResult

run_step: Callable[..., StepResult] = run.run_step


def with_rollouts(config: RunConfig, engine: AdapterEngine, inputs: TrainingInputs, step: int) -> StepResult:
    """Two completions on the main rank, one that ends earlier on the next, none on the others."""
    opened = open_engine(engine, config, Renderer.of(load_tokenizer(config.model), config.data))
    lengths = {0: [6, 3], 1: [2]}.get(engine.topology.rank, [])
    profile_P = torch.ones(opened.model.config.profile_dim)
    completions = [Completion([7, 8, 9], Sampling(length, temperature=1.0), profile_P) for length in lengths]
    engine.train(False)
    generate(opened.decoder(2, scores=True), completions, opened.peers.all_done)
    engine.train()
    assert all(0 < len(one.tokens) == len(one.log_probabilities) <= one.max_new_tokens for one in completions)
    return run_step(config, engine, inputs, step)


run.run_step = with_rollouts
topology = start_processes(120)
for recipe in json.loads(sys.argv[1]):
    config = load_config(recipe)
    run.train(config, with_expert_groups(topology, config.parallel.ep_size))
