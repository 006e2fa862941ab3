"""Malformed input of :mod:`broken_inputs`: is it refused in one line, with code 2, and with nothing changed?"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import yaml
from broken_inputs import TRAIN, Case, World, cases
from campaigns import Cases, Models, adopt_orphans, descendants, small
from ranks import ROOT, Fork, environment, finish, start

# No command may work or wait for longer. Time for which the machine worked for others does not count.
SECONDS = 30
_GIVE_UP = 240  # seconds by the clock
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")


class Ended(NamedTuple):
    """How processes ended: their codes, all they printed, and the longest time that one had, see ``SECONDS``."""

    codes: list[int | None]
    said: str
    seconds: float


class Started:
    """A process whose time is taken until it has ended."""

    def __init__(self, pid: int) -> None:
        self.pid, self.began, self.waited = pid, time.monotonic(), 0.0

    def look(self) -> float:
        """Seconds so far without those in which it was ready to run and the machine worked for others."""
        with contextlib.suppress(OSError, IndexError):
            self.waited = int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[1]) / 1e9
        return time.monotonic() - self.began - self.waited


def build_world(folder: Path) -> World:
    """A recipe, and a run and an export made by it."""
    folder.mkdir()
    models = Models(folder)
    for name, place in (("model", models.llama), ("encoder", models.encoder)):
        shutil.move(place, folder / name)
    models.llama, models.encoder = folder / "model", folder / "encoder"
    shutil.copy(ROOT / "tests" / "data" / "opinions.jsonl", folder / "data.jsonl")
    short = {"training": {"steps": 2, "warmup_steps": 0}, "data": {"path": str(folder / "data.jsonl")}}
    for name in ("fresh", "done"):
        path = small(folder, models, name, **short)
        values = yaml.safe_load(path.read_text())
        values["parallel"] = {"timeout_seconds": 10}
        path.write_text(yaml.safe_dump(values))
    for command in (
        [TRAIN, "--config", str(folder / "done.yaml")],
        [
            "launchers/export.py",
            "--run",
            str(folder / "runs" / "done"),
            "--format",
            "hf",
            "--out",
            str(folder / "export"),
        ],
    ):
        ended = run_one(command, environment(), fresh=False)
        assert ended.codes == [0], ended.said
    return World(folder)


def copy_of(world: World, folder: Path) -> World:
    """Another world of the same content, whose recipes name its own places."""
    shutil.copytree(world.folder, folder)
    for file in (*folder.glob("*.yaml"), *folder.glob("runs/*/config.yaml"), *folder.glob("export/*.json")):
        file.write_text(file.read_text().replace(str(world.folder), str(folder)))
    return World(folder)


def run_one(command: list[str], variables: dict[str, str], fresh: bool) -> Ended:
    """One process."""
    if fresh:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=variables, text=True, errors="replace",
                                   **streams)  # fmt: skip
        pid = process.pid
    else:
        process = Fork(command, variables)
        pid = process.process.pid or 0
    started, seconds = Started(pid), 0.0
    while time.monotonic() < started.began + _GIVE_UP and (process.poll() if fresh else process.returncode) is None:
        seconds = max(seconds, started.look())
        time.sleep(0.02)
    code = process.poll() if fresh else process.returncode
    process.kill()
    return Ended([code], process.communicate(timeout=20)[0], seconds)


def run_two(command: list[str]) -> Ended:
    """Two ranks."""
    ranks = start(2, command)
    watched, seconds = [Started(rank.process.pid or 0) for rank in ranks if isinstance(rank, Fork)], 0.0
    while time.monotonic() < watched[0].began + _GIVE_UP and any(rank.returncode is None for rank in ranks):
        alive = [one for one, rank in zip(watched, ranks, strict=True) if rank.returncode is None]
        seconds = max([seconds, *(one.look() for one in alive)])
        time.sleep(0.02)
    for rank in ranks:
        rank.kill()
    results = finish(ranks, timeout=20)
    return Ended([code for code, _ in results], "".join(said for _, said in results), seconds)


def snapshot(folder: Path) -> dict[str, str]:
    """The hash of every file."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "outcome.json"  # what the last start of a run said
    } | {str(place.relative_to(folder)): "a folder" for place in folder.rglob("*") if place.is_dir()}


def faults(case: Case, ended: Ended, changed: list[str]) -> list[str]:
    """What is not as it should be."""
    lines = [line for line in ended.said.splitlines() if "error" in line.lower() and not line.startswith("usage")]
    found = []
    if set(ended.codes) != {2}:
        found.append(f"codes {ended.codes}")
    if "Traceback" in ended.said or "traceback: /" in ended.said:
        found.append("a traceback")
    elif len(lines) != 1:
        found.append(f"{len(lines)} lines of errors")
    if ended.seconds > SECONDS:
        found.append(f"{ended.seconds:.0f} s")
    if changed:
        found.append(f"changed: {', '.join(changed[:3])}")
    return found


def refusals(kept: Cases, seed: int, folder: Path, world_size: int = 1) -> None:
    """All cases that are left, and the table."""
    adopt_orphans()
    drawn = cases(seed)
    if world_size > 1:  # the same recipes, data, models and checkpoints as two ranks meet them
        drawn = [case for case in drawn if case.command[0] == TRAIN and not case.variables and not case.fresh]
    assert len(drawn) >= kept.number, f"there are {len(drawn)} cases"
    base = None
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        names = [f"{case.kind}, {case.name}" for case in drawn]
        for number in kept.left(names):
            base = base or build_world(folder / "world")
            kept.add(names[number], **one(drawn[number], copy_of(base, folder / "case"), port, world_size))
            shutil.rmtree(folder / "case", ignore_errors=True)
    rows = [kept.done[name] for name in names[: kept.number]]
    table = {
        "cases": len(rows),
        "as_they_should_be": sum(not row["faults"] for row in rows),
        "longest_seconds": max(row["seconds"] for row in rows),
        "kinds": dict(collections.Counter(row["kind"] for row in rows)),
    }
    print(json.dumps(table, indent=1))
    for row in rows:
        if row["faults"]:
            print(f"{row['case']}: {'; '.join(row['faults'])}: {row['said'][-300:]}")


def one(case: Case, world: World, port: str, world_size: int) -> dict:
    """Break, ask, compare."""
    case.change(world)
    before = snapshot(world.folder)
    command = [word.replace("{world}", str(world.folder)) for word in case.command]
    variables = {key: value for key, value in environment().items() if key not in _LAUNCHED}
    for key, value in case.variables.items():
        variables.pop(key, None)
        if value is not None:
            variables[key] = value.replace("{taken}", port)
    ended = run_two(command) if world_size > 1 else run_one(command, variables, case.fresh)
    after = snapshot(world.folder)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    left = descendants()
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    wrong = faults(case, ended, sorted(changed)) + ([f"{len(left)} processes left"] if left else [])
    said = ended.said.replace(str(world.folder), "{world}").strip()
    return {
        "kind": case.kind,
        "name": case.name,
        "faults": wrong,
        "seconds": round(ended.seconds, 1),
        "said": said[-400:],
    }


def on_two_ranks(kept: Cases, seed: int, folder: Path) -> None:
    """As :func:`refusals`, for what two ranks train."""
    refusals(kept, seed, folder, world_size=2)
