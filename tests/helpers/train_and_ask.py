"""One rank that trains recipes and then runs the trained model; rank 0 keeps asked.safetensors in each run folder."""

from __future__ import annotations

import json
import sys

import torch
from safetensors.torch import load_file, save_file

from cuma_ds.parallel.topology import start_processes, with_expert_groups
from cuma_ds.recipe import load_config
from cuma_ds.training import run

engines = []
AdapterEngine = run.AdapterEngine
run.AdapterEngine = lambda *arguments: engines.append(AdapterEngine(*arguments)) or engines[-1]

topology = start_processes(120)
for recipe in json.loads(sys.argv[1]):
    config = load_config(recipe)
    folder = run.train(config, with_expert_groups(topology, config.parallel.ep_size))
    inputs = load_file(sys.argv[2])
    inputs["profile_embeddings"] = inputs.pop("embeddings")
    model = engines[-1].model.cuma.eval()
    with torch.no_grad():
        logits = model(**inputs).logits.float()
    words = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    if topology.is_main:
        save_file({"logits": logits.contiguous(), "words": words}, folder / "asked.safetensors")
