"""Compile every CUDA kernel for every architecture and print what each uses. Warnings and spills are errors.

``make test-cuda-compile`` runs this where nvcc is; no GPU is needed.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
_USED = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for 'sm_\d+'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def usage(log: str) -> list[dict[str, str]]:
    """The kernels in the output of ``nvcc --resource-usage``, with registers, stack and spills."""
    return [match.groupdict() for match in _USED.finditer(log)]


def main() -> int:
    """Returns 1 if something does not compile, warns or spills."""
    spec = importlib.util.spec_from_file_location("build_operators", ROOT / "csrc" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    nvcc = build.find_nvcc()
    if nvcc is None:
        print("no nvcc here: the CUDA kernels were not compiled")
        return 0
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    pairs = [(source, architecture) for architecture in build.ARCHITECTURES for source in sources]
    strict = ("--resource-usage", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror")
    with tempfile.TemporaryDirectory() as folder:

        def compile_one(pair: tuple[Path, str]) -> subprocess.CompletedProcess[str]:
            source, architecture = pair
            command = build.nvcc_command(
                nvcc, source, Path(folder) / f"{source.stem}-{architecture}.o", [architecture], *strict
            )
            return subprocess.run(command, capture_output=True, text=True)

        with ThreadPoolExecutor(2) as pool:
            runs = list(pool.map(compile_one, pairs))
    table = Table(title="CUDA kernels")
    for heading in ("source", "architecture", "kernels", "most registers", "stack bytes", "spilled bytes"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    failed = False
    for (source, architecture), run in zip(pairs, runs, strict=True):
        kernels = usage(run.stdout + run.stderr)
        if run.returncode or not kernels:
            print(f"{source.name} for sm_{architecture} does not compile without warnings:\n{run.stdout}{run.stderr}")
            failed = True
            continue
        spilled = sum(int(kernel["stores"]) + int(kernel["loads"]) for kernel in kernels)
        failed |= spilled > 0
        most, stack = (max(int(kernel[key]) for kernel in kernels) for key in ("registers", "stack"))
        table.add_row(source.name, f"sm_{architecture}", str(len(kernels)), str(most), str(stack), str(spilled))
    Console(width=100).print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
