"""Train for long while ranks and launchers are killed at random; does the run end where a quiet one ends?

    python benchmarks/soak.py --config launchers/recipes/quickstart.yaml --minutes 30

The recipe is trained twice. The run ``soak`` gets a fault every 20 to 60 seconds, each followed by the same command.
Faults: SIGKILL of one rank, of all ranks or of the launcher; SIGTERM, SIGINT or SIGUSR1 to one rank or to the launcher.
After the last minute it goes on for 60 seconds, and is stopped by SIGTERM. Then ``soak-quiet`` is trained to the same
step, undisturbed. Compared are the sha256 of every tensor file of their last checkpoints. Exit code 1 where they differ
or a process was left.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from cuma_ds.parallel.stored import newest_whole
from cuma_ds.recipe import load_config
from cuma_ds.runs import Run

ROOT = Path(__file__).parents[1]
_FAULTS = [
    ("one rank", signal.SIGKILL), ("all ranks", signal.SIGKILL), ("launcher", signal.SIGKILL),
    *((whom, sign) for whom in ("one rank", "launcher") for sign in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)),
]  # fmt: skip


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(arguments: argparse.Namespace, name: str, log: Path, *more: str) -> subprocess.Popen[bytes]:
    """Start the run's ranks under torchrun, with ``more`` keys set."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(arguments.ranks)]
    command += ["--master_port", str(free_port()), str(ROOT / "launchers" / "train.py"), "--config", arguments.config]
    command += ["--set", f"run.name={name}", *arguments.set, *more]
    with log.open("ab") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)


def ranks_of(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes that a launcher started."""
    try:
        return psutil.Process(launcher.pid).children(recursive=True)
    except psutil.Error:
        return []


def strike(launcher: subprocess.Popen[bytes], generator: random.Random) -> str:
    """Do one random fault; what it was."""
    whom, sign = generator.choice(_FAULTS)
    ranks = ranks_of(launcher)
    targets = {"one rank": ranks and [generator.choice(ranks)], "all ranks": ranks, "launcher": [launcher]}[whom]
    for target in targets:
        try:
            target.send_signal(sign)
        except (psutil.Error, OSError):
            continue
    return f"{signal.Signals(sign).name} to {whom}"


def wait_for_all(launcher: subprocess.Popen[bytes], ranks: list[psutil.Process], seconds: float) -> float:
    """Wait until launcher and ranks are gone, and end what is left after ``seconds``; how long it took."""
    began = time.monotonic()
    while time.monotonic() < began + seconds:
        if launcher.poll() is not None and not psutil.wait_procs(ranks, timeout=0.2)[1]:
            return time.monotonic() - began
    for rank in ranks:
        if rank.is_running():
            rank.kill()
    launcher.kill()
    return float("inf")


def digest(run: Run) -> dict[str, str]:
    """The hash of each tensor file of the last checkpoint."""
    _, state = newest_whole(run.checkpoints)
    return {"step": str(state["step"]), **state["sha256"]}


def soak(arguments: argparse.Namespace) -> bool:
    """Both runs; whether all is well."""
    config = load_config(arguments.config, ["run.name=soak", *arguments.set])
    run, quiet = Run(config.run_dir), Run(config.run_dir.with_name("soak-quiet"))
    for folder in (run.folder, quiet.folder):
        shutil.rmtree(folder, ignore_errors=True)
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    log = run.folder.with_name("soak.log")
    schedule = f"training.schedule_steps={config.training.schedule_steps or config.training.steps}"
    limit = config.parallel.timeout_seconds + 60
    found = disturb(arguments, lambda: start(arguments, "soak", log, schedule), limit)
    reached = digest(run)
    undisturbed = start(arguments, "soak-quiet", log, schedule, f"training.steps={reached['step']}")
    assert undisturbed.wait() == 0, f"the quiet run failed, see {log}"
    found["same_checkpoint"] = reached == digest(quiet)
    print(json.dumps({**found, "steps": int(reached["step"])}, indent=1))
    return bool(found["same_checkpoint"] and not found["left_behind"])


def disturb(
    arguments: argparse.Namespace, launch: Callable[[], subprocess.Popen[bytes]], limit: float
) -> dict[str, object]:
    """Launch and strike until the minutes are over or the run is complete; what happened.

    Args:
        limit: seconds within which everything must have ended after a fault.
    """
    generator, faults = random.Random(arguments.seed), collections.Counter[str]()
    began, starts, ends, complete, last = time.monotonic(), 0, [0.0], False, False
    while not complete and not last:
        last = time.monotonic() - began > 60 * arguments.minutes
        launcher, starts = launch(), starts + 1
        try:
            pause = arguments.every[1] if last else generator.uniform(arguments.every[0], arguments.every[1])
            complete = launcher.wait(pause) == 0
            continue
        except subprocess.TimeoutExpired:
            ranks = ranks_of(launcher)
        if last:
            launcher.send_signal(signal.SIGTERM)
        else:
            faults[strike(launcher, generator)] += 1
        ends.append(wait_for_all(launcher, ranks, limit))
    return {
        "minutes": round((time.monotonic() - began) / 60, 1),
        "starts": starts,
        "faults": dict(faults),
        "slowest_end_seconds": round(max(end for end in ends if end < float("inf")), 1),
        "left_behind": ends.count(float("inf")),
    }


def main() -> None:
    """Parse and soak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="recipe; with so many training.steps that it lasts longer")
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="override keys of the recipe")
    parser.add_argument("--minutes", type=float, default=30, help="of faults (default 30)")
    parser.add_argument("--every", type=float, nargs=2, default=(20, 60), metavar=("LEAST", "MOST"), help="seconds")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    sys.exit(0 if soak(parser.parse_args()) else 1)


if __name__ == "__main__":
    main()
