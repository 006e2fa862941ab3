"""The commands people type: training, resuming after a kill, evaluating, and one clear line for every mistake."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from commands import TRAIN, all_tensors, one_line
from ranks import ROOT, environment, finish, free_port, run, start
from small_runs import recipe

from cuma_ds.parallel.stored import find_checkpoint, read_adapters, read_state
from cuma_ds.recipe import load_config
from cuma_ds.runs import Run

pytestmark = pytest.mark.multirank
SHARDED = {"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2}


def test_killed_in_the_middle_the_same_command_resumes_bit_identically(tmp_path, tiny_llama, tiny_encoder) -> None:
    long = {"steps": 40, "warmup_steps": 2}
    options = {"parallel": SHARDED, "checkpoint": {"every": 5}, "training": long, "adapters": {"dropout": 0.1}}
    whole = recipe(tmp_path, tiny_llama, tiny_encoder, "whole", **options)
    assert [code for code, _ in run(2, [TRAIN, "--config", str(whole)])] == [0, 0]

    broken = recipe(tmp_path, tiny_llama, tiny_encoder, "broken", **options)
    run_dir = load_config(broken).run_dir
    processes = start(2, [TRAIN, "--config", str(broken)])
    deadline = time.monotonic() + 120
    while not (run_dir / "checkpoints" / "step-10" / "state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    finish(processes)
    assert not (run_dir / "checkpoints" / "step-40").exists(), "the kill came too late to mean anything"

    results = run(2, [TRAIN, "--config", str(broken)])
    assert [code for code, _ in results] == [0, 0]
    assert re.search(r"resuming .* after step \d+", results[0][1])
    one, other = (
        all_tensors(find_checkpoint(Run(load_config(whole).run_dir).checkpoints)),
        all_tensors(find_checkpoint(Run(run_dir).checkpoints)),
    )
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 41))


@pytest.mark.parametrize(
    ("sign", "message"),
    [(signal.SIGKILL, "another rank is gone"), (signal.SIGSTOP, "another rank did not answer within 10 s")],
)
def test_a_dead_or_hung_peer_stops_the_others_with_a_reason(sign, message, tmp_path, tiny_llama, tiny_encoder) -> None:
    endless = {"steps": 100_000, "warmup_steps": 0}
    parallel = {**SHARDED, "timeout_seconds": 10}
    path = recipe(tmp_path, tiny_llama, tiny_encoder, "lonely", training=endless, parallel=parallel)
    processes = start(2, [TRAIN, "--config", str(path)])
    rows = load_config(path).run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (rows.exists() and rows.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    processes[1].send_signal(sign)
    try:
        output, _ = processes[0].communicate(timeout=90)
    finally:
        processes[1].kill()
    assert processes[0].returncode == 2, output
    assert f"error: rank 0 of 2 stops: {message}" in output, output
    assert "Traceback" not in output
    finish(processes[1:])


def test_deepspeed_launcher_trains_and_evaluate_reports(tmp_path, tiny_llama, tiny_encoder) -> None:
    path = recipe(tmp_path, tiny_llama, tiny_encoder, "launched", parallel=SHARDED, telemetry={"tensorboard": True})
    deepspeed = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        "2",
        "--master_port",
        str(free_port()),
    ]
    hosts = ["--hostfile", str(tmp_path / "no-hostfile")]
    subprocess.run(
        [*deepspeed, *hosts, TRAIN, "--config", str(path)], cwd=ROOT, env=environment(), check=True, timeout=300
    )
    run_dir = load_config(path).run_dir
    assert {
        "config.yaml",
        "deepspeed.json",
        "checkpoints",
        "metrics.jsonl",
        "profiles.safetensors",
        "data",
        "tensorboard",
    } <= {entry.name for entry in run_dir.iterdir()}
    arguments = [sys.executable, "launchers/evaluate.py", "--run", str(run_dir), "--set", "evaluation.min_answers=2"]
    done = subprocess.run(arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((run_dir / "evaluation" / "report.json").read_text())
    assert {"collapse", "before", "trained"} <= set(report["splits"]["test"]["rows"])
    assert "trained" in done.stdout


def until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait for what must happen within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def living(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_stopping_the_launcher_by_its_pid_stops_every_rank(sign, tmp_path, tiny_llama, tiny_encoder) -> None:
    endless = {"steps": 100_000, "warmup_steps": 0}
    path = recipe(tmp_path, tiny_llama, tiny_encoder, "endless", training=endless, parallel=SHARDED)
    deepspeed = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        "2",
        "--master_port",
        str(free_port()),
    ]
    command = [*deepspeed, "--hostfile", str(tmp_path / "no-hostfile"), TRAIN, "--config", str(path)]
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)
    started: list[psutil.Process] = []
    try:
        rows = load_config(path).run_dir / "metrics.jsonl"
        until(lambda: rows.exists() and rows.stat().st_size > 0, 400)
        started = psutil.Process(launcher.pid).children(recursive=True)
        assert sum("train.py" in " ".join(process.cmdline()[:4]) for process in started) == 2
        launcher.send_signal(sign)
        until(lambda: not living(started), 120)
        launcher.wait(10)
    finally:
        for process in living(started):
            process.kill()
        launcher.kill()
    said = (tmp_path / "log").read_text()
    assert "stops: its launcher is gone" in said
    assert "of 100000; the same command goes on from there" in said
    assert find_checkpoint(Run(load_config(path).run_dir).checkpoints) is not None


LASTING = """
import sys, time
from pathlib import Path
sys.path.insert(0, "launchers")
from _cli import run_main
run_main(lambda: [Path(sys.argv[1]).write_text(str(step)) or time.sleep(0.1) for step in range(int(sys.argv[2]))])
"""


def test_torchrun_takes_its_ranks_along(tmp_path) -> None:
    (tmp_path / "lasting.py").write_text(LASTING)
    command = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "1",
        "--master-port",
        str(free_port()),
        str(tmp_path / "lasting.py"),
    ]
    launcher = subprocess.Popen(
        [sys.executable, *command, str(tmp_path / "said"), "100000"], cwd=ROOT, env=environment()
    )
    started: list[psutil.Process] = []
    try:
        until((tmp_path / "said").exists, 200)
        started = psutil.Process(launcher.pid).children(recursive=True)
        assert living(started)
        launcher.kill()
        until(lambda: not living(started), 15)
    finally:
        for process in living(started):
            process.kill()
        launcher.kill()


@pytest.mark.parametrize("variables", [{}, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}])
def test_what_was_started_by_hand_outlives_its_shell(variables, tmp_path) -> None:
    (tmp_path / "lasting.py").write_text(LASTING)
    line = f"nohup {sys.executable} {tmp_path / 'lasting.py'} {tmp_path / 'said'} 45 > {tmp_path / 'log'} 2>&1 &"
    subprocess.run(["sh", "-c", line], cwd=ROOT, env=environment() | variables, check=True)
    said = tmp_path / "said"
    until(lambda: said.exists() and said.read_text() == "44", 200)  # four seconds, the shell gone since long
    assert "stops" not in (tmp_path / "log").read_text()


def test_finished_runs_say_so_and_more_steps_go_on(tmp_path, tiny_llama, tiny_encoder) -> None:
    path = recipe(
        tmp_path, tiny_llama, tiny_encoder, "again", training={"steps": 2, "warmup_steps": 0, "schedule": "constant"}
    )
    assert run(1, [TRAIN, "--config", str(path)])[0][0] == 0
    code, output = run(1, [TRAIN, "--config", str(path)])[0]
    assert code == 0
    assert "complete at step 2; nothing to do" in output
    code, output = run(1, [TRAIN, "--config", str(path), "--set", "training.steps=3"])[0]
    assert code == 0
    assert "after step 2" in output
    assert find_checkpoint(Run(load_config(path).run_dir).checkpoints).name == "step-3"


def test_plain_python_without_any_launcher_trains(tmp_path, tiny_llama, tiny_encoder) -> None:
    path = recipe(tmp_path, tiny_llama, tiny_encoder, "plain", training={"steps": 2, "warmup_steps": 0})
    done = subprocess.run(
        [sys.executable, TRAIN, "--config", str(path)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "1 rank, ep_size 1" in done.stdout


def test_lora_and_semantic_only_runs_train_and_evaluate_without_profiles(tmp_path, tiny_llama, tiny_encoder) -> None:
    lora = {"method": "lora", "num_experts": 1, "top_k": 1, "balance_weight": 0.0}
    path = recipe(
        tmp_path, tiny_llama, tiny_encoder, "lora", adapters=lora, data={"profile_in_prompt": True, "max_length": 300}
    )
    assert run(2, [TRAIN, "--config", str(path)])[0][0] == 0
    arguments = ["launchers/evaluate.py", "--run", str(load_config(path).run_dir), "--set", "evaluation.min_answers=2"]
    code, output = run(1, arguments)[0]
    assert code == 0, output
    assert "profile_mean" not in read_adapters(find_checkpoint(Run(load_config(path).run_dir).checkpoints))


def test_chat_data_trains_with_the_balance_of_all_ranks(tmp_path, tiny_llama, tiny_encoder) -> None:
    chats = {"source": "jsonl", "path": str(ROOT / "tests" / "data" / "chats.jsonl"), "max_length": 160}
    path = recipe(tmp_path, tiny_llama, tiny_encoder, "chat", data=chats, parallel=SHARDED)
    assert [code for code, _ in run(2, [TRAIN, "--config", str(path)])] == [0, 0]
    rows = [json.loads(line) for line in (load_config(path).run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[0]["balance"] >= 2 * 2 * 0.99  # at least 1 per router; 2 layers with 2 routers each


MISTAKES = {
    "unknown-key": (["training.stepz=3"], ("training.stepz", "did you mean 'steps'")),
    "impossible-value": (["training.steps=0"], ("training.steps", "greater than or equal to 1")),
    "top-k": (["adapters.top_k=9"], ("top_k is 9", "num_experts is 4")),
    "ep-not-dividing-experts": (["parallel.ep_size=3"], ("ep_size is 3", "num_experts 4")),
    "ep-not-dividing-world": (["parallel.ep_size=4"], ("ep_size is 4", "world size 2")),
    "no-such-targets": (
        ["adapters.target_modules=[q_prj]"],
        ("'q_prj' matches no linear layer", "did you mean 'q_proj'"),
    ),
    "no-model": (["model.path=/no/such/folder"], ("model.path", "/no/such/folder")),
    "no-encoder": (["profiles.encoder=/no/such/encoder"], ("/no/such/encoder",)),
    "profile-width": (["adapters.profile_dim=7"], ("profile_dim is 7", "width 16")),
    "no-deepspeed-config": (["parallel.deepspeed_config=zero9"], ("zero9", "zero2_sharded_backbone")),
    "stage-3-with-ep": (
        ["parallel.deepspeed_config=zero3", "parallel.ep_size=2"],
        ("ZeRO stage 3", "zero2_sharded_backbone"),
    ),
    "no-data": (["data.path=/no/such/file.jsonl"], ("/no/such/file.jsonl",)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_2_on_every_rank(mistake, tmp_path, tiny_llama, tiny_encoder) -> None:
    settings, parts = MISTAKES[mistake]
    path = recipe(tmp_path, tiny_llama, tiny_encoder, "mistake")
    one_line(run(2, [TRAIN, "--config", str(path), "--set", *settings], timeout=120), *parts)


def test_broken_and_missing_recipes_are_one_line_with_the_place(tmp_path) -> None:
    one_line(run(2, [TRAIN, "--config", str(tmp_path / "none.yaml")], timeout=120), "none.yaml", "No such file")
    broken = tmp_path / "broken.yaml"
    broken.write_text("run: {name: x}\nmodel: {path: [}\n")
    one_line(run(2, [TRAIN, "--config", str(broken)], timeout=120), "broken.yaml:2", "broken YAML")


def test_a_broken_jsonl_line_is_named_by_its_number(tmp_path, tiny_llama, tiny_encoder) -> None:
    lines = (ROOT / "tests" / "data" / "opinions.jsonl").read_text().splitlines()
    lines[6] = lines[6][:-5]
    data = tmp_path / "broken.jsonl"
    data.write_text("\n".join(lines))
    path = recipe(tmp_path, tiny_llama, tiny_encoder, "jsonl", data={"path": str(data)})
    one_line(run(2, [TRAIN, "--config", str(path)], timeout=120), "broken.jsonl:7")


def test_foreign_folders_and_incomplete_checkpoints_are_refused_and_left_alone(
    tmp_path, tiny_llama, tiny_encoder
) -> None:
    path = recipe(
        tmp_path, tiny_llama, tiny_encoder, "mine", training={"steps": 2, "warmup_steps": 0}, parallel=SHARDED
    )
    assert run(2, [TRAIN, "--config", str(path)])[0][0] == 0
    run_dir = load_config(path).run_dir
    before = sorted(str(entry) for entry in run_dir.rglob("*"))
    changed = [TRAIN, "--config", str(path), "--set", "training.learning_rate=0.5"]
    one_line(run(2, changed, timeout=120), "training.learning_rate: 0.01", "0.5", "run.name")
    assert sorted(str(entry) for entry in run_dir.rglob("*")) == before

    more = [TRAIN, "--config", str(path), "--set", "training.steps=4"]
    experts = run_dir / "checkpoints" / "step-2" / "experts-1-of-2.safetensors"
    content = experts.read_bytes()
    experts.unlink()
    one_line(run(2, more, timeout=120), "step-2 is incomplete", "experts-1-of-2.safetensors is missing", "ep_size 2")
    experts.write_bytes(content[:-10])
    one_line(run(2, more, timeout=120), "step-2 is damaged", "experts-1-of-2.safetensors")
    (run_dir / "checkpoints" / "step-2" / "state.json").unlink()
    one_line(run(2, more, timeout=120), "step-2 is not a complete checkpoint")

    deepspeeds = run_dir / "checkpoints" / "global_step2"
    deepspeeds.mkdir()
    (deepspeeds / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"fragments")
    one_line(run(2, more, timeout=120), "global_step2 was written by DeepSpeed itself", "sharded frozen backbone")

    foreign = recipe(tmp_path, tiny_llama, tiny_encoder, "foreign")
    folder = load_config(foreign).run_dir
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("do not delete")
    one_line(run(2, [TRAIN, "--config", str(foreign)], timeout=120), "no run folder")
    assert (folder / "thesis.txt").read_text() == "do not delete"


@pytest.mark.embedded
@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_holds_its_shard_its_experts_and_at_most_one_layer_more(world, embedded_models) -> None:
    model, _ = embedded_models
    results = run(world, [str(ROOT / "tests" / "helpers" / "measure_bytes.py"), str(model), str(world)], timeout=400)
    assert [code for code, _ in results] == [0] * world, results[0][1][-3000:]
    measured = json.loads(next(line for line in results[0][1].splitlines() if line.startswith("measured "))[9:])
    assert measured["full"] == 2 * 134_515_008
    assert measured["held"] <= measured["full"] / world * 1.02
    assert measured["live_at_rest"] == 0
    assert 0 < measured["live_at_most"] <= measured["largest_layer"]
    experts, r, width, q_out, v_out = 8, 8, 576, 576, 192
    assert measured["experts"] * world == 30 * experts * r * (2 * width + q_out + v_out) * 4


def test_no_profile_text_in_logs_or_file_names(tmp_path, tiny_llama, tiny_encoder) -> None:
    path = recipe(tmp_path, tiny_llama, tiny_encoder, "quiet", training={"steps": 1, "warmup_steps": 0})
    code, output = run(1, [TRAIN, "--config", str(path)])[0]
    assert code == 0
    run_dir = load_config(path).run_dir
    names = " ".join(entry.name for entry in [*run_dir.rglob("*"), *(tmp_path / "cache").rglob("*")])
    for word in ("Norway", "Country", "country:"):
        assert word not in output
        assert word not in names
    assert os.path.getsize(run_dir / "metrics.jsonl") > 0


def test_torchrun_starts_the_ranks_as_well(tmp_path, tiny_llama, tiny_encoder) -> None:
    path = recipe(
        tmp_path, tiny_llama, tiny_encoder, "torchrun", parallel=SHARDED, training={"steps": 1, "warmup_steps": 0}
    )
    command = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
        TRAIN,
        "--config",
        str(path),
    ]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_state(find_checkpoint(Run(load_config(path).run_dir).checkpoints))["written_by"]["world"] == 2


BUSY_THREADS = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
import torch
from _cli import run_main

def multiply():
    a = torch.ones(100)
    while True:
        a * a

def main():
    for _ in range(4):
        threading.Thread(target=multiply, daemon=True).start()
    time.sleep(0.3)
    print("done")

run_main(main)
"""


def test_threads_that_still_compute_do_not_spoil_the_end_of_a_rank(tmp_path) -> None:
    script = tmp_path / "busy.py"
    script.write_text(BUSY_THREADS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--master-port", str(free_port())]
    command = [*launcher, str(script), str(ROOT / "launchers")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_mistaken_override_of_the_quickstart_is_one_line() -> None:
    env = {**environment(), "BIN": str(Path(sys.executable).parent)}
    script = ["bash", "launchers/recipes/quickstart.sh", "training.steps=3", "training.warmup_steps=5"]
    done = subprocess.run(script, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert [
        line for line in done.stderr.splitlines() if "error" in line.lower() or "Traceback" in line
    ] == done.stderr.splitlines()
    assert "training: warmup_steps is 5 but steps is 3" in done.stderr
