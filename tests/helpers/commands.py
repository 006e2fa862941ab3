"""Commands of launchers/ and what they leave."""

from __future__ import annotations

from pathlib import Path

import torch

from cuma_ds.parallel.stored import read_state

TRAIN = "launchers/train.py"


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for name in read_state(folder)["files"]:
        tensors |= load_file(folder / name)
    return tensors


def one_line(results: list[tuple[int, str]], *parts: str) -> None:
    """Every rank exits with 2, and the ranks together print one line of error with these parts in it."""
    assert [code for code, _ in results] == [2] * len(results), results
    lines = [
        line for _, output in results for line in output.splitlines() if "error" in line.lower() or "Traceback" in line
    ]
    assert len(lines) == 1, lines
    for part in parts:
        assert part in lines[0], lines[0]
