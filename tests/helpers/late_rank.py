"""One of two ranks; started by a test. Rank 1 comes late to the lowering of the limit, then misses two collectives."""

from __future__ import annotations

import json
import time

import torch
import torch.distributed as dist

from cuma_ds.parallel.topology import start_processes, wait_for_peers_at_most, with_expert_groups

topology = with_expert_groups(start_processes(120), 2)
if not topology.is_main:
    time.sleep(5)  # loads a model slowly
wait_for_peers_at_most(3)
total = topology.sum_over_ranks(torch.ones(()))
waited = []
for group in (None, topology.ep_group):
    if topology.is_main:
        began = time.monotonic()
        try:
            dist.all_reduce(torch.ones(()), group=group)
        except RuntimeError:
            waited.append(time.monotonic() - began)
if topology.is_main:
    print(json.dumps({"met_the_late_rank": float(total) == 2, "waited": waited, "groups": len(waited)}), flush=True)
else:
    time.sleep(15)
