"""One rank that trains a list of recipes in one process; started by ranks.run_recipes."""

from __future__ import annotations

import json
import sys

from cuma_ds.parallel.topology import start_processes, with_expert_groups
from cuma_ds.recipe import load_config
from cuma_ds.training.run import train

topology = start_processes(120)
for recipe in json.loads(sys.argv[1]):
    config = load_config(recipe)
    train(config, with_expert_groups(topology, config.parallel.ep_size))
