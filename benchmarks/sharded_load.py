"""Anonymous memory per rank while a sharded backbone loads, slice by slice or through transformers' ZeRO-3 loading.

    torchrun --nproc_per_node 4 benchmarks/sharded_load.py

A random Llama is written to a temporary folder, one file a layer; every rank samples RssAnon of its own process while
it loads.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from cuma_ds.config import ModelSection
from cuma_ds.parallel import backbone
from cuma_ds.parallel.ds_config import DeepSpeedSettings, FrozenBackbone
from cuma_ds.parallel.streaming import NotStreamable
from cuma_ds.parallel.topology import leave_processes, start_processes

SHAPES = {  # name: hidden, intermediate, layers, vocabulary
    "0.25GB": (1024, 4096, 8, 1000),
    "2.2GB": (2048, 5632, 22, 32000),
}


def shapes_of(size: str) -> tuple[LlamaConfig, dict[str, torch.Size]]:
    """Configuration and parameter shapes of a model."""
    hidden, intermediate, layers, vocabulary = SHAPES[size]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, vocab_size=vocabulary,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        return config, {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}


def write_model(folder: Path, size: str) -> None:
    """A random bfloat16 Llama in several files."""
    config, shapes = shapes_of(size)
    config.save_pretrained(folder)
    by_file: dict[str, list[str]] = {}
    for name in shapes:
        part = name.split(".")[2] if ".layers." in name else "outside"
        by_file.setdefault(f"model-{part}.safetensors", []).append(name)
    for file, names in by_file.items():
        save_file(
            {name: torch.empty(shapes[name], dtype=torch.bfloat16).uniform_(-0.1, 0.1) for name in names}, folder / file
        )
    index = {"metadata": {}, "weight_map": {name: file for file, names in by_file.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def load(folder: str, how: str) -> dict[str, float]:
    """Load while sampling every millisecond."""
    if how == "transformers":

        def refuse(*_: object) -> None:
            raise NotStreamable("asked for")

        backbone.plan_streaming = refuse  # type: ignore[assignment]
    before, peak, done = anonymous_bytes(), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    settings = DeepSpeedSettings({}, 2, FrozenBackbone(sharded=True))
    model = backbone.place_backbone(ModelSection(path=folder), settings, torch.device("cpu")).backbone
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    shard = backbone.resident_bytes(model)
    return {"before": before, "peak": peak[0], "after": anonymous_bytes(), "shard": shard, "seconds": seconds}


def main() -> None:
    """Measure on every rank and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="2.2GB", choices=SHAPES, help="model to write")
    parser.add_argument("--how", default="streamed", choices=["streamed", "transformers"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if os.environ.get("RANK", "0") == "0":  # in a process of its own, whose memory does not count
            writer = multiprocessing.get_context("fork").Process(
                target=write_model, args=(Path(folder), arguments.size)
            )
            writer.start()
            writer.join()
        topology = start_processes(600)
        shared = [folder]
        dist.broadcast_object_list(shared)
        ranks: list[dict[str, float]] = [{}] * topology.world
        dist.all_gather_object(ranks, load(shared[0], arguments.how))
        leave_processes()
    if not topology.is_main:
        return
    sizes = [2 * shape.numel() for shape in shapes_of(arguments.size)[1].values()]
    table = Table(
        title=f"loading {sum(sizes) / 1e6:.0f} MB of bfloat16, largest parameter {max(sizes) / 1e6:.0f} MB, "
        f"{arguments.how}; anonymous memory in MB"
    )
    for heading in ("rank", "shard", "before", "peak", "peak - before", "after", "seconds"):
        table.add_column(heading, justify="right")
    for rank, one in enumerate(ranks):
        values = [one["shard"], one["before"], one["peak"], one["peak"] - one["before"], one["after"]]
        table.add_row(str(rank), *(f"{value / 1e6:.0f}" for value in values), f"{one['seconds']:.1f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
