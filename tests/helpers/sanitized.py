"""Compiling for AddressSanitizer, and running a Python process that loads what was compiled so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FLAGS = ["-fsanitize=address,alignment,shift,bounds", "-fno-sanitize-recover=all"]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """A Python process with AddressSanitizer's runtime in front; leaks of the interpreter are not asked about."""
    # libstdc++ too: AddressSanitizer looks for its __cxa_throw once, at the start.
    libraries = ("libasan.so", "libstdc++.so.6")
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        for name in libraries
    ]
    paths = os.pathsep.join([str(HERE), str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    preload = ":".join(one.stdout.strip() for one in found)
    environment = {
        **os.environ,
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "2",
    }
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, env=environment, timeout=300
    )
