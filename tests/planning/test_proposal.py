"""What plan.py proposes fits, is what planning the printed recipe gives, and nothing smaller or weaker would do."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from cuma_ds.config import RunConfig
from cuma_ds.errors import ConfigError, TopologyError
from cuma_ds.planning.cost import Hardware, Work
from cuma_ds.planning.plan import Plan, Planner
from cuma_ds.planning.proposal import QUANTISATIONS, Ask, Choice, propose
from cuma_ds.planning.skeleton import read_model_config
from cuma_ds.recipe import load_config

SHAPES = Path(__file__).parents[2] / "launchers" / "model_configs"
WORK = Work(2, 32, 32)
GPUS, PER_MACHINE = 8, 4
BASE = {
    "model": {"path": "m", "dtype": "bfloat16"},
    "profiles": {"encoder": "not-read-here"},
    "adapters": {"num_experts": 4, "lora_r": 2, "target_modules": ["q_proj"]},
    "data": {"max_length": 32},
    "parallel": {"deepspeed_config": "zero2_sharded_backbone"},
    "training": {"global_batch_size": 32, "micro_batch_size": 1},
}


def planner(folder: Path, shape: Path, **sections: dict) -> Planner:
    rival = "method" in sections.get("adapters", {})  # which reads none of the keys below
    values = {**BASE, **({"adapters": {}} if rival else {})}
    values |= {name: {**values.get(name, {}), **section} for name, section in sections.items()}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return Planner(load_config(path), read_model_config(shape), 16)


def machine(memory: float) -> Hardware:
    return Hardware(gpus_per_node=PER_MACHINE, memory=memory, reserved=0.0)


def planned_again(choice: Choice, folder: Path, model: Path, hardware: Hardware) -> Plan:
    """The recipe that a choice prints, planned without the proposal."""
    file = folder / "proposed.json"
    file.write_text(json.dumps(choice.deepspeed))
    sections: dict[str, dict] = {"parallel": {"deepspeed_config": str(file)}}
    for key, value in choice.settings.items():
        section, name = key.split(".")
        sections[section] = {**BASE.get(section, {}), **sections.get(section, {}), name: value}
    return planner(folder, model, **sections).plan(choice.plan.gpus, Work(**choice.plan.work), hardware)


@pytest.fixture(scope="module")
def memory(tiny_llama, tmp_path_factory) -> dict[tuple[str, int], int]:
    """Bytes of each quantisation and group of ranks, planned one by one; of the ``ep_size`` that takes the least."""
    found, folder = {}, tmp_path_factory.mktemp("totals")
    for kind in QUANTISATIONS:
        plans = planner(folder, tiny_llama, model={"quantisation": kind})
        for size in (1, 2, 4, 8):
            ours = {"shard_group": size, "prefetch_bucket_size": 50_000_000, "max_reuse_distance": 100_000_000}
            file = folder / f"{size}.json"
            zero = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 50_000_000}}
            file.write_text(json.dumps(zero | ({"frozen_backbone": {"sharded": True, **ours}} if size > 1 else {})))
            found[kind, size] = min(
                plans.plan_layout(plans.layout(GPUS, WORK, machine(1), placed), machine(1)).total_memory
                for ep_size in (1, 2, 4)
                for placed in [with_parallel(plans.config, deepspeed_config=str(file), ep_size=ep_size)]
            )
    return found


def with_parallel(config: RunConfig, **changes: object) -> RunConfig:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=changes)})


def test_the_smallest_group_with_the_weakest_quantisation_is_found(memory, tmp_path, tiny_llama) -> None:
    plans = planner(tmp_path, tiny_llama)
    for room in sorted(memory.values())[::4]:
        fitting = [one for one in memory if memory[one] <= room]
        expected = min(fitting, key=lambda one: (QUANTISATIONS.index(one[0]), one[1]))
        recipe, smallest, *fastest = propose(plans, Ask("tiny", GPUS, machine(room), 32, WORK))
        assert (smallest.plan.quantisation, smallest.plan.shards) == expected
        assert smallest.plan.total_memory <= room
        assert recipe.name == "recipe"
        assert recipe.plan == plans.plan(GPUS, WORK, machine(room))
        for choice in [smallest, *fastest]:
            assert planned_again(choice, tmp_path, tiny_llama, machine(room)) == choice.plan
        for choice in fastest:
            assert choice.plan.fits
            assert choice.plan.step_seconds < smallest.plan.step_seconds
            assert choice.plan.overlapped_seconds <= smallest.plan.overlapped_seconds


def test_a_step_of_the_recipe_is_cut_into_the_largest_micro_batches(tmp_path, tiny_llama) -> None:
    plans = planner(tmp_path, tiny_llama)
    ask = Ask("tiny", GPUS, machine(1e9), 32, quantisations=["none"], shard_group="world")
    two = propose(plans, dataclasses.replace(ask, work=WORK))[1].plan.total_memory
    for room, cut in ((1e9, (4, 1)), (two, (2, 2))):
        choice = propose(plans, dataclasses.replace(ask, hardware=machine(room)))[1]
        assert (choice.plan.work["sequences"], choice.plan.work["accumulation"]) == cut
        assert choice.settings["training.micro_batch_size"] == cut[0]
        assert choice.deepspeed is not None
        assert choice.deepspeed["frozen_backbone"]["sharded"] is True
    pairs = planner(tmp_path, tiny_llama, training={"objective": "dpo", "global_batch_size": 32})
    choice = propose(pairs, Ask("tiny", GPUS, machine(1e9), 32, quantisations=["none"]))[1]
    assert (choice.plan.work["sequences"], choice.settings["training.micro_batch_size"]) == (8, 4)


def test_groups_have_the_names_that_recipes_use(tmp_path, tiny_llama) -> None:
    plans = planner(tmp_path, tiny_llama)
    for asked, written in ((8, "world"), ("machine", "machine"), (4, "machine"), (2, 2)):
        choice = propose(plans, Ask("tiny", GPUS, machine(1e9), 32, WORK, shard_group=asked))[1]
        assert choice.deepspeed is not None
        group = choice.deepspeed["frozen_backbone"].get("shard_group", "world")
        assert group == written


def test_what_does_not_fit_is_one_line_that_says_what_would(memory, tmp_path, tiny_llama) -> None:
    plans = planner(tmp_path, tiny_llama)
    least = min(memory.values())
    with pytest.raises(
        ConfigError, match=r"nothing fits on 8 GPUs: with model.quantisation nf4 and .* tiny takes"
    ) as error:
        propose(plans, Ask("tiny", GPUS, machine(least - 1), 32, WORK))
    assert "what would do: 16 GPUs or 0." in str(error.value)
    with pytest.raises(ConfigError, match=r"what would do: 0\.1 GB per GPU$"):
        propose(plans, Ask("tiny", GPUS, machine(1000), 32, WORK))
    room = memory["none", 4]
    with pytest.raises(
        ConfigError, match=r"shard group 2 on 8 GPUs does not fit: .*; what fits: .*4 with none"
    ) as error:
        propose(plans, Ask("tiny", GPUS, machine(room), 32, WORK, quantisations=["none"], shard_group=2))
    assert "\n" not in str(error.value)
    with pytest.raises(TopologyError, match=r"shard_group is 3, .* what fits: 1, 2, 4, 8, machine, world"):
        propose(plans, Ask("tiny", GPUS, machine(1e9), 32, WORK, shard_group=3))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"parallel": {"deepspeed_config": "zero3"}}, "zero3 is ZeRO stage 3"),
        ({"adapters": {"method": "full"}, "parallel": {"deepspeed_config": "zero2"}}, "full freezes nothing"),
        ({"training": {"global_batch_size": 4}}, "global_batch_size is 4, fewer than 8 GPUs"),
    ],
)
def test_recipes_that_nothing_can_be_proposed_for(sections, message, tmp_path, tiny_llama) -> None:
    with pytest.raises(ConfigError, match=message):
        propose(planner(tmp_path, tiny_llama, **sections), Ask("tiny", GPUS, machine(1e9), 32))


def test_dora_is_not_quantised(tmp_path, tiny_llama) -> None:
    plans = planner(tmp_path, tiny_llama, adapters={"method": "dora"})
    with pytest.raises(ConfigError, match=r"with model.quantisation none"):
        propose(plans, Ask("tiny", GPUS, machine(1000), 32, WORK))


def test_seconds_of_a_quantised_step_by_hand(tmp_path, tiny_llama) -> None:
    sections = {"model": {"quantisation": "nf4"}, "parallel": {"deepspeed_config": "zero2_sharded_machine"}}
    hardware = Hardware(gpus_per_node=4, intra_bandwidth=1e6, inter_bandwidth=1e5, memory_bandwidth=1e8, efficiency=0.5)
    plan = planner(tmp_path, tiny_llama, **sections).plan(8, WORK, hardware)
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64  # of a layer's q, o, k, v, gate, up and down
    # q, k and v of the first layer have no backward, as the embeddings that they read do not train.
    uses = 2 * 2 * layer - (32 * 32 + 2 * 32 * 16)
    assert plan.seconds["unpacking"] == pytest.approx(uses * (36 / 64 + 2) / (1e8 * 0.5))
    gathered = plan.wire["backbone all_gather"] / 1e6
    assert plan.seconds["backbone all_gather"] == gathered
    assert plan.links == {"inside_shard_group": plan.wire["backbone all_gather"], "between_shard_groups": 0}
    rest = plan.step_seconds - gathered - plan.seconds["compute"] - plan.seconds["unpacking"]
    assert rest == pytest.approx(sum(moved for kind, moved in plan.wire.items() if "backbone" not in kind) / 1e5)
    assert plan.overlapped_seconds == pytest.approx(gathered + rest)
    fast = Hardware(gpus_per_node=4, intra_bandwidth=1e15, inter_bandwidth=1e5, memory_bandwidth=1e8, efficiency=0.5)
    quick = planner(tmp_path, tiny_llama, **sections).plan(8, WORK, fast)
    assert quick.overlapped_seconds == pytest.approx(quick.seconds["compute"] + quick.seconds["unpacking"] + rest)


def test_the_backbones_that_the_documentation_speaks_of() -> None:
    """70B on 64 GPUs: three times the speed of shards over the world. 405B on 8 GPUs: with nf4."""
    config = load_config("large")
    plans = Planner(config, read_model_config(SHAPES / "llama-70b.json"), 384)
    recipe, smallest, *_ = propose(plans, Ask("70b", 64, Hardware(), 2048, Work(1, 2048, 2048)))
    assert recipe.plan.shards == 64
    assert smallest.plan.quantisation == "none"
    assert smallest.plan.tokens_per_second > 3 * recipe.plan.tokens_per_second
    plans = Planner(config, read_model_config(SHAPES / "llama-405b.json"), 384)
    ask = Ask("405b", 8, Hardware(), 2048, Work(1, 2048, 2048), ["nf4"], "machine")
    plan = propose(plans, ask)[1].plan
    layer = 2 * 16384 * 16384 + 2 * 16384 * 1024 + 3 * 16384 * 53248
    rest = 2 * 128256 * 16384 + (2 * 126 + 1) * 16384  # embeddings, head and norms
    assert plan.memory["backbone"] == pytest.approx((126 * layer * 36 / 64 + 2 * rest) / 8, rel=1e-6)
    assert plan.fits


def test_the_launcher_prints_settings_json_and_a_file(tmp_path, launch, tiny_llama) -> None:
    arguments = ["--propose", "--model-config", str(tiny_llama), "--gpus", "8", "--length", "32"]
    arguments += ["--gpus-per-node", "4", "--micro-batch", "1"]
    file = tmp_path / "proposed.json"
    done = launch("plan", *arguments, "--shard-group", "machine", "--write", str(file))
    assert done.code == 0, done.err
    assert "smallest: --set model.quantisation=none parallel.ep_size=" in done.out
    written = json.loads(file.read_text())
    assert written["frozen_backbone"]["shard_group"] == "machine"
    assert json.dumps(written) in done.out
    picture = tmp_path / "speed.png"
    ((rows,),) = json.loads(launch("plan", *arguments, "--json", "--plot", str(picture)).out).values()
    assert [choice["name"] for choice in rows][:2] == ["recipe", "smallest"]
    assert rows[1]["plan"]["shards"] == 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    for more, message in (
        (["--shard-group", "3"], "which does not divide the 8 ranks"),
        (["--memory-gb", "0.0002", "--reserved-gb", "0.0001"], "nothing fits on 8 GPUs"),
    ):
        bad = launch("plan", *arguments, *more)
        assert bad.code == 2
        assert bad.err.count("\n") == 1
        assert message in bad.err
