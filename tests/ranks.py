"""Start real ranks: one process per rank, a free port, own threads and extension folder; end only what was started."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment(world: int = 1, rank: int = 0, port: int | None = None) -> dict[str, str]:
    """The environment a launcher gives one rank."""
    path = os.pathsep.join(filter(None, [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    base = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
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


def start(world: int, arguments: list[str]) -> list[subprocess.Popen[str]]:
    """Start ``python ARGUMENTS`` once per rank."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment(world, rank, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]


def finish(processes: list[subprocess.Popen[str]], timeout: float = 420) -> list[tuple[int, str]]:
    """Exit code and output of every rank; kills what is left on a time-out."""
    try:
        return [(process.wait(timeout), output) for process, (output, _) in [(p, p.communicate(timeout=timeout)) for p in processes]]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()


def run(world: int, arguments: list[str], timeout: float = 420) -> list[tuple[int, str]]:
    """Start all ranks and wait for them."""
    return finish(start(world, arguments), timeout)


def run_recipes(world: int, recipes: list[Path], timeout: float = 420) -> None:
    """Train several recipes one after another in the same ranks, as ``launchers/train.py`` does each."""
    results = run(world, [str(Path(__file__).parent / "train_many.py"), json.dumps([str(recipe) for recipe in recipes])], timeout)
    for rank, (code, output) in enumerate(results):
        assert code == 0, f"rank {rank} of {world} exited with {code}:\n{output[-4000:]}"
