"""Random kills and signals, each followed by the same command again."""

from __future__ import annotations

import collections
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from campaigns import (
    HELPER,
    TIMEOUT,
    Cases,
    Models,
    adopt_orphans,
    descendants,
    same_tensors,
    small,
    train,
    trained,
    wait_until_gone,
)
from commands import TRAIN
from ranks import ROOT, environment, finish, free_port, start

from cuma_ds.recipe import load_config

EVALUATE = "launchers/evaluate.py"
# Functions to be killed in, with the most calls of each that a rank makes for certain.
PLACES = {
    "preparation": {"cuma_ds.training.inputs:check_prompts": 1, "cuma_ds.training.inputs:load_inputs": 1},
    "loading": {"cuma_ds.parallel.engine:place_model": 1},
    "forward": {"cuma_ds.parallel.engine:AdapterEngine.forward": 6},
    "dispatch": {"cuma_ds.parallel.dispatch:CheaperDispatch.dispatch": 30},
    "update": {"cuma_ds.parallel.engine:AdapterEngine.step": 6},
    "checkpoint": {
        "cuma_ds.parallel.checkpoint:save_file": 3, "cuma_ds.parallel.checkpoint:write_state": 3,
        "cuma_ds.parallel.checkpoint:move_folder": 3, "cuma_ds.parallel.checkpoint:remove_folder": 3,
    },
    "evaluation": {
        "cuma_ds.evaluation.run:Evaluator.choice": 1, "cuma_ds.evaluation.choice:predict_choices": 3,
        "cuma_ds.evaluation.run:write_predictions": 1,
    },
    "generation": {
        "cuma_ds.evaluation.generation:answers": 2, "cuma_ds.inference.generate:Decoder.admit": 1,
        "cuma_ds.inference.generate:Decoder.advance": 3,
    },
}  # fmt: skip
ON_MAIN = {"check_prompts", "write_state", "move_folder", "remove_folder"}
SIGNS = ["SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1"]
WHOM = [*["one rank"] * 4, *["all ranks"] * 2, "torchrun", "deepspeed"]
# Seconds after parallel.timeout_seconds within which a process ends by itself: the watch looks 5 seconds after it.
GRACE = 10


class Kill(NamedTuple):
    """One case: the place, the sign, whom it is sent to, and what :mod:`with_fault` takes."""

    where: str
    sign: str
    whom: str
    what: dict


def draw(case: int, seed: int, noted: Path) -> Kill:
    """Case by case all places in turn; the rest by chance."""
    generator = random.Random(f"{seed}-{case}")
    where = list(PLACES)[case % len(PLACES)]
    function, calls = generator.choice(list(PLACES[where].items()))
    sign, whom = generator.choice(SIGNS), generator.choice(WHOM)
    ranks = [0] if function.split(":")[1] in ON_MAIN else generator.choice([[0], [1]])
    if whom == "all ranks":
        ranks = [0, 1]
    what = {"function": function, "do": sign, "call": generator.randint(1, calls), "ranks": ranks, "noted": str(noted)}
    if ranks == [0, 1] and function.split(":")[1] in ON_MAIN:
        what |= {"ranks": [0], "also_siblings": True}
    if whom in ("torchrun", "deepspeed"):
        what |= {"ranks": ranks[:1], "launcher": True}
    return Kill(where, sign, whom, what)


def launched(launcher: str, command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """The command on two ranks of a real launcher."""
    port = str(free_port())
    words = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port],
        "deepspeed": [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port",
                      port],
    }  # fmt: skip
    with log.open("wb") as file:
        return subprocess.Popen([*words[launcher], *command], cwd=ROOT, env=environment(), stdout=file, stderr=file)


