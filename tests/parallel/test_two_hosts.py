"""A run by hostfile over two hosts equals the run on one, and ends when a host's ranks die."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
from commands import all_tensors
from ranks import free_port, run
from small_runs import metrics, recipe
from two_hosts import missing, two_hosts

from cuma_ds.parallel.stored import find_checkpoint
from cuma_ds.recipe import load_config
from cuma_ds.runs import Run

pytestmark = [pytest.mark.multirank, pytest.mark.twohost]
TRAIN = "launchers/train.py"
PARALLEL = {"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2, "timeout_seconds": 20}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with two_hosts(tmp_path_factory.mktemp("cluster")) as hosts:
        yield hosts


def test_two_hosts_train_as_one(cluster, tmp_path, tiny_llama, tiny_encoder) -> None:
    import torch

    paths = [recipe(tmp_path, tiny_llama, tiny_encoder, name, parallel=PARALLEL) for name in ("one", "two")]
    assert [code for code, _ in run(2, [TRAIN, "--config", str(paths[0])])] == [0, 0]
    launched = cluster.deepspeed("--master_port", str(free_port()), TRAIN, "--config", str(paths[1]))
    output, _ = launched.communicate(timeout=300)
    assert launched.returncode == 0, output[-4000:]
    assert all(f"{host.address}: " in output for host in cluster.hosts), "pdsh names the host of each line"
    one, two = (load_config(path) for path in paths)
    assert [row["loss"] for row in metrics(two)] == [row["loss"] for row in metrics(one)]
    tensors = [all_tensors(find_checkpoint(Run(config.run_dir).checkpoints)) for config in (one, two)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


def test_when_one_host_dies_the_other_stops_with_a_reason(cluster, tmp_path, tiny_llama, tiny_encoder) -> None:
    path = recipe(
        tmp_path, tiny_llama, tiny_encoder, "lost", parallel=PARALLEL, training={"steps": 100_000, "warmup_steps": 0}
    )
    launched = cluster.deepspeed("--master_port", str(free_port()), TRAIN, "--config", str(path))
    rows = load_config(path).run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (rows.exists() and rows.stat().st_size) and time.monotonic() < deadline and launched.poll() is None:
        time.sleep(0.05)
    assert cluster.hosts[0].processes("train.py")
    lost = cluster.hosts[1].processes(f"-u {TRAIN}")
    assert lost, "both hosts must be training"
    for process in lost:
        os.kill(process, signal.SIGKILL)
    output, _ = launched.communicate(timeout=120)
    assert launched.returncode != 0
    assert "error: rank 0 of 2 stops: another rank is gone" in output, output[-4000:]
    assert not cluster.hosts[0].processes(f"-u {TRAIN}")


def test_a_host_that_is_down_is_named_before_the_run_and_stops_it_at_the_start(
    cluster, tmp_path, tiny_llama, tiny_encoder
) -> None:
    alive, dead = cluster.hosts[0].address, "10.77.0.9"
    hostfile = tmp_path / "hosts"
    hostfile.write_text(f"{alive} slots=1\n{dead} slots=1\n")
    check = [sys.executable, "launchers/check_hosts.py", "--timeout", "5", "--hostfile"]
    asked = [cluster.hosts[0].run([*check, str(file)], env=cluster.env) for file in (hostfile, cluster.hostfile)]
    path = recipe(tmp_path, tiny_llama, tiny_encoder, "early", parallel=PARALLEL | {"timeout_seconds": 10})
    launched = cluster.deepspeed(
        "--hostfile", str(hostfile), "--master_port", str(free_port()), TRAIN, "--config", str(path)
    )
    output, _ = launched.communicate(timeout=120)
    assert launched.returncode != 0
    assert "rank 0 of 2 could not meet its peers" in output, output[-4000:]
    down, fine = (process.communicate(timeout=60)[0] for process in asked)
    assert [process.returncode for process in asked] == [2, 0]
    assert down.startswith(f"error: host {dead} cannot be reached by ssh")
    assert fine == f"2 hosts with 2 ranks in all: {', '.join(host.address for host in cluster.hosts)}\n"
