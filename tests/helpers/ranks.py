"""Start real ranks: one process per rank, a free port, own threads and extension folder; end only what was started.

Importing torch, transformers and DeepSpeed takes longer than most tests. So ranks are forked from a process that has
imported them, unless a test asks for fresh interpreters, which also differ in their hash seeds and share no memory.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn
from unittest import mock

from units import force_units

ROOT = Path(__file__).parents[2]
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    ["cuma_ds.training.run", "cuma_ds.evaluation.run", "deepspeed.runtime.zero.muon.muon_optimizer"]
)


def environment(world: int = 1, rank: int = 0, port: int | None = None) -> dict[str, str]:
    """The environment a launcher gives one rank."""
    path = os.pathsep.join(filter(None, [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    base = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    base["TORCHDYNAMO_DISABLE"] = (
        "1"  # nothing is compiled, but DeepSpeed's Muon would import the compiler, 2 s a process
    )
    base["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as launchers/_cli.py sets it, which forks call after torch is imported
    if port is not None:
        base |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    return base


def free_port() -> int:
    """A port nobody listens on now, below the range the system hands out, so that nobody is given it before its use."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class Fork:
    """``python ARGUMENTS``, forked; what tests use of :class:`subprocess.Popen`."""

    def __init__(self, arguments: list[str], variables: dict[str, str]) -> None:
        handle, name = tempfile.mkstemp(suffix=".output")
        os.close(handle)
        self.output = Path(name)
        with mock.patch.dict(
            os.environ, environment()
        ):  # where it starts, it imports, and libraries count their threads then
            multiprocessing.forkserver.ensure_running()
        self.process = _forks.Process(target=_become, args=(arguments, variables, name), daemon=True)
        self.process.start()

    def communicate(self, timeout: float) -> tuple[str, None]:
        """All it printed, once it has ended."""
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked rank", timeout, self.output.read_bytes())
        printed = self.output.read_text()
        self.output.unlink()
        return printed, None

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, sign: int) -> None:
        if self.returncode is None and self.process.pid is not None:
            os.kill(self.process.pid, sign)


Rank = Fork | subprocess.Popen[str]


def start(world: int, arguments: list[str], fresh: bool = False) -> list[Rank]:
    """Start ``python ARGUMENTS`` once per rank."""
    port = free_port()
    return [_start_one(arguments, environment(world, rank, port), fresh) for rank in range(world)]


def finish(ranks: Sequence[Rank], timeout: float = 420) -> list[tuple[int | None, str]]:
    """Exit code and output of every rank; kills what is left on a time-out."""
    try:
        outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
        return [(rank.returncode, output) for rank, output in zip(ranks, outputs, strict=True)]
    finally:
        for rank in ranks:
            rank.kill()


def run(world: int, arguments: list[str], timeout: float = 420, fresh: bool = False) -> list[tuple[int | None, str]]:
    """Start all ranks and wait for them."""
    return finish(start(world, arguments, fresh), timeout)


def run_recipes(world: int, recipes: list[Path], timeout: float = 420, fresh: bool = False) -> None:
    """Train several recipes one after another in the same ranks, as ``launchers/train.py`` does each."""
    arguments = [str(Path(__file__).parent / "train_many.py"), json.dumps([str(recipe) for recipe in recipes])]
    for rank, (code, output) in enumerate(run(world, arguments, timeout, fresh)):
        assert code == 0, f"rank {rank} of {world} exited with {code}:\n{output[-4000:]}"


def _start_one(arguments: list[str], variables: dict[str, str], fresh: bool) -> Rank:
    if not fresh:
        return Fork(arguments, variables)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "with_units.py"), *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=variables, text=True, **streams)


def _become(arguments: list[str], variables: dict[str, str], output: str) -> NoReturn:
    """In the fork: be ``python ARGUMENTS``, with both streams in a file."""
    sys.stdout.flush()
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    sys.argv = arguments
    sys.path[:0] = [str((ROOT / arguments[0]).parent), *variables["PYTHONPATH"].split(os.pathsep)]
    force_units()
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
    sys.exit(0)
