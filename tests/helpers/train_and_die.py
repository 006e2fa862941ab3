"""One rank that trains a recipe and kills itself, as the machine would, at a call of the engine; started by a test.

Arguments: the recipe, the engine's method, and the number of the call (from 1) that is not made; 0 lives.
"""

from __future__ import annotations

import os
import signal
import sys

from cuma_ds.config import load_config
from cuma_ds.parallel.engine import AdapterEngine
from cuma_ds.parallel.topology import start_processes, with_expert_groups
from cuma_ds.training.objectives import reference
from cuma_ds.training.run import train

recipe, method, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
call, calls = getattr(AdapterEngine, method), 0


def deadly(*arguments: object) -> object:
    global calls
    calls += 1
    if calls == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return call(*arguments)


setattr(AdapterEngine, method, deadly)
reference._SECONDS_BETWEEN_SAVES = 0.0
topology = start_processes(120)
config = load_config(recipe)
train(config, with_expert_groups(topology, config.parallel.ep_size))
