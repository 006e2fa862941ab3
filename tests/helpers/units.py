"""CPUs with and without units for 16-bit products compute the mixture of 16-bit backbones in different dtypes.

``CUMA_TEST_UNITS=forced`` makes every process of the tests take the 16-bit way, whatever CPU it runs on: torch
multiplies 16-bit numbers on all of them, only slowly on some. ``none`` makes them take the float32 way. Otherwise the
machine's own units decide.
"""

from __future__ import annotations

import os

import torch

UNITS = ("amx_tile", "avx512_bf16", "amx_fp16")


def force_units() -> None:
    """Let torch report all units, or none, if CUMA_TEST_UNITS says so."""
    asked = os.environ.get("CUMA_TEST_UNITS")
    if asked in ("forced", "none"):
        has = torch.cpu.get_capabilities() | dict.fromkeys(UNITS, asked == "forced")
        torch.cpu.get_capabilities = lambda: has
