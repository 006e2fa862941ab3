"""The machines of a hostfile: read it, and ask each of them whether a run could start there."""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import deepspeed
import torch

from cuma_ds.errors import TopologyError

# What a host is asked, in the environment and folder a run would have there.
_START_SECONDS = 120
_QUESTION = (
    "import cuma_ds, deepspeed, platform, torch; "
    "print('cuma-ds', platform.python_version(), torch.__version__, deepspeed.__version__)"
)


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Hosts and their slots, in the order of the file.

    Raises:
        TopologyError: no file, no hosts, a line that is no ``NAME slots=N [max_slots=M]``, no slots, or a name that
            stands there twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a UTF-8 text file"
        raise TopologyError(
            f"cannot read the hostfile {path}: {reason}; deepspeed would train on this machine alone"
        ) from None
    if lines and lines[0].startswith("\ufeff"):
        mark = "the file begins with a byte order mark, which deepspeed takes for text"
        raise TopologyError(f"{path}:1: {mark}; save it as UTF-8 without one")
    slots: dict[str, int] = {}
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        # As deepspeed reads it, slots= comes first. What may follow is for Open MPI.
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)(?:\s+max[_-]slots=(\d+))?\s*(#.*)?", line.strip())
        if match is None:
            expected = "expected NAME slots=N or NAME slots=N max_slots=M, e.g. node-1 slots=8"
            raise TopologyError(f"{path}:{number}: {line.strip()!r} is no host; {expected}")
        if match[3] is not None and int(match[3]) < int(match[2]):
            raise TopologyError(
                f"{path}:{number}: host {match[1]} has slots={match[2]}, more than its max_slots={match[3]}"
            )
        name, count = match[1], int(match[2])
        if name in slots:
            raise TopologyError(
                f"{path}:{number}: host {name} stands here a second time (first in line {first_line[name]})"
            )
        if count == 0:
            raise TopologyError(
                f"{path}:{number}: host {name} has slots=0; give it at least one rank, or remove the line"
            )
        slots[name], first_line[name] = count, number
    if not slots:
        raise TopologyError(f"{path} names no host; expected lines NAME slots=N, e.g. node-1 slots=8")
    return slots


def check_hosts(names: list[str], seconds: int, ssh_port: int | None = None) -> None:
    """Ask all hosts over ssh, at the same time, for this environment in this folder.

    Args:
        names: ssh names or addresses.
        seconds: for a host to take the connection.

    Raises:
        TopologyError: the first host that does not answer, lacks this environment or folder, or has other versions.
    """
    here = ("cuma-ds", platform.python_version(), torch.__version__, deepspeed.__version__)

    def ask(name: str) -> str | None:
        folder, python, question = (shlex.quote(text) for text in (str(Path.cwd()), sys.executable, _QUESTION))
        remote = f"cd {folder} && PYTHONPATH=. {python} -c {question}"
        port = ["-p", str(ssh_port)] if ssh_port is not None else []
        command = ["ssh", *port, "-o", "BatchMode=yes", "-o", f"ConnectTimeout={seconds}", name, remote]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds + _START_SECONDS, stdin=subprocess.DEVNULL
            )
        except FileNotFoundError:
            return "there is no ssh program on this machine"
        except subprocess.TimeoutExpired:
            return f"host {name} does not answer within {seconds + _START_SECONDS} s"
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        if done.returncode == 255:
            return f"host {name} cannot be reached by ssh without a password: {said}"
        if done.returncode:
            return f"host {name} cannot start cuma-ds with {sys.executable} in {Path.cwd()}: {said}"
        there = tuple(next((line for line in done.stdout.splitlines() if line.startswith("cuma-ds ")), "").split())
        if there != here:
            return f"host {name} has {_versions(there)}; this machine has {_versions(here)}"
        return None

    with ThreadPoolExecutor(max_workers=min(64, len(names))) as pool:
        for problem in pool.map(ask, names):
            if problem is not None:
                raise TopologyError(problem)


def _versions(said: tuple[str, ...]) -> str:
    parts = [f"{what} {version}" for what, version in zip(("Python", "torch", "deepspeed"), said[1:], strict=False)]
    return ", ".join(parts) or "another environment"
