"""Faults from outside, while two ranks train: nothing is lost, nobody waits for long, and every rank has the reason."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
from commands import TRAIN, all_tensors, one_line
from ranks import finish, run, start
from small_runs import metrics, recipe

from cuma_ds.locks import holder_of
from cuma_ds.parallel.stored import find_checkpoint, stored_steps
from cuma_ds.recipe import load_config
from cuma_ds.runs import Run

pytestmark = pytest.mark.multirank
HELPER = str(Path(__file__).parents[1] / "helpers" / "with_fault.py")
SHARDED = {"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2, "timeout_seconds": 20}
CHATS = Path(__file__).parents[1] / "data" / "chats.jsonl"
STEP, SAVE, BACKWARD = (
    "cuma_ds.training.step:run_step",
    "cuma_ds.parallel.checkpoint:save_file",
    "cuma_ds.parallel.engine:AdapterEngine.backward",
)


@pytest.fixture
def path(tmp_path, tiny_llama, tiny_encoder) -> Path:
    """A recipe of six steps on two ranks, with a checkpoint every second step."""
    return recipe(tmp_path, tiny_llama, tiny_encoder, "run", parallel=SHARDED, checkpoint={"every": 2, "keep_last": 9})


@pytest.fixture(scope="module")
def quiet(tmp_path_factory, tiny_llama, tiny_encoder) -> dict[str, torch.Tensor]:
    """What an undisturbed run learns."""
    undisturbed = recipe(tmp_path_factory.mktemp("quiet"), tiny_llama, tiny_encoder, "run", parallel=SHARDED)
    assert [code for code, _ in run(2, [TRAIN, "--config", str(undisturbed)])] == [0, 0]
    return last(undisturbed)


def last(path: Path) -> dict[str, torch.Tensor]:
    return all_tensors(find_checkpoint(Run(load_config(path).run_dir).checkpoints, 6))


def steps(path: Path) -> list[int]:
    return stored_steps(Run(load_config(path).run_dir).checkpoints)


def train(path: Path, what: dict | None = None, *more: str, timeout: float = 180) -> list[tuple[int | None, str]]:
    command = [TRAIN, "--config", str(path), *more]
    return run(2, command if what is None else [HELPER, json.dumps(what), *command], timeout=timeout)


def assert_resumes(path: Path, quiet: dict[str, torch.Tensor]) -> None:
    """The same command ends with what an undisturbed run learns, and leaves nothing half written."""
    results = train(path)
    assert [code for code, _ in results] == [0, 0], results
    again = last(path)
    assert again.keys() == quiet.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in quiet.items())
    assert [row["step"] for row in metrics(load_config(path))] == [1, 2, 3, 4, 5, 6]
    folder = load_config(path).run_dir
    hidden = [place for place in folder.rglob("*") if place.name.startswith(".") or place.name.endswith(".partial")]
    assert hidden == []


@pytest.mark.parametrize("sign", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_on_one_rank_ends_the_step_writes_a_checkpoint_and_leaves_with_75(sign, path, quiet) -> None:
    began = time.monotonic()
    results = train(path, {"function": BACKWARD, "rank": 1, "call": 3, "do": sign})
    assert [code for code, _ in results] == [75, 75], results
    assert time.monotonic() - began < 170
    assert steps(path) == [2, 3]
    assert "stopped by" in results[0][1]
    assert "after step 3 of 6; the same command goes on from there" in results[0][1]
    assert "error" not in results[0][1] + results[1][1]
    assert_resumes(path, quiet)


def test_a_signal_during_the_preparation_ends_all_ranks_at_once(path, quiet) -> None:
    results = train(path, {"function": "cuma_ds.training.inputs:check_prompts", "rank": 0, "do": "SIGTERM"})
    assert [code for code, _ in results] == [75, 75], results
    # The signal is looked at once a beat: what follows the check may have begun.
    assert re.search(
        r"by SIGTERM on rank 0 during (the preparation|loading the model); nothing was lost", results[0][1]
    )
    assert_resumes(path, quiet)


def test_an_unexpected_error_of_one_rank_is_one_line_everywhere_and_its_message_is_nowhere(path, quiet) -> None:
    results = train(path, {"function": BACKWARD, "rank": 1, "call": 4, "do": "raise", "error": "KeyError"})
    one_line(results, "rank 1: KeyError in step 4 (traceback: ")
    assert not any("Ghana" in output for _, output in results)
    file = Path(re.search(r"traceback: (\S+)\)", results[0][1])[1])
    assert file.parent == load_config(path).run_dir / "errors"
    assert "'Ghana, 34'" not in file.read_text()  # as the message has it; in the line that raised it stands as code
    assert file.read_text().endswith("\nKeyError\n")
    assert file.stat().st_mode & 0o077 == 0
    assert_resumes(path, quiet)


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(path, quiet) -> None:
    results = train(path, {"function": SAVE, "rank": 1, "call": 2, "do": "no space", "late": [0]})
    one_line(results, "checkpoint of step 4", "No space left on device")
    assert steps(path) == [2]
    assert_resumes(path, quiet)


def test_a_file_cut_short_by_a_crash_never_becomes_a_checkpoint(path, quiet) -> None:
    results = train(path, {"function": SAVE, "rank": 1, "call": 2, "do": "truncate"})
    assert results[0][0] == 2
    assert "another rank is gone" in results[0][1]
    assert steps(path) == [2]
    assert_resumes(path, quiet)


@pytest.mark.parametrize(
    ("function", "rank", "what"),
    [
        ("cuma_ds.training.inputs:check_prompts", 0, "the preparation"),
        ("cuma_ds.parallel.backbone:plan_streaming", 1, "loading the model"),
        (BACKWARD, 1, "step 1"),
    ],
)
def test_a_hang_anywhere_ends_all_ranks_in_time(function, rank, what, path) -> None:
    began = time.monotonic()
    results = train(path, {"function": function, "rank": rank, "do": "hang"})
    assert [code for code, _ in results] == [2, 2], results
    assert time.monotonic() - began < 150
    said = results[0][1] + results[1][1]
    assert "no rank has done anything for 20 s" in said or "did not answer within 20 s" in said, said
    assert what in said or what == "step 1", said


@pytest.mark.parametrize(
    ("function", "more"),
    [
        ("cuma_ds.evaluation.subject:run_subject", []),
        ("cuma_ds.evaluation.choice:predict_choices", []),
        ("cuma_ds.inference.generate:Decoder.advance", ["--data", str(CHATS), "--generate", "2"]),
    ],
)
def test_a_hang_while_loading_evaluating_or_generating_ends_all_ranks_in_time(function, more, path, quiet) -> None:
    run_dir = load_config(path).run_dir
    command = ["launchers/evaluate.py", "--run", str(run_dir), "--out", str(run_dir / "report"), *more]
    assert [code for code, _ in train(path)] == [0, 0]
    began = time.monotonic()
    results = run(2, [HELPER, json.dumps({"function": function, "rank": 1, "do": "hang"}), *command], timeout=180)
    assert [code for code, _ in results] == [2, 2], results
    assert time.monotonic() - began < 150
    said = results[0][1] + results[1][1]
    assert "no rank has done anything for 20 s" in said or "did not answer within 20 s" in said, said
    assert "Traceback" not in said
    assert not (run_dir / "report" / "report.json").exists()


def test_two_starts_at_once_are_one_run(path, quiet) -> None:
    both = [start(2, [TRAIN, "--config", str(path)]) for _ in range(2)]
    results = [finish(ranks) for ranks in both]
    assert sorted([code for code, _ in one] for one in results) == [[0, 0], [2, 2]], results
    refused = next(one for one in results if one[0][0] == 2)
    one_line(refused, "is in use by process", " on host ", "since 20")
    assert all(torch.equal(last(path)[name], tensor) for name, tensor in quiet.items())
    assert holder_of(load_config(path).run_dir) is None


def test_a_loss_that_is_no_number_stops_all_ranks_in_the_same_step_and_the_cause_is_named(path) -> None:
    what = {"function": "cuma_ds.training.objectives.sft:Sft.loss", "rank": 1, "calls": [4, 5], "do": "nan"}
    one_line(train(path, what), "step 4: the loss of rows ", "although the logits are finite", "on_nonfinite: skip")
    assert steps(path) == [2, 3]  # what was learned before is kept


def test_skipping_and_going_back_leave_out_the_same_step(path, tmp_path) -> None:
    what = {"function": "cuma_ds.training.objectives.sft:Sft.loss", "rank": 1, "calls": [4, 5], "do": "nan"}
    found = {}
    for policy in ("skip", "rollback"):
        more = ["--set", f"training.on_nonfinite={policy}", f"run.name={policy}"]
        results = train(path, what, *more)
        assert [code for code, _ in results] == [0, 0], results
        assert "step 4: the loss of rows" in results[0][1]
        run_dir = load_config(path, more[1:]).run_dir
        found[policy] = all_tensors(find_checkpoint(Run(run_dir).checkpoints, 6))
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 5, 6]
        assert rows[-1]["health/nonfinite_steps"] == 1
    assert all(torch.equal(found["skip"][name], tensor) for name, tensor in found["rollback"].items())


def test_an_update_that_breaks_the_parameters_is_found_in_its_step_and_never_saved(path) -> None:
    more = ["--set", "training.weight_decay=1e30", "training.learning_rate=1e10"]
    one_line(train(path, None, *more), "the update made ", " not finite", "weight_decay")
    assert all(tensor.isfinite().all() for step in steps(path) for tensor in checkpoint(path, step).values())


def checkpoint(path: Path, step: int) -> dict[str, torch.Tensor]:
    return all_tensors(find_checkpoint(Run(load_config(path).run_dir).checkpoints, step))
