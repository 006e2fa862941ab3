"""One rank that loads models sharded and whole and compares them; started by a test, rank 0 prints what it saw."""

from __future__ import annotations

import json
import sys
import warnings

import torch
import torch.distributed as dist
from ranks import ROOT

from cuma_ds.config import ModelSection
from cuma_ds.errors import ModelError
from cuma_ds.parallel.backbone import load_backbone, place_backbone, resident_bytes
from cuma_ds.parallel.ds_config import DeepSpeedSettings, FrozenBackbone
from cuma_ds.parallel.topology import leave_processes, start_processes

SHARDED = DeepSpeedSettings({}, 2, FrozenBackbone(sharded=True))
topology = start_processes(120)
sys.path.insert(0, str(ROOT / "benchmarks"))
import sharded_load  # noqa: E402

ranks = [{}] * topology.world
dist.all_gather_object(ranks, sharded_load.load(sys.argv[2], "streamed"))
if topology.is_main:
    print("seen " + json.dumps({"name": "large", "ranks": ranks}))
for name, path, dtype in json.loads(sys.argv[1]):
    section = ModelSection(path=path, dtype=dtype, attention="eager" if name == "gemma2" else "sdpa")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sharded = place_backbone(section, SHARDED, topology.device).backbone
    whole = load_backbone(section)
    ids = torch.arange(2, 20).view(2, 9)
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (sharded, whole)]
    buffers = [dict(model.named_buffers()) for model in (sharded, whole)]
    parameters = [dict(model.named_parameters()) for model in (sharded, whole)]
    seen = {
        "name": name,
        "reasons": [str(warning.message) for warning in said if str(warning.message).startswith("model.path")],
        "same_logits": torch.equal(*logits),
        "same_buffers": buffers[0].keys() == buffers[1].keys()
        and all(torch.equal(b, buffers[1][k]) and b.dtype == buffers[1][k].dtype for k, b in buffers[0].items()),
        "same_names": [(k, p.dtype) for k, p in parameters[0].items()]
        == [(k, p.dtype) for k, p in parameters[1].items()],
        "same_generation": sharded.generation_config.to_dict() == whole.generation_config.to_dict(),
        "share": resident_bytes(sharded) / resident_bytes(whole),
        "varied": float(logits[1].float().std()),
    }
    if topology.is_main:
        print("seen " + json.dumps(seen))
try:  # as on two machines whose copies differ
    own = ModelSection(path=json.loads(sys.argv[1])[topology.rank][1], dtype="float32")
    place_backbone(own, SHARDED, topology.device)
except ModelError as error:
    print("seen " + json.dumps({"name": "refused", "error": str(error)}))
leave_processes()
