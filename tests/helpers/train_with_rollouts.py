"""One rank that trains recipes and generates with the training engine before each step; started by a test.

Each job is a recipe, how its backbone is held meanwhile, and a file for what was written and what that took.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from counting import sent

from cuma_ds.config import RunConfig
from cuma_ds.data.rendering import Renderer
from cuma_ds.inference.generate import Completion, generate
from cuma_ds.inference.open import open_engine
from cuma_ds.inference.sampling import Sampling
from cuma_ds.parallel.backbone import full_bytes, live_bytes, load_tokenizer
from cuma_ds.parallel.engine import AdapterEngine
from cuma_ds.parallel.topology import start_processes, with_expert_groups
from cuma_ds.planning import rollouts as planning
from cuma_ds.recipe import load_config
from cuma_ds.training import loop, run
from cuma_ds.training.inputs import TrainingInputs
from cuma_ds.training.step import StepResult

LENGTHS = (6, 2, 3)  # with two ranks, the second one is done earlier; with four, the last one writes nothing
run_step: Callable[..., StepResult] = loop.run_step
rollouts: list[dict] = []
gathered = False


# Share of what is needed that is free on the first rank and on the others.
FREE = ((1.2, 1.2), (1.2, 1.0), (0.1, 1.2))


def fits(engine: AdapterEngine, free: tuple[float, float]) -> bool:
    """Whether ``rollout.backbone: auto`` gathers with so much memory."""
    text = engine.model.backbone.config.get_text_config()
    needed = full_bytes(engine.model.backbone) + planning.generation_bytes(text, 4, 2, 9)
    available = needed * free[engine.topology.rank > 0] * engine.topology.world
    with mock.patch("psutil.virtual_memory", return_value=SimpleNamespace(available=available)):
        return planning.holds_whole_backbone(engine, 2, 9)


def with_rollouts(config: RunConfig, engine: AdapterEngine, inputs: TrainingInputs, step: int) -> StepResult:
    rank, world = engine.topology.rank, engine.topology.world
    opened = open_engine(engine, config, Renderer.of(load_tokenizer(config.model), config.data))
    profile_P = torch.ones(opened.model.config.profile_dim)
    sampling = [Sampling(length, temperature=1.0, seed=number) for number, length in enumerate(LENGTHS)]
    completions = [Completion([7, 8, 9], one, profile_P) for one in sampling[rank::world]]
    forwards: list[int] = []
    live: list[int] = [live_bytes(engine.model.backbone)]
    counter = engine.model.backbone.register_forward_pre_hook(lambda *_: forwards.append(1))
    engine.train(False)
    sent.clear()
    with engine.gathered_backbone() if gathered else contextlib.nullcontext():
        generate(opened.decoder(2, scores=True), completions, opened.peers.all_done)
        live.append(live_bytes(engine.model.backbone))
    moved = sent["all_gather"]
    counter.remove()
    engine.train()
    live.append(live_bytes(engine.model.backbone))
    assert all(0 < len(one.tokens) == len(one.log_probabilities) <= one.max_new_tokens for one in completions)
    written = [(one.tokens, one.log_probabilities) for one in completions]
    room = [fits(engine, free) for free in FREE]
    rollouts.append({"room": room, "written": written, "forwards": len(forwards), "all_gather": moved, "live": live})
    return run_step(config, engine, inputs, step)


topology = start_processes(120)
for job in json.loads(sys.argv[1]):
    rollouts, gathered = [], job["backbone"] == "gathered"
    loop.run_step = with_rollouts if job["backbone"] else run_step
    config = load_config(job["recipe"])
    run.train(config, with_expert_groups(topology, config.parallel.ep_size))
    Path(f"{job['recipe']}.rank{topology.rank}.json").write_text(json.dumps(rollouts))
