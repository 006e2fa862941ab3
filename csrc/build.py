"""How the operators are built: the C++ files against torch's stable ABI, and the CUDA kernels where nvcc is at hand."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).parent
ARCHITECTURES = ("80", "90", "100", "120")
OLDEST_TORCH = (2, 11)
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CPU_FLAGS = ["-O3", "-std=c++20", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]


def cpu_flags() -> list[str]:
    """Compiler flags of the CPU kernels. On x86 they need AVX2, FMA and F16C, which library.py checks."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return CPU_FLAGS + (["-mavx2", "-mfma", "-mf16c"] if x86 else [])


def find_torch() -> Path | None:
    """The folder of the environment's torch, also from within pip's isolated build;

    None if it is missing or older than 2.11.
    """
    spec = importlib.util.find_spec("torch")
    places = (
        list(spec.submodule_search_locations or ()) if spec else [str(Path(sysconfig.get_path("purelib")) / "torch")]
    )
    for place in map(Path, places):
        version = place / "version.py"
        found = re.search(r"__version__ = '(\d+)\.(\d+)", version.read_text()) if version.exists() else None
        if found and (int(found[1]), int(found[2])) >= OLDEST_TORCH:
            return place
    return None


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, of the toolkit's usual folders (versioned first), then of PATH, where it may be a wrapper."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    versioned = sorted(
        Path("/usr/local").glob("cuda-[0-9]*"), key=lambda p: [int(x) for x in re.findall(r"\d+", p.name)], reverse=True
    )
    for home in [*homes, *versioned, Path("/usr/local/cuda")]:
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime_api.h").exists():
            return home / "bin" / "nvcc"
    on_path = shutil.which("nvcc")
    return Path(on_path) if on_path else None


def cuda_architectures() -> list[str]:
    """CUMA_DS_CUDA_ARCHITECTURES ("90" or "80;90"), by default sm_80, sm_90, sm_100 and sm_120."""
    return os.environ.get("CUMA_DS_CUDA_ARCHITECTURES", ";".join(ARCHITECTURES)).replace(",", ";").split(";")


def nvcc_command(nvcc: Path, source: Path, output: Path, architectures: list[str], *extra: str) -> list[str]:
    """Compile one .cu; the newest architecture also as PTX, for GPUs yet to come."""
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    codes.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    return [str(nvcc), "-c", str(source), "-o", str(output), *NVCC_FLAGS, *codes, *extra]


def operators() -> Extension:
    """The extension module; where it cannot be built the package installs without it and uses plain PyTorch."""
    macros = [
        ("TORCH_TARGET_VERSION", "0x020b000000000000ULL"),
        ("TORCH_STABLE_ONLY", None),
        ("Py_LIMITED_API", "0x030b0000"),
    ]
    return Extension(
        "cuma_ds.ops._C",
        sources=[str(path.relative_to(CSRC.parent)) for path in sorted(CSRC.glob("*.cpp"))],
        depends=[
            str(path.relative_to(CSRC.parent))
            for path in sorted(CSRC.rglob("*"))
            if path.suffix in (".h", ".cu", ".py")
        ],
        define_macros=macros,
        extra_compile_args=cpu_flags(),
        py_limited_api=True,
        optional=os.environ.get("CUMA_DS_CUDA", "auto") != "1",
    )


class BuildOperators(build_ext):
    """Build for the CPU, and for CUDA as CUMA_DS_CUDA says: auto (if nvcc is found), 0 (no) or 1 (it must be)."""

    def build_extension(self, ext: Extension) -> None:
        wish = os.environ.get("CUMA_DS_CUDA", "auto")
        if wish not in ("auto", "0", "1"):
            raise RuntimeError(f"CUMA_DS_CUDA is {wish!r}; allowed are auto, 0 and 1")
        torch = find_torch()
        if torch is None:
            self.warn("no torch >= 2.11 here, so no compiled operators; install torch first, then this package again")
            return
        ext.include_dirs.append(str(torch / "include"))
        ext.library_dirs.append(str(torch / "lib"))
        ext.libraries.append("torch_cpu")
        built = self._build_cuda(ext, wish) if wish != "0" else []
        ext.define_macros.append(("CUMA_CUDA_ARCHITECTURES", '"{}"'.format(" ".join(f"sm_{a}" for a in built))))
        super().build_extension(ext)

    def _build_cuda(self, ext: Extension, wish: str) -> list[str]:
        nvcc = find_nvcc()
        if nvcc is None:
            if wish == "1":
                raise RuntimeError("CUMA_DS_CUDA=1, but no nvcc was found; set CUDA_HOME")
            return []
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        sources = sorted((CSRC / "cuda").glob("*.cu"))
        objects = [folder / f"{source.stem}.o" for source in sources]
        pairs = zip(sources, objects, strict=True)
        running = [
            subprocess.Popen(nvcc_command(nvcc, source, target, cuda_architectures())) for source, target in pairs
        ]
        if any([process.wait() for process in running]):
            if wish == "1":
                raise RuntimeError("CUMA_DS_CUDA=1, but the CUDA kernels did not compile")
            self.warn("the CUDA kernels did not compile: the operators are built for the CPU alone")
            return []
        home = nvcc.resolve().parent.parent
        ext.extra_objects.extend(map(str, objects))
        ext.include_dirs.append(str(home / "include"))
        ext.library_dirs += [str(home / "lib64"), str(home / "targets" / f"{platform.machine()}-linux" / "lib")]
        ext.libraries += ["cudart_static", "dl", "rt", "pthread"]
        ext.define_macros.append(("CUMA_WITH_CUDA", None))
        return cuda_architectures()
