"""metrics.jsonl, TensorBoard, progress and throughput."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cuma_ds.config import TelemetrySection
from cuma_ds.runs import Run
from cuma_ds.telemetry.throughput import Throughput, memory
from cuma_ds.telemetry.writer import MetricsWriter

QUIET = TelemetrySection(log_every=1, tensorboard=False, progress=False)


def writer_in(folder: Path, config: TelemetrySection, steps: range, **options) -> MetricsWriter:
    run, is_main = Run(folder), options.pop("is_main", True)
    return MetricsWriter(run.metrics, run.tensorboard, config, is_main, steps, **options)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_steps(
    folder: Path, steps: range, total: int, start: int = 0, config: TelemetrySection = QUIET, loss: float = 1.0
) -> None:
    with writer_in(folder, config, range(start, total)) as writer:
        for step in filter(writer.is_due, steps):
            writer.log(step, {"loss": loss / step, "lr": 0.1})


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def test_one_row_a_step_with_the_values_given(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4), total=3)
    assert rows(tmp_path) == [{"step": s, "loss": 1.0 / s, "lr": 0.1} for s in (1, 2, 3)]


def test_log_every_keeps_multiples_and_the_last_step(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 8), total=7, config=QUIET.model_copy(update={"log_every": 3}))
    assert [row["step"] for row in rows(tmp_path)] == [3, 6, 7]


def test_rows_are_on_disk_before_close(tmp_path: Path) -> None:
    writer = writer_in(tmp_path, QUIET, range(5))
    writer.log(1, {"loss": 2.0})
    assert rows(tmp_path) == [{"step": 1, "loss": 2.0}]
    writer.close()


def test_resume_drops_later_rows_and_a_broken_last_line(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 6), total=8)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    write_steps(tmp_path, range(4, 9), total=8, start=3, loss=100.0)
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 9))
    assert [row["loss"] * row["step"] for row in rows(tmp_path)] == pytest.approx([1.0] * 3 + [100.0] * 5)
    assert not list(tmp_path.glob("*.part"))


def test_starting_from_zero_forgets_rows_of_steps_never_saved(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4), total=8)
    write_steps(tmp_path, range(1, 2), total=8, start=0)
    assert [row["step"] for row in rows(tmp_path)] == [1]


def test_what_is_not_finite_becomes_null_so_that_every_line_is_json(tmp_path: Path) -> None:
    with writer_in(tmp_path, QUIET, range(2)) as writer:
        writer.log(1, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 1.0})

    def refuse(token: str) -> None:
        raise AssertionError(token)

    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "loss": None, "grad_norm": None, "lr": 1.0}


def test_tensors_and_numpy_scalars_are_taken_as_numbers(tmp_path: Path) -> None:
    with writer_in(tmp_path, QUIET, range(2)) as writer:
        writer.log(1, {"loss": torch.tensor(0.5), "lr": np.float32(0.25)})
    assert rows(tmp_path) == [{"step": 1, "loss": 0.5, "lr": 0.25}]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = TelemetrySection()
    with writer_in(folder, config, range(2), is_main=False) as writer:
        writer.log(1, {"loss": 1.0})
        writer.log_routing(1, ["r"], [[1.0]], [0.0])
    assert not folder.exists()


def test_close_twice_is_harmless(tmp_path: Path) -> None:
    writer = writer_in(tmp_path, TelemetrySection(), range(2))
    writer.close()
    writer.close()


def test_tensorboard_scalars_and_routing_have_their_tags_and_values(tmp_path: Path) -> None:
    config = TelemetrySection(progress=False)
    load, entropy = torch.tensor([[0.25, 0.75], [0.5, 0.5]]), torch.tensor([0.5, 0.625])
    with writer_in(tmp_path, config, range(2)) as writer:
        for step in (1, 2):
            writer.log(step, {"loss": step * 1.5})
            writer.log_routing(step, ["layers.0.attn", "layers.1.attn"], load, entropy)
    found = events(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [(1, 1.5), (2, 3.0)]
    assert found.Scalars("routing/layers.0.attn/load_1")[0].value == 0.75
    assert found.Scalars("routing/layers.1.attn/entropy")[1].value == 0.625
    assert {e.step for e in found.Images("routing/load")} == {1, 2}


def test_tensorboard_keeps_each_step_once_after_resume(tmp_path: Path) -> None:
    config = TelemetrySection(progress=False)
    write_steps(tmp_path, range(1, 6), total=8, config=config, loss=64.0)
    first = next((tmp_path / "tensorboard").iterdir())
    os.rename(first, first.with_name("events.out.tfevents.0000000001.earlier"))
    write_steps(tmp_path, range(4, 9), total=8, start=3, config=config, loss=128.0)
    curve = {e.step: e.value * e.step for e in events(tmp_path).Scalars("train/loss")}
    assert len(events(tmp_path).Scalars("train/loss")) == 8
    assert [curve[s] for s in range(1, 9)] == pytest.approx([64.0] * 3 + [128.0] * 5)


def test_routing_pictures_are_few_however_long_the_run(tmp_path: Path) -> None:
    config = TelemetrySection(progress=False)
    with writer_in(tmp_path, config, range(100)) as writer:
        for step in range(1, 101):
            writer.log_routing(step, ["r"], np.array([[0.5, 0.5]]), np.array([0.6]))
    steps = [e.step for e in events(tmp_path).Images("routing/load")]
    assert len(steps) <= 21
    assert steps[-1] == 100


def test_without_tensorboard_there_is_no_such_folder(tmp_path: Path) -> None:
    with writer_in(tmp_path, QUIET, range(1)) as writer:
        writer.log_routing(1, ["r"], [[1.0]], [0.0])
    assert not (tmp_path / "tensorboard").exists()


def plain_lines(tmp_path: Path, steps: range, total: int, start: int = 0, progress: bool = True) -> list[str]:
    text = io.StringIO()
    config = TelemetrySection(tensorboard=False, progress=progress)
    with writer_in(tmp_path, config, range(start, total), console=Console(file=text, width=200)) as writer:
        for step in steps:
            writer.log(step, {"loss": 0.5, "lr": 1e-3, "tokens_per_second": 1234.4, "people_per_second": 56.0})
    return text.getvalue().splitlines()


def test_off_a_terminal_ten_plain_lines_with_the_numbers(tmp_path: Path) -> None:
    lines = plain_lines(tmp_path, range(1, 201), total=200)
    assert [line.split()[1] for line in lines] == [f"{s}/200" for s in range(20, 201, 20)]
    assert lines[0] == "step 20/200  loss 0.5000  lr 1.00e-03  1,234 tokens/s  56 people/s"


def test_short_runs_get_a_line_a_step_and_resumed_runs_only_what_is_left(tmp_path: Path) -> None:
    assert [line.split()[1] for line in plain_lines(tmp_path, range(1, 4), total=3)] == ["1/3", "2/3", "3/3"]
    assert [line.split()[1] for line in plain_lines(tmp_path, range(61, 101), 100, start=60)] == [
        "70/100",
        "80/100",
        "90/100",
        "100/100",
    ]


def test_progress_off_prints_nothing(tmp_path: Path) -> None:
    assert plain_lines(tmp_path, range(1, 11), total=10, progress=False) == []


def test_on_a_terminal_there_is_a_bar_with_the_loss(tmp_path: Path) -> None:
    text = io.StringIO()
    config = TelemetrySection(tensorboard=False)
    console = Console(file=text, width=120, force_terminal=True, color_system=None)
    with writer_in(tmp_path, config, range(4), console=console) as writer:
        for step in range(1, 5):
            writer.advance(step)
            writer.log(step, {"loss": 0.125})
    assert "4/4" in text.getvalue()
    assert "loss 0.1250" in text.getvalue()


def test_what_a_step_is_doing_stands_below_the_bar(tmp_path: Path) -> None:
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=True, color_system=None)
    with writer_in(tmp_path, TelemetrySection(tensorboard=False), range(4), console=console) as writer:
        writer.show("rollout", 3, 7)
    with writer_in(tmp_path, TelemetrySection(tensorboard=False), range(4), console=console) as writer:
        writer.show("update", 0, 0)
    assert "3/7" in text.getvalue()
    assert "rollout" in text.getvalue()
    assert "update" in text.getvalue()


def test_throughput_divides_by_the_time_since_the_last_row() -> None:
    times = iter([10.0, 12.0, 13.0])
    throughput = Throughput(clock=lambda: next(times))
    throughput.add(tokens=100, people=8)
    first = throughput.row()
    throughput.add(tokens=100, people=8)
    throughput.add(tokens=50, people=2)
    second = throughput.row()
    assert (first["seconds"], first["tokens_per_second"], first["people_per_second"]) == (2.0, 50.0, 4.0)
    assert (second["seconds"], second["tokens_per_second"], second["people_per_second"]) == (0.5, 150.0, 10.0)


def test_memory_is_the_peak_and_has_no_gpu_entry_on_cpu() -> None:
    before = memory()["memory_gib"]
    block = np.ones(1 << 25)  # 256 MiB
    assert memory()["memory_gib"] >= before
    assert memory()["memory_gib"] > block.nbytes / 2**30
    assert "gpu_memory_gib" not in memory("cpu")
