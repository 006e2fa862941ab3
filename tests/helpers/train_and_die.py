"""One rank that trains a recipe and is killed at its n-th forward of generation or n-th backward; started by a test."""

from __future__ import annotations

import json
import os
import signal
import sys

from cuma_ds.inference.generate import Decoder
from cuma_ds.parallel.engine import AdapterEngine
from cuma_ds.parallel.topology import start_processes, with_expert_groups
from cuma_ds.recipe import load_config
from cuma_ds.training.objectives import reference
from cuma_ds.training.run import train

recipe, (owner, name), count = json.loads(sys.argv[1])
kind = {"Decoder": Decoder, "AdapterEngine": AdapterEngine}[owner]
work, done = getattr(kind, name), 0


def counted(*arguments):
    global done
    done += 1
    if done == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return work(*arguments)


setattr(kind, name, counted)
reference._SECONDS_BETWEEN_SAVES = 0.0  # what is known of the reference is saved after each step
topology = start_processes(120)
config = load_config(recipe)
train(config, with_expert_groups(topology, config.parallel.ep_size))
