"""One rank that trains a small backbone while every collective is counted; prints the counts and the planner's."""

from __future__ import annotations

import json
import sys

import torch
from counting import sent
from random_batch import random_batch

from cuma_ds.adapters.experts import Dispatched, Experts
from cuma_ds.adapters.mixture import Routes
from cuma_ds.parallel.ds_config import read_deepspeed_config
from cuma_ds.parallel.engine import AdapterEngine
from cuma_ds.parallel.topology import start_processes, with_expert_groups
from cuma_ds.planning.cost import Hardware, Work
from cuma_ds.planning.plan import Planner
from cuma_ds.planning.skeleton import read_model_config
from cuma_ds.recipe import load_config
from cuma_ds.training.optimizer import make_optimizer

WIDTH = 16

topology = start_processes(120)


def count(path: str, work: Work) -> dict:
    """Two steps of one recipe, the second of them counted."""
    config = load_config(path)
    placed = with_expert_groups(topology, config.parallel.ep_size)
    settings = read_deepspeed_config(config, work.sequences, work.accumulation, placed.world)
    sized = config.model_copy(update={"adapters": config.adapters.model_copy(update={"profile_dim": WIDTH})})
    engine = AdapterEngine(sized, settings, placed, lambda groups: make_optimizer(groups, config.training))
    torch.manual_seed(placed.rank)

    def step() -> None:
        for _ in range(work.accumulation):
            out = engine.forward(*random_batch(work.sequences, work.length, work.kept, WIDTH))
            engine.backward(out.logits.logsumexp(-1).mean() + (0.0 if out.balance_loss is None else out.balance_loss))
            engine.step(1e-3)

    step()  # ZeRO learns the order of the modules in its first step
    sent.clear()
    engine.take_bytes_sent()
    chosen_LE: list[list[int]] = []  # tokens that each adapted linear sends to each expert, forward by forward
    if engine.dispatcher is not None:
        dispatch = engine.dispatcher.dispatch

        def counting(x_TI: torch.Tensor, routes: Routes, experts: Experts) -> Dispatched:
            chosen_LE.append(routes.expert_TK.flatten().bincount(minlength=experts.num_experts).tolist())
            return dispatch(x_TI, routes, experts)

        engine.dispatcher.dispatch = counting  # type: ignore[method-assign]
    step()
    plan = Planner(config, read_model_config(config.model.path), WIDTH).plan(placed.world, work, Hardware())
    return {
        "counted": {name: moved for name, moved in sent.items() if moved},
        "told": engine.take_bytes_sent(),
        "predicted": plan.wire,
        "links": plan.links,
        "chosen": chosen_LE,
    }


results = [count(path, Work(**json.loads(sys.argv[2]))) for path in json.loads(sys.argv[1])]
print(f"counted {topology.rank} " + json.dumps(results), flush=True)
