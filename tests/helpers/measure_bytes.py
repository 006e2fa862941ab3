"""One rank that trains two small steps on a real backbone and prints what it held; started by a test."""

from __future__ import annotations

import json
import sys

import torch
from random_batch import random_batch

from cuma_ds.config import RunConfig
from cuma_ds.parallel.backbone import full_bytes, live_bytes, resident_bytes
from cuma_ds.parallel.ds_config import read_deepspeed_config
from cuma_ds.parallel.engine import AdapterEngine
from cuma_ds.parallel.topology import start_processes, with_expert_groups

model_path, ep_size = sys.argv[1], int(sys.argv[2])
topology = with_expert_groups(start_processes(120), ep_size)
config = RunConfig.model_validate(
    {
        "model": {"path": model_path, "dtype": "bfloat16"},
        "profiles": {"encoder": "not-read-here"},
        "parallel": {"deepspeed_config": "zero2_sharded_backbone", "ep_size": ep_size},
    }
)
settings = read_deepspeed_config(config, 1, 1, topology.world)
config = config.model_copy(update={"adapters": config.adapters.model_copy(update={"profile_dim": 8})})
engine = AdapterEngine(config, settings, topology, torch.optim.AdamW)
engine.model.prepare(torch.randn(9, 8), None)
base = engine.model.backbone
seen = [0]
for module in base.modules():
    if any(True for _ in module.parameters(recurse=False)):
        module.register_forward_hook(lambda *_: seen.append(live_bytes(base)))
        module.register_full_backward_hook(lambda *_: seen.append(live_bytes(base)))
at_rest = []
for _ in range(2):
    out = engine.forward(*random_batch(1, 4, 4, 8))
    engine.backward(out.logits.float().logsumexp(-1).mean() + out.balance_loss)
    engine.step(1e-3)
    at_rest.append(live_bytes(base))
result = {
    "held": resident_bytes(base),
    "full": full_bytes(base),
    "largest_layer": max(p.ds_numel * 2 for p in base.parameters() if not p.requires_grad),
    "live_at_rest": max(at_rest),
    "live_at_most": max(seen),
    "experts": engine.expert_bytes,
}
if topology.is_main:
    print("measured " + json.dumps(result))
