"""The paper's preference recipes: every combination merges, has the numbers of the paper's table, and runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from judge_server import verdict
from ranks import run_recipes
from raw_data import alignment_row, prism_conversation, prism_user, write_alignment, write_prism

from cuma_ds.config import RunConfig, load_config

RECIPES = Path(__file__).parents[2] / "launchers" / "recipes" / "paper"
BACKBONES, METHODS, TASKS = (
    sorted(file.with_suffix("").name for file in (RECIPES / axis).glob("*.yaml"))
    for axis in ("backbone", "method", "task")
)
# Steps, global batch, learning rate, longest sequence, balance weight and gate of each task.
PAPER = {
    "ca-sft": (625, 16, 2e-5, 2048, 0.0, "softmax_topk"),
    "ca-dpo": (3750, 8, 5e-6, 2048, 0.0, "softmax_topk"),
    "ca-grpo": (3750, 8, 1e-6, 768, 0.0, "softmax_topk"),
    "prism-sft": (125, 16, 2e-5, 2048, 0.01, "softmax_topk_softmax"),
    "prism-dpo": (500, 32, 5e-6, 2048, 0.0, "softmax_topk_softmax"),
    "prism-grpo": (750, 8, 1e-6, 768, 0.0, "softmax_topk_softmax"),
}


def merged(backbone: str, task: str, method: str) -> RunConfig:
    return load_config([f"paper/backbone/{backbone}", f"paper/task/{task}", f"paper/method/{method}"])


def test_there_is_a_recipe_for_each_row() -> None:
    assert set(PAPER) == set(TASKS)
    assert {"qwen3-8b", "llama3.1-8b", "qwen3-0.6b"} <= set(BACKBONES)
    assert {"cuma-r8", "cuma-r64", "lora-r8", "lora-r64"} <= set(METHODS)


@pytest.mark.parametrize("task", TASKS)
def test_every_combination_is_a_whole_recipe(task) -> None:
    for backbone in BACKBONES:
        for method in METHODS:
            config = merged(backbone, task, method)
            assert config.run.name == task
            assert config.training.objective == task.rpartition("-")[2]
            assert config.adapters.lora_r == int(method.rpartition("-r")[2]) == config.adapters.lora_alpha / 2
            assert config.data.profile_in_prompt


@pytest.mark.parametrize("task", TASKS)
def test_a_recipe_has_the_numbers_of_the_paper(task) -> None:
    config = merged("qwen3-8b", task, "cuma-r8")
    training, adapters = config.training, config.adapters
    found = (training.steps, training.global_batch_size, training.learning_rate, config.data.max_length)
    assert (*found, adapters.balance_weight, adapters.gate_norm) == PAPER[task]
    assert (training.weight_decay, training.max_grad_norm, config.run.seed) == (0.01, 1.0, 42)
    assert (adapters.num_experts, adapters.top_k, adapters.shared_a, adapters.share_router) == (8, 2, False, False)
    if config.dpo is not None:
        assert (config.dpo.beta, config.dpo.loss, config.dpo.reference) == (0.1, "sigmoid", "start")
    if config.grpo is not None:
        assert config.rollout is not None
        assert (config.grpo.group_size, config.grpo.epsilon, config.grpo.kl_weight) == (8, 0.2, 0.0)
        assert (config.rollout.temperature, config.rollout.max_new_tokens) == (1.0, 256)


@pytest.mark.parametrize("source", ["ca", "prism"])
def test_preferences_start_from_the_supervised_run_with_the_same_adapters(source) -> None:
    start = merged("qwen3-8b", f"{source}-sft", "cuma-r8")
    for task in ("dpo", "grpo"):
        config = merged("qwen3-8b", f"{source}-{task}", "cuma-r8")
        assert config.model.init_from == str(start.run_dir)
        same = {"balance_weight": start.adapters.balance_weight}
        assert config.adapters.model_copy(update=same) == start.adapters
        assert config.profiles == start.profiles


# Small files of the benchmarks' formats.
def raw_data(source: str, folder: Path) -> Path:
    if source == "ca":
        return write_alignment(folder / "ca.csv", [alignment_row(number) for number in range(36)])
    conversations = [prism_conversation(number, number % 12) for number in range(36)]
    return write_prism(folder / "prism", [prism_user(number) for number in range(12)], conversations)


def small(task: str, path: Path, folder: Path, models: tuple[Path, Path], *more: str) -> Path:
    """A paper recipe on a tiny model, written to a file: two steps, short answers, everything else as it is."""
    model, encoder = models
    files = ["paper/backbone/qwen3-0.6b", f"paper/task/{task}", "paper/method/cuma-r8"]
    changes = [
        f"model.path={model}", "model.dtype=float32", f"profiles.encoder={encoder}", f"data.path={path}",
        f"profiles.cache_dir={folder / 'cache'}", f"run.output_dir={folder / 'runs'}", "training.warmup_steps=0",
        "training.steps=2", "training.global_batch_size=4", "data.max_length=384", "evaluation.bootstrap=5",
    ]  # fmt: skip
    config = load_config(files, [*changes, *more])
    written = folder / f"{task}.yaml"
    written.write_text(config.to_yaml())
    return written


@pytest.mark.multirank
@pytest.mark.parametrize("source", ["ca", "prism"])
def test_a_recipe_goes_from_supervised_learning_to_an_evaluated_result(
    source, tmp_path, tiny_llama, tiny_encoder, server, launch, monkeypatch
) -> None:
    server.script = lambda prompt, number: verdict("AB"[number % 2])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "verdicts"))
    path, models = raw_data(source, tmp_path), (tiny_llama, tiny_encoder)
    start = f"model.init_from={tmp_path / 'runs' / f'{source}-sft'}"
    rollouts = ["rollout.max_new_tokens=5", "grpo.group_size=2", f"judge.url={server.url}", "judge.retries=0"]
    recipes = [
        small(f"{source}-sft", path, tmp_path, models),
        small(f"{source}-dpo", path, tmp_path, models, start),
        small(f"{source}-grpo", path, tmp_path, models, start, *rollouts),
    ]
    run_recipes(1, recipes)
    rows = {
        recipe.stem: [json.loads(line) for line in (tmp_path / "runs" / recipe.stem / "metrics.jsonl").open()]
        for recipe in recipes
    }
    assert [len(found) for found in rows.values()] == [2, 2, 2]
    assert all(math.isfinite(row["loss"]) for found in rows.values() for row in found)
    assert rows[f"{source}-dpo"][0]["rewards/margins"] == pytest.approx(0, abs=1e-3)  # but for dropout
    assert rows[f"{source}-dpo"][1]["rewards/margins"] != 0
    assert server.calls
    assert {"reward", "frac_reward_zero_std"} <= rows[f"{source}-grpo"][1].keys()

    done = launch("evaluate", "--run", str(tmp_path / "runs" / f"{source}-dpo"))
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "runs" / f"{source}-dpo" / "evaluation" / "report.json").read_text())
    assert report["kind"] == "preference"
    contenders = report["splits"]["test"]["rows"]
    assert {"before", "start", "trained"} <= contenders.keys()
