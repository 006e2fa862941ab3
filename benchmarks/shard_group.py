"""What a step takes when groups of ranks hold one copy of the frozen backbone between them, quantised or not.

    torchrun --nproc_per_node 4 benchmarks/shard_group.py --groups 4 2
    torchrun --nproc_per_node 2 benchmarks/shard_group.py --groups 2 --quantisations none nf4 --dtype bfloat16

All variants take turns within one run, so that a drifting machine hurts them alike. A round's time is that of the
slowest rank; its processor time is that of all ranks together, which other work on the machine lengthens less. Medians
are printed, and ratios to the first variant. Bytes are what one rank sends in one step to gather the backbone, and what
it holds of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from dispatch import Step, model_step, take_turns
from rich.console import Console
from rich.table import Table

from cuma_ds.parallel.backbone import resident_bytes
from cuma_ds.parallel.ds_config import DS_CONFIGS
from cuma_ds.parallel.engine import AdapterEngine
from cuma_ds.parallel.topology import leave_processes, start_processes, with_expert_groups


def deepspeed_config(folder: Path, group: int) -> str:
    """The file of a configuration with this shard group."""
    settings = json.loads((DS_CONFIGS / "zero2_sharded_backbone.json").read_text(encoding="utf-8"))
    settings["frozen_backbone"]["shard_group"] = group
    file = folder / f"group-{group}.json"
    file.write_text(json.dumps(settings), encoding="utf-8")
    return str(file)


def noting(step: Step, spent: list[float]) -> Callable[[], None]:
    """The step, which notes this rank's processor time."""

    def run() -> None:
        start = time.process_time()
        step()
        spent.append(time.process_time() - start)

    return run


def over_ranks(spent: list[float]) -> list[float]:
    """The sum over ranks, round by round, without the two for warming up."""
    total = torch.tensor(spent[2:])
    dist.all_reduce(total)
    return total.tolist()


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 2], help="ranks of a shard group")
    parser.add_argument("--quantisations", nargs="+", default=["none"], choices=["none", "int8", "nf4"])
    parser.add_argument("--ep", type=int, default=2, help="expert-parallel size")
    parser.add_argument("--model", default=".cache/models/SmolLM2-135M-Instruct", help="backbone folder")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=1, help="sequences per rank")
    parser.add_argument("--length", type=int, default=32, help="tokens per sequence")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds, after two for warming up")
    arguments = parser.parse_args()
    topology = with_expert_groups(start_processes(600), arguments.ep)
    steps: dict[str, Step] = {}
    engines: dict[str, AdapterEngine] = {}
    with tempfile.TemporaryDirectory() as folder:
        for group in arguments.groups:
            file = deepspeed_config(Path(folder), group)
            for kind in arguments.quantisations:
                arguments.quantisation, name = kind, f"{group}, {kind}"
                steps[name], engines[name] = model_step(arguments, topology, file)
    spent: dict[str, list[float]] = {name: [] for name in steps}
    seconds = take_turns({name: noting(step, spent[name]) for name, step in steps.items()}, arguments.rounds, topology)
    processor = {name: statistics.median(over_ranks(times)) for name, times in spent.items()}
    table = Table(
        title=f"{topology.world} ranks, {topology.device.type}, {torch.get_num_threads()} threads each, "
        f"ep {arguments.ep}, {arguments.batch * arguments.length} tokens a rank, {arguments.dtype}, median of "
        f"{arguments.rounds} rounds"
    )
    headings = ("shard group, quantisation", "ms", "faster", "min", "max", "CPU ms", "less", "MB sent", "MB held")
    for heading in headings:
        table.add_column(heading, justify="right")
    first, first_processor = statistics.median(next(iter(seconds.values()))), next(iter(processor.values()))
    for name, times in seconds.items():
        median, engine = statistics.median(times), engines[name]
        sent = engine.take_bytes_sent()["backbone"] / (arguments.rounds + 2)
        table.add_row(
            name, f"{1e3 * median:.0f}", f"{first / median:.2f}", f"{1e3 * min(times):.0f}", f"{1e3 * max(times):.0f}",
            f"{1e3 * processor[name]:.0f}", f"{first_processor / processor[name]:.2f}",
            f"{sent / 1e6:.1f}", f"{resident_bytes(engine.model.backbone) / 1e6:.1f}",
        )  # fmt: skip
    leave_processes()
    if topology.is_main:
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
