"""Any number of ranks, any placement of backbone and experts: the same training as one process without DeepSpeed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from ranks import run_recipes
from single_process import SingleRun, train_single

from cuma_ds.config import RunConfig, load_config
from cuma_ds.parallel.checkpoint import find_checkpoint, read_adapters, read_state

pytestmark = pytest.mark.multirank
DATA = Path(__file__).parent / "data" / "opinions.jsonl"
STEPS = 6


def recipe(folder: Path, tiny_llama: Path, tiny_encoder: Path, name: str, **sections: dict) -> Path:
    """Write a small recipe; ``sections`` update its sections."""
    values = {
        "run": {"name": name, "output_dir": str(folder / "runs"), "seed": 3},
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "profiles": {"encoder": str(tiny_encoder), "cache_dir": str(folder / "cache")},
        "adapters": {"num_experts": 4, "top_k": 2, "lora_r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], "balance_weight": 0.05},
        "data": {"source": "jsonl", "path": str(DATA)},
        "training": {
            "steps": STEPS, "global_batch_size": 8, "micro_batch_size": 8, "learning_rate": 0.01, "warmup_steps": 2,
            "weight_decay": 0.02, "adam_eps": 1.0e-5, "max_grad_norm": 0.05,
        },
        "checkpoint": {"every": 0},
        "telemetry": {"tensorboard": False},
    }  # fmt: skip
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def metrics(config: RunConfig) -> list[dict[str, float]]:
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(path: Path, expected: SingleRun, tolerance: float = 1e-5) -> None:
    config = load_config(path)
    rows = metrics(config)
    assert [row["step"] for row in rows] == list(range(1, config.training.steps + 1))
    for row, loss, norm in zip(rows, expected.losses, expected.grad_norms, strict=True):
        assert row["loss"] == pytest.approx(loss, rel=tolerance, abs=tolerance), path.stem
        assert row["grad_norm"] == pytest.approx(norm, rel=tolerance, abs=tolerance), path.stem
    trained = read_adapters(find_checkpoint(config.run_dir))
    for name, tensor in expected.state.items():
        torch.testing.assert_close(trained[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{path.stem} {n}: {m}")


def placements(world: int) -> dict[str, dict]:
    """Every combination of ZeRO stage, sharding, ep_size and dispatch at one world size; on 4 ranks stage 1 stands back for time."""
    cases = {"zero3": {"deepspeed_config": "zero3"}}
    for stage in ("zero2", "zero2_sharded_backbone", "zero1", "zero1_sharded_backbone")[: 2 if world == 4 else 4]:
        for ep_size in (size for size in (1, 2, 4) if world % size == 0):
            for dispatch in ("all_to_all", "gather_experts", "auto") if ep_size > 1 else ("auto",):
                cases[f"{stage}-ep{ep_size}-{dispatch}"] = {"deepspeed_config": stage, "ep_size": ep_size, "dispatch": dispatch}
    return cases


@pytest.fixture(scope="module")
def expected(tmp_path_factory, tiny_llama, tiny_encoder) -> SingleRun:
    folder = tmp_path_factory.mktemp("single")
    single = train_single(load_config(recipe(folder, tiny_llama, tiny_encoder, "single")))
    assert single.losses[-1] < single.losses[0]
    assert max(single.grad_norms) > 0.05, "clipping must be active for the comparison to mean something"
    return single


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_placement_equals_a_single_process_without_deepspeed(world, tmp_path, tiny_llama, tiny_encoder, expected) -> None:
    recipes = [recipe(tmp_path, tiny_llama, tiny_encoder, f"w{world}-{name}", parallel=p) for name, p in placements(world).items()]
    run_recipes(world, recipes, timeout=900)
    for path in recipes:
        assert_same_training(path, expected)


VARIANTS = {
    "shared-a-mlp": {"adapters": {"shared_a": True, "router": "mlp", "router_hidden": 8}},
    "soft": {"adapters": {"gate_norm": "softmax", "share_router": False}},
    "semantic-only": {"adapters": {"method": "hydralora"}},
    "dominant": {"adapters": {"gradient_mask": "dominant"}},
    "dominant-shared-a": {"adapters": {"gradient_mask": "dominant", "shared_a": True}},
    "no-balance": {"adapters": {"balance_weight": 0.0}, "training": {"max_grad_norm": 0.0}},
    "checkpointing": {"model": {"gradient_checkpointing": True}},
    "odd-batch": {"training": {"global_batch_size": 7}},
    "profile-in-prompt": {"data": {"profile_in_prompt": True, "example_weight": "answers"}},
}


def test_variants_at_ep_2_equal_a_single_process(tmp_path, tiny_llama, tiny_encoder) -> None:
    paths = {}
    for name, changes in VARIANTS.items():
        for dispatch in ("all_to_all", "gather_experts"):
            parallel = {"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2, "dispatch": dispatch}
            paths[name, dispatch] = recipe(tmp_path, tiny_llama, tiny_encoder, f"{name}-{dispatch}", parallel=parallel, **changes)
    run_recipes(2, list(paths.values()), timeout=900)
    for name in VARIANTS:
        single = train_single(load_config(paths[name, "all_to_all"]))
        for dispatch in ("all_to_all", "gather_experts"):
            assert_same_training(paths[name, dispatch], single)


def test_gradient_accumulation_equals_a_single_process_with_the_same_micro_steps(tmp_path, tiny_llama, tiny_encoder) -> None:
    parallel = {"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2}
    path = recipe(tmp_path, tiny_llama, tiny_encoder, "accumulate", parallel=parallel, training={"micro_batch_size": 2})
    run_recipes(2, [path])
    assert_same_training(path, train_single(load_config(path), micro_steps=2))


def test_bfloat16_backbone_stays_near_its_single_process_run(tmp_path, tiny_llama, tiny_encoder) -> None:
    parallel = {"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2}
    path = recipe(tmp_path, tiny_llama, tiny_encoder, "bf16", parallel=parallel, model={"dtype": "bfloat16"})
    run_recipes(2, [path])
    single = train_single(load_config(path))
    for row, loss in zip(metrics(load_config(path)), single.losses, strict=True):
        assert row["loss"] == pytest.approx(loss, rel=2e-2)


@pytest.mark.parametrize("odd_world", [3])
def test_odd_world_sizes_train_with_fillers(odd_world, tmp_path, tiny_llama, tiny_encoder, expected) -> None:
    path = recipe(tmp_path, tiny_llama, tiny_encoder, "odd", parallel={"deepspeed_config": "zero2_sharded_backbone"})
    run_recipes(odd_world, [path])
    assert_same_training(path, expected)


def test_a_run_moves_between_topologies(tmp_path, tiny_llama, tiny_encoder, expected) -> None:
    """Stopped at step 3 on (4 ranks, ep 2, sharded), it goes on anywhere as if it had never stopped."""
    sharded = {"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2}
    first = recipe(tmp_path, tiny_llama, tiny_encoder, "moving", parallel=sharded, checkpoint={"every": 3, "keep_last": 5})
    run_recipes(4, [first])
    assert_same_training(first, expected)
    source = load_config(first).run_dir
    destinations = {
        1: [{"deepspeed_config": "zero1"}, {"deepspeed_config": "zero3"}],
        2: [{"deepspeed_config": "zero2_sharded_backbone"}, {"deepspeed_config": "zero3"}, {"deepspeed_config": "zero2", "ep_size": 2}],
        4: [{"deepspeed_config": "zero2_sharded_backbone", "ep_size": 4}, {"deepspeed_config": "zero3"}],
    }
    for world, parallels in destinations.items():
        paths = []
        for index, parallel in enumerate(parallels):
            name = f"to-w{world}-{index}"
            paths.append(recipe(tmp_path, tiny_llama, tiny_encoder, name, parallel=parallel))
            shutil.copytree(source, tmp_path / "runs" / name)
            shutil.rmtree(tmp_path / "runs" / name / "checkpoints" / f"step-{STEPS}")
        run_recipes(world, paths)
        for path in paths:
            assert_same_training(path, expected)


def test_a_checkpoint_holds_only_what_trains(tmp_path, tiny_llama, tiny_encoder) -> None:
    path = recipe(tmp_path, tiny_llama, tiny_encoder, "size", parallel={"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2})
    run_recipes(2, [path])
    folder = find_checkpoint(load_config(path).run_dir)
    state = read_state(folder)
    assert sorted(state["files"]) == ["experts-0-of-2.safetensors", "experts-1-of-2.safetensors", "shared.safetensors"]
    trained = sum(tensor.numel() for name, tensor in read_adapters(folder).items() if not name.startswith("profile_"))
    content = sum(state["files"].values())
    headers = sum(int.from_bytes((folder / name).read_bytes()[:8], "little") + 8 for name in state["files"])
    assert content - headers == 12 * trained + 4 * (16 + 1)  # parameter and two moments in float32; the standardisation
    assert (folder.parent / "latest").read_text().strip() == folder.name