class Campaign:
    """Undisturbed runs to compare with, and one case after the other."""

    def __init__(self, folder: Path, seed: int) -> None:
        adopt_orphans()
        self.folder, self.seed, self.models = folder, seed, Models(folder)
        self.quiet = small(folder, self.models, "quiet")
        assert [code for code, _ in train(self.quiet)] == [0, 0]
        self.expected = trained(self.quiet)
        self.run_dir = load_config(self.quiet).run_dir
        self.reports = {}
        for where in ("evaluation", "generation"):
            command = self.asking(where, folder / f"quiet-{where}")
            results = finish(start(2, command), timeout=900)
            assert [code for code, _ in results] == [0, 0], results
            self.reports[where] = report(folder / f"quiet-{where}")

    def asking(self, where: str, out: Path) -> list[str]:
        """The command that evaluates the quiet run."""
        command = [EVALUATE, "--run", str(self.run_dir), "--out", str(out)]
        if where == "generation":
            chats = str(ROOT / "tests" / "data" / "chats.jsonl")
            command += ["--data", chats, "--generate", "4", "--max-new-tokens", "8"]
        return command

    def case(self, case: int) -> dict:
        """Kill, wait, start again, compare."""
        noted = self.folder / f"noted{case}"
        kill = draw(case, self.seed, noted)
        path, out = small(self.folder, self.models, f"case{case}"), self.folder / f"report{case}"
        command = self.asking(kill.where, out) if kill.where in self.reports else [TRAIN, "--config", str(path)]
        codes, said, survived, left = self.disturbed(kill, command, noted)
        results = finish(start(2, command), timeout=900)
        same = [code for code, _ in results] == [0, 0]
        if kill.where in self.reports:
            same = same and report(out) == self.reports[kill.where] and not unfinished(out)
            same = same and same_tensors(trained(self.quiet), self.expected)
            shutil.rmtree(out, ignore_errors=True)
        else:
            same = same and same_tensors(trained(path), self.expected) and not unfinished(load_config(path).run_dir)
            shutil.rmtree(load_config(path).run_dir, ignore_errors=True)
        if not same:
            print(said, results, sep="\n", flush=True)
        place = f"{kill.what['function']}, call {kill.what['call']}"
        return {
            "where": kill.where, "sign": kill.sign, "whom": kill.whom, "place": place, "codes": codes, "same": same,
            "survived": survived, "orphans": left,
        }  # fmt: skip

    def disturbed(self, kill: Kill, command: list[str], noted: Path) -> tuple[list, str, float, int]:
        """Codes, output, the seconds that any process lived on after the fault, and how many had to be ended."""
        command = [HELPER, json.dumps(kill.what), *command]
        log = noted.with_suffix(".log")
        if kill.what.get("launcher"):
            launcher = launched(kill.whom, command, log)
            ended, left = gone(noted)
            codes, said = [launcher.wait()], log.read_text(errors="replace")
        else:
            ranks = start(2, command)
            ended, left = gone(noted)
            results = finish(ranks, timeout=60)
            codes, said = [code for code, _ in results], str(results)
        assert noted.exists(), f"{kill} was never reached: {said}"
        return codes, said, round(ended - float(noted.read_text().split()[0]), 1), left


def gone(noted: Path) -> tuple[float, int]:
    """When the last process ended by itself, and how many were left long after the fault."""
    until = time.time() + 600
    while not noted.exists() and descendants() and time.time() < until:
        time.sleep(0.2)
    ended, left = wait_until_gone(TIMEOUT + GRACE + 30)
    return ended, len(left)


def report(folder: Path) -> dict:
    """A report, without where it was written."""
    return json.loads((folder / "report.json").read_text())


def unfinished(folder: Path) -> list[str]:
    """What is half written in a folder."""
    return [str(place) for place in folder.rglob("*") if place.name.startswith(".") or place.suffix == ".partial"]


def kills(cases: Cases, seed: int, folder: Path) -> None:
    """All cases that are left, and the table."""
    campaign = None
    for case in cases.left():
        campaign = campaign or Campaign(folder, seed)
        cases.add(case, **campaign.case(case))
    rows = list(cases.done.values())
    in_order = [row for row in rows if row["sign"] != "SIGKILL" and row["whom"].endswith(("rank", "ranks"))]
    table = {
        "cases": len(rows),
        "lost": sum(not row["same"] for row in rows),
        "longest_survivor_seconds": max(row["survived"] for row in rows),
        "orphans": sum(row["orphans"] for row in rows),
        "signals_to_ranks": len(in_order),
        "of_them_all_ranks_left_with_75": sum(set(row["codes"]) == {75} for row in in_order),
        **{key: dict(collections.Counter(row[key] for row in rows)) for key in ("where", "sign", "whom")},
    }
    print(json.dumps(table, indent=1))
