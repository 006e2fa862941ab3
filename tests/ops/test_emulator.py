"""The CUDA kernels' own source, run lane by lane on the host under AddressSanitizer, equals plain PyTorch.

Seeded bugs are caught.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import emulation
import pytest
import sanitized

pytestmark = sanitized.needs_compiler


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    return emulation.build(tmp_path_factory.mktemp("emulator"), sanitized.FLAGS)


def test_kernels_equal_plain_pytorch_in_bounds_and_whatever_the_order_of_lanes(built: Path) -> None:
    done = sanitized.run(emulation.HERE / "emulation.py", built)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
    assert done.stdout == "184 comparisons hold\n"


@pytest.mark.parametrize(
    ("start", "file", "right", "wrong", "message"),
    [
        ("scale", "scale", "i < steps;", "i <= steps;", "AddressSanitizer: heap-buffer-overflow"),
        ("gate", "gate", "goes_first(other, other_expert, best, best_expert)", "other >= best", "experts: "),
    ],
    ids=["one step too far", "ties to the higher index"],
)  # fmt: skip
def test_a_seeded_mistake_is_caught(
    built: Path, tmp_path: Path, start: str, file: str, right: str, wrong: str, message: str
) -> None:
    for name in {*emulation.SOURCES, "driver"} - {file}:
        shutil.copy(built.parent / f"{name}.o", tmp_path)
    changed = emulation.build(tmp_path, sanitized.FLAGS, (file, right, wrong))
    done = sanitized.run(emulation.HERE / "emulation.py", changed, start)
    assert done.returncode != 0
    assert message in done.stderr
