"""One rank that trains steps and notes which layers are being gathered while another one computes; started by a test.

Prints, for the forward and the backward pass of the last step, each frozen module in the order they ran, with what
ZeRO-3 says of the parameters of every module when it starts and when it ends, and the numbers in each module.
"""

from __future__ import annotations

import json
import sys

import torch
from random_batch import random_batch
from torch import nn

from cuma_ds.parallel.deepspeed_compat import is_partitioned
from cuma_ds.parallel.ds_config import read_deepspeed_config
from cuma_ds.parallel.engine import AdapterEngine
from cuma_ds.parallel.topology import start_processes, with_expert_groups
from cuma_ds.recipe import load_config
from cuma_ds.training.optimizer import make_optimizer

WIDTH, STEPS = 16, 4

topology = with_expert_groups(start_processes(120), 1)


def own(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters(recurse=False) if is_partitioned(parameter)]


def order(path: str) -> dict[str, list | dict[str, int]]:
    config = load_config(path)
    settings = read_deepspeed_config(config, 2, 1, topology.world)
    sized = config.model_copy(update={"adapters": config.adapters.model_copy(update={"profile_dim": WIDTH})})
    engine = AdapterEngine(sized, settings, topology, lambda groups: make_optimizer(groups, config.training))
    modules = {name: module for name, module in engine.model.backbone.named_modules() if own(module)}
    numbers = {name: sum(parameter.ds_numel for parameter in own(module)) for name, module in modules.items()}
    events: dict[str, list] = {"forward": [], "backward": []}

    def states() -> dict[str, str]:
        return {name: own(module)[0].ds_status.name for name, module in modules.items()}

    def noting(run: str, event: str, name: str):
        return lambda *_: events[run].append([event, name, states()])

    for name, module in modules.items():
        module.register_forward_pre_hook(noting("forward", "start", name))
        module.register_forward_hook(noting("forward", "end", name))
        module.register_full_backward_hook(noting("backward", "end", name))
    for _ in range(STEPS):  # ZeRO-3 learns the order of modules in the first ones
        for run in events.values():
            run.clear()
        torch.manual_seed(topology.rank)
        out = engine.forward(*random_batch(2, 8, 1, WIDTH))
        engine.backward(out.logits.logsumexp(-1).mean() + out.balance_loss)
        engine.step(1e-3)
    return {**events, "numbers": numbers}


print(f"counted {topology.rank} " + json.dumps([order(path) for path in json.loads(sys.argv[1])]), flush=True)
