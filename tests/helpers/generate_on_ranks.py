"""One rank that generates with a run's model, held by all ranks together; writes what it wrote to OUT-RANK.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from cuma_ds.inference.generate import Completion, generate
from cuma_ds.inference.open import open_run
from cuma_ds.inference.sampling import Sampling
from cuma_ds.parallel.topology import start_processes

topology = start_processes(120)
for job in json.loads(sys.argv[1]):
    opened = open_run(job["run"], overrides=job["overrides"], topology=topology)
    decoder = opened.decoder(job["most"], scores=True)
    completions = [
        Completion(one["prompt"], Sampling(**one["sampling"]), torch.tensor(one["profile"]))
        for one in job["prompts"]
        if one["rank"] == topology.rank
    ]
    generate(decoder, completions, opened.peers.all_done)
    found = [[completion.tokens, completion.log_probabilities, completion.finish] for completion in completions]
    Path(f"{job['out']}-{topology.rank}.json").write_text(json.dumps(found))
