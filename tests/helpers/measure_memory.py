"""One rank that trains two steps on a real backbone and prints its peak of anonymous memory; started by a test.

Run with small malloc thresholds, so that freed tensors go back to the system and the peak is that of live tensors.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from pathlib import Path

import torch
from random_batch import random_batch

from cuma_ds.parallel.ds_config import read_deepspeed_config
from cuma_ds.parallel.engine import AdapterEngine
from cuma_ds.parallel.topology import start_processes, with_expert_groups
from cuma_ds.planning.cost import Work
from cuma_ds.recipe import load_config
from cuma_ds.training.optimizer import make_optimizer

WIDTH = 16


def resident(kind: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))


class Peak(threading.Thread):
    """Samples anonymous memory every two milliseconds, and asks the kernel, which misses no moment, where it can."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.most = resident("RssAnon")
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.002):
            self.most = max(self.most, resident("RssAnon"))

    def forget(self) -> bool:
        """Have the kernel's most begin now; False where it cannot."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            return True
        return False

    def ask(self) -> None:
        """Pages of files only become more, so that the kernel's most of all pages holds at least this many others."""
        self.most = max(self.most, resident("VmHWM") - resident("RssFile") - resident("RssShmem"))


config, work = load_config(sys.argv[1]), Work(**json.loads(sys.argv[2]))
topology = with_expert_groups(start_processes(120), config.parallel.ep_size)
torch.randn(64, 64, requires_grad=True).matmul(torch.randn(64, 64)).sum().backward()  # thread pools and allocator
peak = Peak()
settings = read_deepspeed_config(config, work.sequences, work.accumulation, topology.world)
config = config.model_copy(update={"adapters": config.adapters.model_copy(update={"profile_dim": WIDTH})})
engine = AdapterEngine(config, settings, topology, lambda groups: make_optimizer(groups, config.training))
peak.start()
asked = peak.forget()
for _ in range(2):
    out = engine.forward(*random_batch(work.sequences, work.length, work.kept, WIDTH))
    loss = out.logits.flatten(0, 1).float().logsumexp(-1).sum() + out.balance_loss
    del out
    engine.backward(loss)
    engine.step(1e-3)
peak.done.set()
peak.join()
if asked:
    peak.ask()
print(f"counted {topology.rank} " + json.dumps({"peak": peak.most - peak.before}), flush=True)
