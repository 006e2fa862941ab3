"""status.py says how far a run is and why it stopped, and --verify finds what is not whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folder import make_run

from cuma_ds.locks import locked
from cuma_ds.run_status import status_of
from cuma_ds.runs import Run


@pytest.fixture
def folder(tmp_path, tiny_llama, tiny_encoder) -> Path:
    """A run of 100 steps with a checkpoint and three rows of metrics."""
    folder = tmp_path / "run"
    make_run(folder, tiny_llama, tiny_encoder, {})
    rows = [
        {"step": step, "loss": 3.0 - step / 10, "seconds": 2.0, "tokens_per_second": 1234.5, "health/loss_spikes": 2.0}
        for step in (3, 4, 5)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_run_says_how_far_it_is_and_whether_it_runs(folder, launch) -> None:
    said = launch("status", str(folder))
    assert said.code == 0, said.err
    lines = dict(line.split(None, 1) for line in said.out.splitlines())
    assert lines["progress"] == "step 5 of 100 (5%)"
    assert lines["checkpoint"].endswith("checkpoints/step-7")
    assert lines["throughput"] == "2 s a step, 1,234 tokens/s"
    assert lines["health"] == "loss 2.5, 2 loss spikes"
    assert "it was killed" in lines["state"]
    (folder / "outcome.json").write_text(json.dumps({"said": "stopped by SIGTERM on rank 1", "time": "yesterday"}))
    assert "stopped by SIGTERM on rank 1 (yesterday)" in launch("status", str(folder)).out
    with locked(folder):
        running = list(status_of(Run(folder), 100).lines())
    assert "about 3 min left" in running[0]
    assert "running: process" in running[2]


def test_verify_reads_every_file_and_names_those_that_are_not_whole(folder, launch) -> None:
    whole = launch("status", str(folder), "--verify")
    assert whole.code == 0, whole.err + whole.out
    assert "every file" in whole.out
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    (folder / "checkpoints" / "step-7" / "shared.safetensors").write_bytes(b"short")
    (folder / "metrics.jsonl").write_text('{"step": 5}\n{"st')
    damaged = launch("status", str(folder), "--verify")
    assert damaged.code == 2
    assert "shared.safetensors has 5 bytes instead of" in damaged.out
    assert "metrics.jsonl:2 is damaged" in damaged.out
    assert "2 files are not whole" in damaged.err
    assert before.keys() == {file for file in folder.rglob("*") if file.is_file()}


def test_what_is_no_run_folder_is_one_line(tmp_path, launch) -> None:
    said = launch("status", str(tmp_path))
    assert said.code == 2
    assert "is no run folder" in said.err
