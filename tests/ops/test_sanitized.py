"""The compiled CPU operators under AddressSanitizer."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest
import sanitized
import torch

ROOT = Path(__file__).parents[2]
pytestmark = sanitized.needs_compiler


@pytest.fixture(scope="module")
def extension(tmp_path_factory) -> Path:
    spec = importlib.util.spec_from_file_location("build_operators", ROOT / "csrc" / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    macros = [name if value is None else f"{name}={value}" for name, value in build.operators().define_macros]
    macros.append('CUMA_CUDA_ARCHITECTURES=""')
    out = tmp_path_factory.mktemp("sanitized") / "_C.so"
    torch_folder = Path(torch.__file__).parent
    flags = [flag for flag in build.cpu_flags() if flag != "-O3"]
    includes = [f"-I{place}" for place in (torch_folder / "include", sysconfig.get_paths()["include"])]
    links = [f"-L{torch_folder / 'lib'}", f"-Wl,-rpath,{torch_folder / 'lib'}", "-ltorch_cpu"]
    command = [
        "g++",
        "-shared",
        "-fPIC",
        "-O1",
        "-g1",
        *flags,
        *sanitized.FLAGS,
        *(f"-D{macro}" for macro in macros),
        *includes,
    ]
    done = subprocess.run(
        [*command, *map(str, sorted((ROOT / "csrc").glob("*.cpp"))), "-o", str(out), *links],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_right_and_wrong_calls_stay_in_bounds(extension: Path, monkeypatch) -> None:
    monkeypatch.setenv("CUMA_DS_OPS", "reference")
    done = sanitized.run(ROOT / "tests" / "helpers" / "fuzz_operators.py", extension, "150")
    assert done.returncode == 0, done.stderr[-3000:]
    right, refused, harmless = map(int, re.findall(r"\d+", done.stdout))
    assert right == 150
    assert refused > 100
    assert refused + harmless == 450


def test_a_read_out_of_bounds_would_be_caught(tmp_path: Path) -> None:
    source = tmp_path / "bad.cpp"
    source.write_text('extern "C" int read(int n) { int* p = new int[4]; int x = p[n]; delete[] p; return x; }\n')
    library = tmp_path / "bad.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-O1", *sanitized.FLAGS, str(source), "-o", str(library)], check=True)
    script = tmp_path / "run.py"
    script.write_text("import ctypes, sys\nctypes.CDLL(sys.argv[1]).read(int(sys.argv[2]))\n")
    assert sanitized.run(script, library, "3").returncode == 0
    done = sanitized.run(script, library, "4")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
