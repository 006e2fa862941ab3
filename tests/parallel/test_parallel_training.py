"""Any number of ranks, any placement of backbone and experts: the same training as one process without DeepSpeed."""

from __future__ import annotations

import json
import shutil

import pytest
from ranks import run_recipes
from single_process import SingleRun, train_single
from small_runs import STEPS, assert_same_training, metrics, recipe

from cuma_ds.parallel.ds_config import DS_CONFIGS
from cuma_ds.parallel.stored import find_checkpoint, read_adapters, read_state
from cuma_ds.recipe import load_config
from cuma_ds.runs import Run

pytestmark = pytest.mark.multirank


def placements(world: int) -> dict[str, dict]:
    """Every ZeRO stage, sharding, ep_size and dispatch at one world size; on 4 ranks, stage 1 with a whole backbone."""
    cases = {"zero3": {"deepspeed_config": "zero3"}}
    if world == 2:
        for special in ("zero2_sharded_offload_optimizer", "zero2_sharded_offload_backbone", "zero2_sharded_overlap"):
            cases[special] = {"deepspeed_config": special, "ep_size": 2}
        for dispatch in ("all_to_all", "gather_experts"):
            cases[f"beside-{dispatch}"] = {
                "deepspeed_config": "zero2_sharded_backbone",
                "ep_size": 2,
                "dispatch": dispatch,
                "overlap_dispatch": True,
            }
    for stage in ("zero2", "zero2_sharded_backbone", "zero1", "zero1_sharded_backbone")[: 3 if world == 4 else 4]:
        for ep_size in (size for size in (1, 2, 4) if world % size == 0):
            for dispatch in ("all_to_all", "gather_experts", "auto") if ep_size > 1 else ("auto",):
                cases[f"{stage}-ep{ep_size}-{dispatch}"] = {
                    "deepspeed_config": stage,
                    "ep_size": ep_size,
                    "dispatch": dispatch,
                }
    return cases


@pytest.fixture(scope="module")
def expected(tmp_path_factory, tiny_llama, tiny_encoder) -> SingleRun:
    folder = tmp_path_factory.mktemp("single")
    single = train_single(load_config(recipe(folder, tiny_llama, tiny_encoder, "single")))
    assert single.losses[-1] < single.losses[0]
    assert max(single.grad_norms) > 0.05, "clipping must be active for the comparison to mean something"
    return single


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_placement_equals_a_single_process_without_deepspeed(
    world, tmp_path, tiny_llama, tiny_encoder, expected
) -> None:
    recipes = [
        recipe(tmp_path, tiny_llama, tiny_encoder, f"w{world}-{name}", parallel=p)
        for name, p in placements(world).items()
    ]
    run_recipes(world, recipes, timeout=900, fresh=True)
    for path in recipes:
        assert_same_training(path, expected)


VARIANTS = {
    "shared-a-mlp": {"adapters": {"shared_a": True, "router": "mlp", "router_hidden": 8}},
    "soft": {"adapters": {"gate_norm": "softmax", "share_router": False}},
    "semantic-only": {"adapters": {"method": "hydralora"}},
    "dominant": {"adapters": {"gradient_mask": "dominant"}},
    "dominant-shared-a": {"adapters": {"gradient_mask": "dominant", "shared_a": True}},
    "groups": {
        "adapters": {"gradient_mask": "groups", "gradient_groups": {"country": {"Norway": [0], "Japan": [1, 2]}}}
    },
    "profile-routed": {
        "adapters": {"router_input": "profile", "gate_temperature": 0.5},
        "training": {"router_learning_rate": 0.003, "router_weight_decay": 0.3},
    },
    "blurred": {"adapters": {"profile_dropout": 0.3, "profile_noise": 0.5}},
    "no-balance": {"adapters": {"balance_weight": 0.0}, "training": {"max_grad_norm": 0.0}},
    "checkpointing": {"model": {"gradient_checkpointing": True}},
    "odd-batch": {"training": {"global_batch_size": 7}},
    "profile-in-prompt": {"data": {"profile_in_prompt": True, "max_length": 300, "example_weight": "answers"}},
}


