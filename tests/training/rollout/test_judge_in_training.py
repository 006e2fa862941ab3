"""Runs whose reward a judge gives: nothing is trained when it is down at start, nothing is lost when it goes down."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import TRAIN
from judge_server import Reply, fault, verdict
from ranks import run
from small_runs import metrics, recipe

from cuma_ds.parallel.stored import find_checkpoint, has_checkpoint, read_adapters
from cuma_ds.recipe import load_config
from cuma_ds.runs import Run

CHATS = Path(__file__).parents[2] / "data" / "chats.jsonl"
STEPS = 3
pytestmark = pytest.mark.multirank


def prefers_more_vowels(prompt: str, _: int) -> Reply:
    """A judge that says the same of the same answers every time."""
    first, second = (answer.lower() for answer in prompt.split("Answer A:\n")[1].split("Answer B:\n"))
    vowels = [sum(answer.count(vowel) for vowel in "aeiou") for answer in (first, second)]
    return verdict("tie" if vowels[0] == vowels[1] else "A" if vowels[0] > vowels[1] else "B")


@pytest.fixture
def judged(tmp_path, tiny_llama, tiny_encoder, server, monkeypatch):
    """Write a recipe whose judge is the server; each run has a cache of verdicts of its own."""

    def go(name: str) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache-{name}"))
        return recipe(
            tmp_path, tiny_llama, tiny_encoder, name,
            data={"path": str(CHATS), "kind": "chat"},
            training={"objective": "grpo", "steps": STEPS, "global_batch_size": 2, "micro_batch_size": 8},
            grpo={"rewards": ["judge"], "group_size": 4, "length_penalty": 0.1},
            rollout={"max_new_tokens": 5},
            judge={"url": server.url, "model": "m", "retries": 0, "concurrency": 1},
        )  # fmt: skip

    return go


def started(path: Path) -> tuple[list[int | None], str]:
    """Exit codes and output of two ranks."""
    finished = run(2, [TRAIN, "--config", str(path)])
    return [code for code, _ in finished], "".join(output for _, output in finished)


def only_line_about(output: str, words: str) -> str:
    found = [line for line in output.splitlines() if words in line]
    assert len(found) == 1, output
    assert "Traceback" not in output
    return found[0]


def test_a_judge_that_is_down_at_start_is_one_line_and_nothing_is_trained(judged, server) -> None:
    server.script = lambda *_: fault(503)
    path = judged("down")
    codes, output = started(path)
    assert codes == [2, 2], output
    assert f"the judge m at {server.url} does not answer: 1 of 1 calls" in only_line_about(output, "does not answer")
    assert len(server.calls) == 1, "one rank asks"
    assert not has_checkpoint(Run(load_config(path).run_dir).checkpoints)
    assert not Run(load_config(path).run_dir).metrics.exists()


def test_a_judge_that_goes_down_leaves_a_checkpoint_and_the_run_goes_on_where_it_was(judged, server) -> None:
    """A step asks 2 prompts x 4 completions x 2 orders = 16 times. After the question at the start and one whole step,
    few calls of the second are answered.
    """
    server.script = prefers_more_vowels
    expected = judged("through")
    codes, output = started(expected)
    assert codes == [0, 0], output

    calls = len(server.calls)
    server.script = lambda prompt, number: prefers_more_vowels(prompt, 0) if number <= calls + 20 else fault(500)
    path = judged("stopped")
    codes, output = started(path)
    assert codes == [2, 2], output
    assert "status 500" in only_line_about(output, "does not answer")
    assert [row["step"] for row in metrics(load_config(path))] == [1]
    assert find_checkpoint(Run(load_config(path).run_dir).checkpoints).name == "step-1"

    calls, server.script = len(server.calls), prefers_more_vowels
    codes, output = started(path)
    assert codes == [0, 0], output
    assert len(server.calls) - calls < 1 + 2 * 16, "known verdicts are not asked for again"
    found, same = (metrics(load_config(one)) for one in (path, expected))
    assert [row["step"] for row in found] == [1, 2, 3]
    for name in ("loss", "reward", "reward_std", "rewards/judge/mean", "rewards/length/mean", "completions/left_out"):
        assert [row[name] for row in found] == [row[name] for row in same], name
    assert any(row["reward_std"] > 0 for row in same), "there is something to learn"
    trained = [read_adapters(find_checkpoint(Run(load_config(one).run_dir).checkpoints)) for one in (path, expected)]
    for name, tensor in trained[0].items():
        assert torch.equal(tensor, trained[1][name]), name
