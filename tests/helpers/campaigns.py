"""What the campaigns of tests/faults share: tiny models and runs, cases that are kept, processes that are left."""

from __future__ import annotations

import contextlib
import ctypes
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import conftest
import psutil
import torch
from commands import TRAIN, all_tensors
from ranks import finish, start
from small_runs import recipe

from cuma_ds.parallel.stored import newest_whole
from cuma_ds.recipe import load_config
from cuma_ds.runs import Run

HELPER = str(Path(__file__).parent / "with_fault.py")
TIMEOUT = 30
_SUBREAPER = 36  # of prctl(2): processes that lose their parent become children of this one


class Models:
    """The tiny models of the tests, in a folder of this process."""

    def __init__(self, folder: Path) -> None:
        class Factory:
            def mktemp(self, name: str) -> Path:
                (folder / name).mkdir(exist_ok=True)
                return folder / name

        self.llama = conftest.tiny_llama.__wrapped__(Factory())
        self.encoder = conftest.tiny_encoder.__wrapped__(Factory())


class Cases:
    """What came of each case, kept in a file of JSON lines, so that a campaign can be done in slices.

    Args:
        file: that is added to; None keeps nothing.
        number: of cases in all.
    """

    def __init__(self, file: Path | None, number: int) -> None:
        self.file, self.number = file, number
        lines = file.read_text().splitlines() if file is not None and file.exists() else []
        self.done: dict[int | str, dict] = {row["case"]: row for row in map(json.loads, lines)}

    def left(self, names: Sequence[int | str] | None = None) -> Iterator[int]:
        """The places of the cases that are not done, by their names, else by their numbers."""
        return (case for case in range(self.number) if (case if names is None else names[case]) not in self.done)

    def add(self, case: int | str, **found: object) -> None:
        """Keep a case and show it."""
        self.done[case] = {"case": case, **found}
        print(json.dumps(self.done[case], ensure_ascii=False), flush=True)
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(json.dumps(self.done[case], ensure_ascii=False) + "\n")


def small(folder: Path, models: Models, name: str = "run", **sections: dict) -> Path:
    """A recipe of six steps on two ranks, with a checkpoint every second step."""
    parallel = {"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2, "timeout_seconds": TIMEOUT}
    checkpoint = {"every": 2, "keep_last": 2}
    return recipe(
        folder, models.llama, models.encoder, name, **{"parallel": parallel, "checkpoint": checkpoint, **sections}
    )


def trained(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a recipe's last checkpoint."""
    folder, _ = newest_whole(Run(load_config(path).run_dir).checkpoints)
    assert folder.name == "step-6", folder
    return all_tensors(folder)


def same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def train(path: Path) -> list[tuple[int | None, str]]:
    """Train a recipe on two ranks."""
    return finish(start(2, [TRAIN, "--config", str(path)]), timeout=900)


def adopt_orphans() -> None:
    """Make what loses its parent a child of this process, so that :func:`descendants` sees it."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)


def descendants() -> list[psutil.Process]:
    """All processes below this one that run, but those that fork ranks."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline())
            forks = "forkserver import main" in command and process.ppid() == psutil.Process().pid
            if process.status() != psutil.STATUS_ZOMBIE and not forks and "resource_tracker" not in command:
                found.append(process)
    return found


def wait_until_gone(seconds: float) -> tuple[float, list[psutil.Process]]:
    """Wait until there are no descendants; when that was, and which are left after ``seconds``. Ends those that are."""
    until = time.time() + seconds
    while (left := descendants()) and time.time() < until:
        time.sleep(0.1)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return time.time(), left
