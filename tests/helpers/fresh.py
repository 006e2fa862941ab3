"""A Python with torch, transformers and what these two require, and nothing else of this environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path


def link_packages(target: Path, roots: tuple[str, ...] = ("torch", "transformers")) -> Path:
    """Fill a folder with links to the installed packages of ``roots`` and of everything they require."""
    target.mkdir()
    waiting, seen = list(roots), set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # meant for another platform or Python
        waiting += [
            re.split(r"[ ;<>=!~\[(]", line, maxsplit=1)[0] for line in package.requires or () if "extra ==" not in line
        ]
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            place = Path(str(package.locate_file(top)))
            if place.exists() and not (target / top).exists():
                (target / top).symlink_to(place)
    return target


def run_fresh(packages: Path, script: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a script with ``packages`` alone on its path, offline."""
    start = (
        f"import sys, runpy; sys.path.append({str(packages)!r}); del sys.argv[0]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    keep = {key: value for key, value in os.environ.items() if key in ("PATH", "LD_LIBRARY_PATH", "TMPDIR", "LANG")}
    environment = {**keep, "HOME": str(cwd), "HF_HOME": str(cwd / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-S", "-c", start, str(script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
