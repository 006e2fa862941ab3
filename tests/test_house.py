"""How the package is built: which way its imports go, and which file alone knows a thing."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "cuma_ds").rglob("*.py"), *(ROOT / "launchers").glob("*.py")])

# From the highest floor to the lowest. A module may import its own package and those of lower floors.
FLOORS = [
    {"launchers", "__main__"},
    {"studies", "serving", "playground"},
    {"export"},
    {"evaluation", "training"},
    {"inference", "run_status"},
    {"runs"},
    {"planning"},
    {"parallel"},
    {"methods"},
    {"judge"},
    {"data"},
    {"adapters"},
    {"profiles", "telemetry"},
    {"ops"},
    {"config_reference"},
    {"learned_settings"},
    {"recipe"},
    {"config"},
    {
        "identity",
        "distances",
        "files",
        "incident",
        "launched",
        "locks",
        "resources",
        "strict_json",
        "errors",
        "torch_compat",
        "sentence_format",
    },
]
# The last floor may be imported by everything, and its modules may import each other.
LEVEL = {package: level for level, floor in enumerate(FLOORS) for package in floor}
# Public names of the package and the configuration of the adapters, which is a section of a recipe.
EVERYWHERE = {"cuma_ds", "cuma_ds.adapters.config"}

# Names of files and folders that one module alone may spell, as a string of its code.
SPELLED_IN = {
    "config.yaml": {"cuma_ds/runs.py"},
    "identity.json": {"cuma_ds/runs.py"},
    "deepspeed.json": {"cuma_ds/runs.py"},
    "checkpoints": {"cuma_ds/runs.py"},
    "metrics.jsonl": {"cuma_ds/runs.py"},
    "tensorboard": {"cuma_ds/runs.py"},
    # A prepared folder may hold its embedded profiles, too.
    "profiles.safetensors": {"cuma_ds/runs.py", "cuma_ds/data/prepared.py"},
    "reference.safetensors": {"cuma_ds/runs.py"},
    # Reports can be written anywhere. The plain LoRA of an export has one of its own.
    "report.json": {"cuma_ds/evaluation/report/model.py", "cuma_ds/export/lora.py"},
    "predictions.npz": {"cuma_ds/evaluation/predictions.py"},
    "manifest.json": {"cuma_ds/data/prepared.py"},
}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package(module: str) -> str:
    first, *rest = module.split(".")
    return rest[0] if first == "cuma_ds" and rest else first


def imports(file: Path) -> Iterator[str]:
    """The modules of this package that a file imports anywhere, also inside functions and for type checks."""
    modules = {module_name(source) for source in SOURCES}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "cuma_ds")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cuma_ds":
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in modules else str(node.module) for name in inner)


def arrows_up() -> set[tuple[str, str]]:
    found = set()
    for file in SOURCES:
        module = module_name(file)
        if module == "cuma_ds":
            continue
        for imported in imports(file):
            here, there = package(module), package(imported)
            if imported in EVERYWHERE or here == there or (LEVEL[here] == LEVEL[there] == len(FLOORS) - 1):
                continue
            if LEVEL[there] <= LEVEL[here]:
                found.add((module, there))
    return found


def test_imports_go_down() -> None:
    """No package imports one of its own floor or of a higher one."""
    assert not arrows_up()


def test_every_module_has_a_floor() -> None:
    assert {package(module_name(file)) for file in SOURCES} - {"cuma_ds"} <= LEVEL.keys()


@pytest.mark.parametrize("name", SPELLED_IN)
def test_one_file_knows_a_name(name) -> None:
    spelled = set()
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value == name:
                spelled.add(file.relative_to(ROOT).as_posix())
    assert spelled == SPELLED_IN[name]


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by their names alone."""
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