def test_variants_at_ep_2_equal_a_single_process(tmp_path, tiny_llama, tiny_encoder) -> None:
    paths = {}
    for name, changes in VARIANTS.items():
        for dispatch in ("all_to_all", "gather_experts"):
            parallel = {"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2, "dispatch": dispatch}
            paths[name, dispatch] = recipe(
                tmp_path, tiny_llama, tiny_encoder, f"{name}-{dispatch}", parallel=parallel, **changes
            )
    run_recipes(2, list(paths.values()), timeout=900)
    for name in VARIANTS:
        single = train_single(load_config(paths[name, "all_to_all"]))
        for dispatch in ("all_to_all", "gather_experts"):
            assert_same_training(paths[name, dispatch], single)


def test_gradient_accumulation_equals_a_single_process_with_the_same_micro_steps(
    tmp_path, tiny_llama, tiny_encoder
) -> None:
    parallel = {"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2}
    path = recipe(tmp_path, tiny_llama, tiny_encoder, "accumulate", parallel=parallel, training={"micro_batch_size": 2})
    run_recipes(2, [path])
    assert_same_training(path, train_single(load_config(path), micro_steps=2))


HALF = {
    "bf16-sharded-tokens": {"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2, "dispatch": "all_to_all"},
    "bf16-sharded-experts": {"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2, "dispatch": "gather_experts"},
    "bf16-offload": {"deepspeed_config": "zero2_sharded_offload_backbone"},
    "bf16-whole": {"deepspeed_config": "zero1", "ep_size": 2},
    "bf16-zero3": {"deepspeed_config": "zero3"},
    "fp16-sharded": {"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2},
    "fp16-whole": {"deepspeed_config": "zero1"},
}


@pytest.mark.sixteen_bit
def test_half_precision_backbones_stay_near_their_single_process_run(tmp_path, tiny_llama, tiny_encoder) -> None:
    """Within 2 % in every loss and 5 % in every gradient norm: rounding differs where batches are cut otherwise."""
    paths = {}
    for name, parallel in HALF.items():
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[name[:4]]
        paths[name] = recipe(tmp_path, tiny_llama, tiny_encoder, name, parallel=parallel, model={"dtype": dtype})
    run_recipes(2, list(paths.values()))
    singles = {
        prefix: train_single(load_config(paths[f"{prefix}-sharded{more}"]))
        for prefix, more in (("bf16", "-tokens"), ("fp16", ""))
    }
    for name, path in paths.items():
        rows = metrics(load_config(path))
        single = singles[name[:4]]
        for row, loss, norm in zip(rows, single.losses, single.grad_norms, strict=True):
            assert row["loss"] == pytest.approx(loss, rel=2e-2), name
            assert row["grad_norm"] == pytest.approx(norm, rel=5e-2), name
        assert all(row.get("loss_scale") == (4096 if name.startswith("fp16") else None) for row in rows), name
        resolved = json.loads((load_config(path).run_dir / "deepspeed.json").read_text())
        assert resolved["train_batch_size"] == 8
        assert resolved["gradient_clipping"] == 0.05


@pytest.mark.sixteen_bit
def test_float16_steps_that_overflow_change_nothing(tmp_path, tiny_llama, tiny_encoder) -> None:
    """A loss scale that nothing survives; the run then goes on with a sensible one, as if those steps had not been."""
    settings = json.loads((DS_CONFIGS / "zero2_sharded_backbone.json").read_text())
    (tmp_path / "hopeless.json").write_text(
        json.dumps(settings | {"fp16": {"initial_scale_power": 60, "hysteresis": 1}})
    )
    half = {"model": {"dtype": "float16"}, "training": {"schedule": "constant", "warmup_steps": 0, "steps": 2}}
    first = recipe(
        tmp_path,
        tiny_llama,
        tiny_encoder,
        "overflow",
        parallel={"deepspeed_config": str(tmp_path / "hopeless.json")},
        **half,
    )
    then = tmp_path / "then.yaml"
    then.write_text(
        first.read_text()
        .replace(str(tmp_path / "hopeless.json"), "zero2_sharded_backbone")
        .replace("steps: 2", "steps: 5")
    )
    run_recipes(1, [first, then])
    config = load_config(then)
    rows = metrics(config)
    assert [row["loss_scale"] for row in rows] == [2.0**59, 2.0**58, 4096, 4096, 4096]
    assert [row["grad_norm"] is None for row in rows] == [True, True, False, False, False]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert read_state(find_checkpoint(Run(config.run_dir).checkpoints, 5))["optimizer_steps"] == 3
    assert read_state(find_checkpoint(Run(config.run_dir).checkpoints, 2))["optimizer_steps"] == 0
    untouched = read_adapters(find_checkpoint(Run(config.run_dir).checkpoints, 2))
    assert all(not tensor.any() for name, tensor in untouched.items() if name.endswith("lora_b"))


@pytest.mark.parametrize("odd_world", [3])
def test_odd_world_sizes_train_with_fillers(odd_world, tmp_path, tiny_llama, tiny_encoder, expected) -> None:
    path = recipe(tmp_path, tiny_llama, tiny_encoder, "odd", parallel={"deepspeed_config": "zero2_sharded_backbone"})
    run_recipes(odd_world, [path])
    assert_same_training(path, expected)


def test_a_run_moves_between_topologies(tmp_path, tiny_llama, tiny_encoder, expected) -> None:
    """Stopped at step 3 on (4 ranks, ep 2, sharded), it goes on anywhere as if it had never stopped."""
    sharded = {"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2}
    first = recipe(
        tmp_path, tiny_llama, tiny_encoder, "moving", parallel=sharded, checkpoint={"every": 3, "keep_last": 5}
    )
    run_recipes(4, [first])
    assert_same_training(first, expected)
    source = load_config(first).run_dir
    destinations = {
        1: [{"deepspeed_config": "zero1"}, {"deepspeed_config": "zero3"}],
        2: [
            {"deepspeed_config": "zero2_sharded_backbone"},
            {"deepspeed_config": "zero3"},
            {"deepspeed_config": "zero2", "ep_size": 2},
            {"deepspeed_config": "zero2_sharded_offload_optimizer"},
        ],
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


@pytest.mark.parametrize("name", ["profile-routed", "blurred"])
def test_router_options_stop_and_go_on_where_the_routers_are_sharded(name, tmp_path, tiny_llama, tiny_encoder) -> None:
    """Stage 3 on two ranks; stopped at step 3, on one rank with a whole backbone then: as one process all the way."""
    path = recipe(
        tmp_path,
        tiny_llama,
        tiny_encoder,
        name,
        parallel={"deepspeed_config": "zero3"},
        checkpoint={"every": 3, "keep_last": 5},
        **VARIANTS[name],
    )
    single = train_single(load_config(path))
    run_recipes(2, [path])
    assert_same_training(path, single)
    shutil.rmtree(load_config(path).run_dir / "checkpoints" / f"step-{STEPS}")
    path.write_text(path.read_text().replace("zero3", "zero1"))
    run_recipes(1, [path])
    assert_same_training(path, single)


def test_a_checkpoint_holds_only_what_trains(tmp_path, tiny_llama, tiny_encoder) -> None:
    path = recipe(
        tmp_path,
        tiny_llama,
        tiny_encoder,
        "size",
        parallel={"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2},
    )
    run_recipes(2, [path])
    folder = find_checkpoint(Run(load_config(path).run_dir).checkpoints)
    state = read_state(folder)
    assert sorted(state["files"]) == ["experts-0-of-2.safetensors", "experts-1-of-2.safetensors", "shared.safetensors"]
    trained = sum(tensor.numel() for name, tensor in read_adapters(folder).items() if not name.startswith("profile_"))
    content = sum(state["files"].values())
    headers = sum(int.from_bytes((folder / name).read_bytes()[:8], "little") + 8 for name in state["files"])
    # Parameter and two moments in float32; the standardisation; the shares of 4 experts for 4 routers.
    assert content - headers == 12 * trained + 4 * (16 + 1) + 4 * 4 * 4
    assert (folder.parent / "latest").read_text().strip() == folder.name
