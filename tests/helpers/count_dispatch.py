"""One rank that mixes a sweep of shapes with every dispatch and prints the bytes counted for each."""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from counting import sent

from cuma_ds.adapters import CumaConfig
from cuma_ds.adapters.experts import Experts
from cuma_ds.adapters.mixture import Routes
from cuma_ds.parallel.dispatch import ExpertGroup, make_dispatcher

cases = json.loads(sys.argv[1])
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
results = []
for case in cases:
    config = CumaConfig(
        num_experts=case["experts"], top_k=case["top_k"], lora_r=case["rank"], shared_a=case["shared_a"]
    )
    dtype = getattr(torch, case["dtype"])
    tokens, top_k = case["tokens"], case["top_k"]
    # Balanced routing: the pairs walk around the experts.
    pairs = torch.arange(tokens * top_k).view(tokens, top_k) % config.num_experts
    counted = {}
    for kind in ("all_to_all", "gather_experts", "auto"):
        experts = Experts(config, case["in_features"], case["out_features"])
        experts.reset_parameters(torch.Generator().manual_seed(0))
        experts.keep(rank * config.num_experts // world, config.num_experts // world)
        dispatcher = make_dispatcher(kind, ExpertGroup(dist.group.WORLD), top_k)
        dispatcher.agree_on_tokens(torch.tensor(tokens))
        x_TD = torch.randn(tokens, case["in_features"], dtype=dtype, requires_grad=True)
        weight_TK = torch.full(pairs.shape, 1 / top_k, requires_grad=True)
        sent.clear()
        dispatched = dispatcher.dispatch(x_TD, Routes(weight_TK, pairs.int()), experts)
        out_TO = dispatcher.combine(experts(*dispatched.wait()), dispatched)
        out_TO.float().square().sum().backward()
        counted[kind] = {name: count for name, count in sent.items() if count}
        told = {name: count for name, count in dispatcher.take_bytes_sent().items() if count}
        assert told == counted[kind], (case, kind, told, counted[kind])
    results.append(counted)
print(f"counted {rank} " + json.dumps(results), flush=True)
dist.destroy_process_group()
