"""What the operator benchmarks share: variants that take turns, medians, one table, and the bandwidth of a copy."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

Run = Callable[[], object]


def parser(about: str | None, rounds: int = 25) -> argparse.ArgumentParser:
    """The options every operator benchmark has."""
    made = argparse.ArgumentParser(description=about)
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the tokens' tensors"
    )
    made.add_argument("--rounds", type=int, default=rounds, help="counted rounds, after two for warming up")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    return made


def backbone(arguments: argparse.Namespace) -> nn.Module:
    """The frozen backbone: the model of a folder, or random weights of the shapes that a config.json says."""
    dtype = getattr(torch, arguments.dtype)
    if Path(arguments.model).is_dir():
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(arguments.device)
    else:
        config = AutoConfig.from_pretrained(arguments.model)
        config.num_hidden_layers = arguments.layers or config.num_hidden_layers
        with torch.device(arguments.device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(False)


def turns(variants: Mapping[str, Run], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each in every round; they take turns, so that a machine that drifts hurts all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_number in range(rounds + 2):
        for name, run in variants.items():
            elapsed = _cuda_seconds(run) if device.startswith("cuda") else _cpu_seconds(run)
            if round_number >= 2:
                seconds[name].append(elapsed)
    return seconds


def report(title: str, variants: Mapping[str, Run], moved: int, arguments: argparse.Namespace) -> None:
    """Time the variants (the first is ours); print medians and ratios, on CUDA also the bandwidth next to a copy's.

    Args:
        title: above the table.
        variants: name and call of each.
        moved: bytes that the operator must read and write at least.
        arguments: of :func:`parser`.
    """
    seconds = {
        name: statistics.median(times) for name, times in turns(variants, arguments.rounds, arguments.device).items()
    }
    ours = next(iter(seconds.values()))
    where = (
        f"{arguments.device}, {arguments.threads} threads"
        if arguments.device == "cpu"
        else torch.cuda.get_device_name()
    )
    table = Table(title=f"{title}, {arguments.dtype}, {where}, median of {arguments.rounds} rounds")
    headings = ["variant", "ms", "cuma-ds / this"] + (["GB/s", "of a copy"] if arguments.device != "cpu" else [])
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    copy = _copy_bandwidth(moved, arguments.device) if arguments.device != "cpu" else 0.0
    for name, value in seconds.items():
        bandwidth = [f"{moved / value / 1e9:.0f}", f"{moved / value / copy:.2f}"] if copy else []
        table.add_row(name, f"{value * 1e3:.3f}", f"{ours / value:.2f}", *bandwidth)
    Console(width=110).print(table)


def with_backward(forward: Callable[[], Tensor], leaves: list[Tensor], d_out: Tensor) -> Run:
    """The call, and its gradients for ``leaves``."""
    return lambda: torch.autograd.grad(forward(), leaves, d_out)


def size_of(*tensors: Tensor) -> int:
    """Bytes of all of them."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _cpu_seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _cuda_seconds(run: Run) -> float:
    """Seconds on the GPU.

    It starts late, so that launches are queued by then, unless the call itself waits for the GPU.
    """
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000)  # clock cycles, about 2 ms
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _copy_bandwidth(moved: int, device: str) -> float:
    """Bytes per second of a copy that moves as much, read and written."""
    source = torch.empty(max(1, moved // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = turns({"copy": lambda: target.copy_(source)}, 15, device)["copy"]
    return 2 * source.numel() / statistics.median(times)
