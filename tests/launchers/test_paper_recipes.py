"""The paper's recipes: every combination merges, has the numbers of the paper's table, and runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from judge_server import verdict
from ranks import run_recipes
from raw_data import (
    alignment_row,
    prism_conversation,
    prism_user,
    survey_people,
    write_alignment,
    write_prism,
    write_survey,
)

from cuma_ds.config import RunConfig
from cuma_ds.planning.skeleton import Setup, read_model_config
from cuma_ds.recipe import load_config
from cuma_ds.training.schedule import learning_rate, with_steps

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "launchers" / "recipes" / "paper"
BACKBONES, METHODS, TASKS, ABLATIONS, PROMPTING = (
    sorted(file.with_suffix("").name for file in (RECIPES / axis).glob("*.yaml"))
    for axis in ("backbone", "method", "task", "ablation", "prompting")
)
# Steps, global batch, learning rate, longest sequence, balance weight and gate of each task.
PAPER = {
    "wvb-sft": (9375, 16, 2e-5, 1024, 0.01, "softmax_topk_softmax"),
    "wvb-heldout": (9375, 16, 2e-5, 1024, 0.01, "softmax_topk_softmax"),
    "ca-sft": (625, 16, 2e-5, 2048, 0.0, "softmax_topk"),
    "ca-choice": (625, 16, 2e-5, 2048, 0.0, "softmax_topk"),
    "ca-dpo": (3750, 8, 5e-6, 2048, 0.0, "softmax_topk"),
    "ca-grpo": (3750, 8, 1e-6, 768, 0.0, "softmax_topk"),
    "prism-sft": (125, 16, 2e-5, 2048, 0.01, "softmax_topk_softmax"),
    "prism-dpo": (500, 32, 5e-6, 2048, 0.0, "softmax_topk_softmax"),
    "prism-grpo": (750, 8, 1e-6, 768, 0.0, "softmax_topk_softmax"),
}
# Pairs of prism-dpo, whose recipe takes all there are.
PAIRS = 16_000
# Percent of Qwen3-8B and of Llama-3.1-8B that a method trains beside q and v.
SHARES = {
    "cuma-r8": (1.53, 1.39), "cuma-r64": (4.15, 3.76), "cuma-r8-released": (0.75, None),
    "cuma-r64-released": (1.96, None), "lora-r8": (0.047, None), "lora-r64": (0.374, 0.34), "mixlora": (3.01, 2.73),
    "hydralora": (2.31, 2.09),
}  # fmt: skip


def merged(backbone: str, task: str, method: str, *more: str) -> RunConfig:
    files = [f"paper/backbone/{backbone}", f"paper/task/{task}", f"paper/method/{method}"]
    return load_config([*files, *(f"paper/{name}" for name in more)])


def test_there_is_a_recipe_for_each_row() -> None:
    assert set(PAPER) == set(TASKS)
    assert {"qwen3-8b", "llama3.1-8b", "qwen3-0.6b"} == set(BACKBONES)
    released = {name for name in METHODS if name.endswith("-released")}
    others = {"cuma-equation", "dora-r64", "prefix-32", "full", "hydralora-original"}
    assert set(METHODS) == {*SHARES, *others, *released}
    assert released >= {"mixlora-released", "hydralora-released"}
    assert set(PROMPTING) == {"vanilla", "persona", "few-shot-3"}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_goes_with_every_method(task) -> None:
    for method in METHODS:
        config = merged("qwen3-8b", task, method)
        assert config.run.name == task
        assert config.training.objective == {"heldout": "sft", "choice": "sft"}.get(*[task.rpartition("-")[2]] * 2)
        assert config.data.profile_in_prompt != method.endswith(("mixlora-released", "hydralora-released"))


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_ablation_goes_with_every_backbone(backbone, ablation) -> None:
    merged(backbone, "wvb-sft", "cuma-r64", f"ablation/{ablation}")


@pytest.mark.parametrize("file", sorted(RECIPES.rglob("*.yaml")), ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_recipe_says_what_of_the_paper_it_is(file) -> None:
    text = file.read_text()
    assert text.startswith("# ")
    said = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    assert any(word in said.lower() for word in ("paper", "as released", "authors")), said


@pytest.mark.parametrize("task", TASKS)
def test_a_recipe_has_the_numbers_of_the_paper(task) -> None:
    config = merged("qwen3-8b", task, "cuma-r8")
    config = with_steps(config, config.data.max_examples or PAIRS)
    training, adapters = config.training, config.adapters
    found = (training.steps, training.global_batch_size, training.learning_rate, config.data.max_length)
    assert (*found, adapters.balance_weight, adapters.gate_norm) == PAPER[task]
    assert (training.weight_decay, training.max_grad_norm, config.run.seed) == (0.01, 1.0, 42)
    assert (adapters.num_experts, adapters.top_k, adapters.shared_a, adapters.share_router) == (8, 2, False, False)
    if task in ("ca-sft", "prism-sft"):  # as released, a schedule that is not finished
        assert learning_rate(training.steps - 1, training) == pytest.approx(2e-5 * (1001 - training.steps) / 900)
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


@pytest.mark.parametrize("method", SHARES)
def test_a_method_trains_the_share_that_the_paper_says(method) -> None:
    """Shapes alone; embeddings of profiles are 1024 wide."""
    for model, share in zip(("qwen3-8b", "llama-8b"), SHARES[method], strict=True):
        if share is None:
            continue
        config = merged("qwen3-8b", "wvb-sft", method)
        width = {"profile_dim": 1024 if config.adapters.uses_profiles else 0}
        config = config.model_copy(update={"adapters": config.adapters.model_copy(update=width)})
        shape = read_model_config(ROOT / "launchers" / "model_configs" / f"{model}.json")
        built = Setup(shape, config).build()
        trained = sum(trained.parameter.numel() for trained in built.trained_parameters())
        frozen = sum(parameter.numel() for parameter in built.parameters() if not parameter.requires_grad)
        assert 100 * trained / frozen == pytest.approx(share, abs=0.5 * 10 ** -len(str(share).partition(".")[2]))


# Small files of the benchmarks' formats.
def raw_data(source: str, folder: Path) -> Path:
    if source == "wvb":
        write_survey(folder / "wvb", survey_people(120))
        return folder / "wvb"
    if source == "ca":
        return write_alignment(folder / "ca.csv", [alignment_row(number) for number in range(36)])
    conversations = [prism_conversation(number, number % 12) for number in range(36)]
    return write_prism(folder / "prism", [prism_user(number) for number in range(12)], conversations)


def small(task: str, path: Path, folder: Path, models: tuple[Path, Path], *more: str, files: tuple[str, ...]) -> Path:
    """A paper recipe on a tiny model, written to a file: two steps, short answers, everything else as it is."""
    model, encoder = models
    names = ["paper/backbone/qwen3-0.6b", f"paper/task/{task}", *(f"paper/{file}" for file in files)]
    changes = [
        f"model.path={model}", "model.dtype=float32", f"profiles.encoder={encoder}", f"data.path={path}",
        f"profiles.cache_dir={folder / 'cache'}", f"run.output_dir={folder / 'runs'}", "training.warmup_steps=0",
        "training.steps=2", "training.global_batch_size=4", "data.max_length=500", "data.max_examples=12",
        "evaluation.bootstrap=5",
    ]  # fmt: skip
    changes += [change for change in more if change]
    config = load_config(names, changes)
    if config.profiles.max_tokens is not None:  # the tiny encoder's tokens are letters
        config = load_config(names, [*changes, "profiles.max_tokens=250"])
    written = folder / f"{config.run.name}.yaml"
    written.write_text(config.to_yaml())
    return written


def rows_of(folder: Path, recipe: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "runs" / recipe.stem / "metrics.jsonl").open()]


# What is built beside the chains of ca and prism below: each recipe once.
BUILT = {
    "wvb-sft": ("wvb-sft", ("method/cuma-r8",)),
    "wvb-heldout": ("wvb-heldout", ("method/cuma-r8",)),
    "ca-choice": ("ca-choice", ("method/cuma-r8",)),
    **{f"of-{method}": ("wvb-sft", (f"method/{method}",)) for method in METHODS if method != "cuma-r8"},
    **{f"asks-{one}": ("wvb-sft", (f"prompting/{one}",)) for one in PROMPTING},
    **{f"but-{one}": ("wvb-sft", ("method/cuma-r8", f"ablation/{one}")) for one in ABLATIONS},
}


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny_llama, tiny_encoder) -> Path:
    """The folder in which all of ``BUILT`` have run, in one process."""
    folder = tmp_path_factory.mktemp("paper")
    paths = {source: raw_data(source, folder) for source in ("wvb", "ca")}
    recipes = [
        small(
            task,
            paths[task.split("-")[0]],
            folder,
            (tiny_llama, tiny_encoder),
            f"run.name={name}",
            # Examples before a question, letter by letter, are more than the tiny model reads.
            "data.on_long_prompt=skip" if "few-shot" in name else "",
            files=files,
        )
        for name, (task, files) in BUILT.items()
    ]
    run_recipes(1, recipes)
    return folder


@pytest.mark.multirank
@pytest.mark.parametrize("name", [f"asks-{one}" for one in PROMPTING])
def test_a_prompt_makes_a_run_that_trains_nothing(name, built) -> None:
    """Its checkpoint is what evaluate.py reads."""
    assert (built / "runs" / name / "checkpoints" / "step-0").is_dir()
    assert load_config(built / "runs" / name / "config.yaml").data.profile_in_prompt == (name != "asks-vanilla")


@pytest.mark.multirank
@pytest.mark.parametrize("name", [name for name in BUILT if not name.startswith("asks-")])
def test_a_recipe_is_built_and_takes_two_steps(name, built) -> None:
    rows = rows_of(built, Path(name))
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)


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
    method = ("method/cuma-r8",)
    recipes = [
        small(f"{source}-sft", path, tmp_path, models, files=method),
        small(f"{source}-dpo", path, tmp_path, models, start, files=method),
        small(f"{source}-grpo", path, tmp_path, models, start, *rollouts, files=method),
    ]
    run_recipes(1, recipes)
    rows = {recipe.stem: rows_of(tmp_path, recipe) for recipe in recipes}
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
