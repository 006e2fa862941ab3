"""One rank that trains recipes on pretended machines, and then asks the trained model; started by a test.

Each rank writes what it held and sent beside each recipe: what the engine says, and what the process group counted
while layers ran, that is without the optimizer's step.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from counting import links
from random_batch import random_batch

RANKS_PER_MACHINE = int(sys.argv[2])
os.environ["LOCAL_WORLD_SIZE"] = str(RANKS_PER_MACHINE)
os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % RANKS_PER_MACHINE)

from cuma_ds.config import RunConfig  # noqa: E402
from cuma_ds.errors import CumaError  # noqa: E402
from cuma_ds.inference.open import load_trained, open_run  # noqa: E402
from cuma_ds.methods.cuma import model_inputs  # noqa: E402
from cuma_ds.parallel.backbone import full_bytes, resident_bytes  # noqa: E402
from cuma_ds.parallel.engine import AdapterEngine  # noqa: E402
from cuma_ds.parallel.topology import Topology, start_processes, with_expert_groups  # noqa: E402
from cuma_ds.recipe import load_config  # noqa: E402
from cuma_ds.runs import Run  # noqa: E402
from cuma_ds.training import loop, run  # noqa: E402

counted: list[dict] = []
run_step, optimizer_step = loop.run_step, AdapterEngine.step


def gathered_apart(engine: AdapterEngine) -> float:
    """How far answers with the gathered backbone are from those with its shards, between two steps."""
    torch.manual_seed(7)
    batch, table = random_batch(1, 6, 2, engine.model.cuma.config.profile_dim)
    engine.train(False)
    with torch.no_grad():
        sharded = engine.forward(batch, table).logits
        with engine.gathered_backbone():
            gathered = engine.forward(batch, table).logits
    engine.train()
    engine.take_bytes_sent()  # not of a step
    return float((gathered - sharded).abs().max())


def counting_step(config, engine, inputs, step):
    apart = gathered_apart(engine)
    links.clear()
    result = run_step(config, engine, inputs, step)
    base = engine.model.backbone
    gathered = [[list(ranks), moved] for (name, ranks), moved in links.items() if name == "all_gather"]
    told = {"told": result.bytes_sent, "all_gather": gathered}
    told["numbers"] = engine.backbone_parameters
    counted.append(told | {"gathered_apart": apart, "held": resident_bytes(base), "full": full_bytes(base)})
    return result


def uncounted(engine: AdapterEngine, learning_rate: float) -> None:
    before = links.copy()
    optimizer_step(engine, learning_rate)
    links.clear()
    links.update(before)


def asked(config: RunConfig, topology: Topology) -> float:
    """How far answers of the model opened on these ranks are from those of the whole model."""
    opened = open_run(config.run_dir, topology=topology)
    held = Run.open(config.run_dir)
    trained = held.trained(held.config(), None)
    whole = load_trained(config, trained.adapters, trained.table)
    torch.manual_seed(5)  # every rank asks the same, so that all make as many forwards
    batch, table = random_batch(2, 8, 2, opened.model.config.profile_dim)
    inputs = model_inputs(batch, table, topology.device)
    if opened.peers.announce is not None:
        opened.peers.announce((batch.profile_BS >= 0).sum())
    with torch.no_grad():
        return float((opened.model(**inputs).logits - whole(**inputs).logits).abs().max())


loop.run_step, AdapterEngine.step = counting_step, uncounted
topology = start_processes(120)
for recipe in json.loads(sys.argv[1]):
    counted, config = [], load_config(recipe)
    placed = with_expert_groups(topology, config.parallel.ep_size)
    try:
        run.train(config, placed)
        said = {"steps": counted, "apart": asked(config, placed)}
    except CumaError as error:
        said = {"error": str(error)}
    Path(f"{recipe}.rank{topology.rank}.json").write_text(json.dumps(said))
