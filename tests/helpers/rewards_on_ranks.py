"""One of several ranks; started by a test. It rewards its share of 12 completions, rank 0 none at first."""

from __future__ import annotations

import json

import numpy as np

from cuma_ds.config import GrpoSection
from cuma_ds.errors import CumaError
from cuma_ds.parallel.agreement import together
from cuma_ds.parallel.topology import start_processes
from cuma_ds.training.groups import Groups
from cuma_ds.training.rollout.advantage import Advantages
from cuma_ds.training.rollout.callables import RewardInput, called

topology = start_processes(60)
section = GrpoSection(group_size=3, advantage="history", robust="groupdro", scale_rewards="batch")
groups = Groups(("a", "b"), np.array([0, 1, 2]))
made = Advantages(section, ["x", "y"], [1.0, 0.5], groups, topology)
rng = np.random.default_rng(0)
advantages, numbers = [], []
for shares in ([0, 4], [2, 2]):
    rewards = rng.normal(size=(12, 2))
    rewards[rng.random((12, 2)) < 0.3] = np.nan
    profiles = np.repeat(rng.integers(0, 3, size=4), 3)
    if topology.world > 1:
        start = 3 * sum(shares[: topology.rank])
        own = slice(start, start + 3 * shares[topology.rank])
        rewards, profiles = rewards[own], profiles[own]
    found = made(rewards, profiles)
    advantages.append(found.advantage_M.tolist())
    numbers.append(found.numbers)
state = {name: tensor.tolist() for name, tensor in made.state().items()}


def bad(prompts: list, completions: list, profiles: list, **columns: list) -> list[float]:
    return [float("nan") if text == "bad" else 1.0 for text in completions]


try:
    text = "bad" if topology.rank == topology.world - 1 else "good"
    together(lambda: called("mine:bad", bad, RewardInput([[]], [text], [{}], {})))
    error = ["none", ""]
except CumaError as raised:
    error = [type(raised).__name__, str(raised)]
print(json.dumps({"advantages": advantages, "numbers": numbers, "state": state, "error": error}), flush=True)
