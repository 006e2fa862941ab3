"""The planner's bytes are the counted ones, its memory is the measured one, and its launcher says what does not fit."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import ranks
import torch
import yaml

from cuma_ds.errors import ModelError, TopologyError
from cuma_ds.methods.model import ExpertShapes
from cuma_ds.parallel.ds_config import DS_CONFIGS
from cuma_ds.parallel.wire import Payload, all_to_all_bytes, balanced_pairs, gather_experts_bytes
from cuma_ds.planning.cost import Hardware, Work
from cuma_ds.planning.plan import Planner
from cuma_ds.planning.skeleton import read_model_config
from cuma_ds.recipe import load_config

HERE = Path(__file__).parents[1]
LLAMA_8B = HERE.parent / "launchers" / "model_configs" / "llama-8b.json"


def recipe(folder: Path, backbone: Path, name: str = "recipe", **sections: dict) -> Path:
    values: dict = {
        "model": {"path": str(backbone), "dtype": "float32"},
        "profiles": {"encoder": "not-read-here"},
        "adapters": {"num_experts": 4, "lora_r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"]},
        "parallel": {"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def printed(results: list[tuple[int, str]]) -> list:
    """What every rank printed after ``counted RANK``."""
    values = []
    for rank, (code, output) in enumerate(results):
        assert code == 0, f"rank {rank}: {output[-3000:]}"
        line = next(line for line in output.splitlines() if line.startswith(f"counted {rank} "))
        values.append(json.loads(line.removeprefix(f"counted {rank} ")))
    return values


WORK = {"sequences": 3, "length": 16, "kept": 2, "accumulation": 2}
PLACEMENTS = {
    "sharded": (2, {}, {}),
    "recomputing": (2, {}, {"gradient_checkpointing": True}),
    "stage-2": (2, {"deepspeed_config": "zero2", "ep_size": 1}, {}),
    "stage-1": (2, {"deepspeed_config": "zero1", "dispatch": "all_to_all"}, {}),
    "bf16": (4, {"dispatch": "gather_experts"}, {"dtype": "bfloat16"}),
    "four": (4, {"dispatch": "all_to_all"}, {}),
    "groups": (4, {"deepspeed_config": 2, "ep_size": 4, "dispatch": "gather_experts"}, {}),
    "inside": (4, {"deepspeed_config": 2, "dispatch": "all_to_all"}, {}),
    "alone": (4, {"deepspeed_config": 1, "dispatch": "gather_experts"}, {"dtype": "bfloat16"}),
    "nf4": (2, {"dispatch": "gather_experts"}, {"quantisation": "nf4", "dtype": "bfloat16"}),
    "int8": (4, {"deepspeed_config": 2, "dispatch": "gather_experts"}, {"quantisation": "int8"}),
    "nf4-recomputing": (4, {"ep_size": 1}, {"quantisation": "nf4", "gradient_checkpointing": True}),
}


def grouped(folder: Path, base: str, size: int | str) -> str:
    """A DeepSpeed configuration of ds_configs/ with shard groups of so many ranks."""
    settings = json.loads((DS_CONFIGS / f"{base}.json").read_text())
    settings["frozen_backbone"]["shard_group"] = size
    path = folder / f"{base}-{size}.json"
    path.write_text(json.dumps(settings))
    return str(path)


@pytest.mark.multirank
@pytest.mark.parametrize("world", [2, 4])
def test_predicted_bytes_are_those_counted_at_the_process_group(world, tmp_path, tiny_llama) -> None:
    cases = {}
    for name, (ranks_of_case, parallel, model) in PLACEMENTS.items():
        if ranks_of_case != world or ("quantisation" in model and find_spec("bitsandbytes") is None):
            continue
        size = parallel.get("deepspeed_config")
        changed = (
            {"deepspeed_config": grouped(tmp_path, "zero2_sharded_backbone", size)} if isinstance(size, int) else {}
        )
        cases[name] = ({**parallel, **changed}, model)
    paths = [
        recipe(tmp_path, tiny_llama, name, parallel=parallel, model=model) for name, (parallel, model) in cases.items()
    ]
    ranks_said = printed(
        ranks.run(
            world,
            [str(HERE / "helpers" / "count_bytes.py"), json.dumps([str(path) for path in paths]), json.dumps(WORK)],
        )
    )
    for case, path in enumerate(paths):
        for rank in range(world):
            said = ranks_said[rank][case]
            counted, predicted, told = said["counted"], dict(said["predicted"]), said["told"]
            links = {name: told.pop(name) for name in said["links"] if name in told}
            if "experts all_to_all" in predicted:
                predicted["experts all_to_all"] = exchanged(
                    rank, [said[case] for said in ranks_said], load_config(path)
                )
            by_collective: Counter[str] = Counter()
            for kind, moved in predicted.items():
                by_collective[kind.split()[-1]] += moved
            counted.pop("control", None)
            assert counted == by_collective, path.stem
            assert links.keys() == ({"inside_shard_group", "between_shard_groups"} if "backbone" in told else set())
            assert told.pop("backbone", 0) == predicted.get("backbone all_gather", 0)
            assert told == {
                kind.removeprefix("experts "): moved for kind, moved in predicted.items() if kind.startswith("experts ")
            }
            if "all_to_all" not in told:  # else it depends on the routing
                assert links in ({}, said["links"]), path.stem
            elif path.stem in ("sharded", "recomputing", "inside"):  # experts are exchanged inside a group
                assert links["between_shard_groups"] == said["links"]["between_shard_groups"] == 0


def exchanged(rank: int, ranks_said: list[dict], config) -> int:
    """Bytes of the token exchange from the routing that happened: layer by layer, pair by pair."""
    ep_size, experts = config.parallel.ep_size, config.adapters.num_experts
    local = experts // ep_size
    shapes = {0: (32, 32), 1: (32, 16), 2: (32, 64)}  # q, v and up of the tiny model, in the order they run
    total = 0
    for call, _ in enumerate(ranks_said[rank]["chosen"]):
        in_features, out_features = shapes[call % 3]
        group = [said["chosen"][call] for said in ranks_said[rank // ep_size * ep_size :][:ep_size]]
        own = rank % ep_size
        sent = sum(count for expert, count in enumerate(group[own]) if expert // local != own)
        received = sum(
            sum(counts[own * local : (own + 1) * local]) for source, counts in enumerate(group) if source != own
        )
        shape = ExpertShapes(experts, config.adapters.lora_r, in_features, out_features, config.adapters.shared_a)
        # The first layer's q and v read the frozen embeddings, which need no gradient.
        first = call % 6 < 2
        total += all_to_all_bytes(shape, Payload(ep_size, 4), sent, received, input_gradient=not first)["all_to_all"]
    return total


def sweep(world: int) -> list[dict]:
    """Every combination whose routing can be perfectly balanced."""
    cases = []
    for tokens, top_k, experts, rank, shared_a, dtype in itertools.product(
        (16, 256), (1, 2, 4), (4, 16), (2, 32), (False, True), ("float32", "bfloat16")
    ):
        cases += [
            {
                "tokens": tokens, "top_k": top_k, "experts": experts, "rank": rank, "shared_a": shared_a,
                "dtype": dtype, "in_features": 24, "out_features": 40,
            }
        ]  # fmt: skip
    return cases


@pytest.mark.multirank
@pytest.mark.parametrize("world", [2, 4])
def test_auto_sends_no_more_than_either_dispatch_and_both_are_predicted_exactly(world) -> None:
    cases = sweep(world)
    chosen = set()
    for said in printed(ranks.run(world, [str(HERE / "helpers" / "count_dispatch.py"), json.dumps(cases)])):
        for case, counted in zip(cases, said, strict=True):
            shape = ExpertShapes(
                case["experts"], case["rank"], case["in_features"], case["out_features"], case["shared_a"]
            )
            payload = Payload(world, getattr(torch, case["dtype"]).itemsize)
            pairs = balanced_pairs(case["tokens"], case["top_k"], world)
            assert counted["gather_experts"] == gather_experts_bytes(shape, payload), case
            assert counted["all_to_all"] == all_to_all_bytes(shape, payload, pairs, pairs), case
            cheapest = min(("all_to_all", "gather_experts"), key=lambda kind: sum(counted[kind].values()))
            assert sum(counted["auto"].values()) == sum(counted[cheapest].values()), case
            chosen.add(cheapest)
    assert chosen == {"all_to_all", "gather_experts"}


# ranks, base of the DeepSpeed configuration and its shard group, ep_size, quantisation
HELD = {
    "sharded": (2, "zero2_sharded_backbone", "world", 2, "none"),
    "groups": (4, "zero2_sharded_backbone", 2, 2, "none"),
    "ahead": (2, "zero2_sharded_overlap", "world", 2, "none"),
    "nf4": (2, "zero2_sharded_backbone", "world", 2, "nf4"),
    "int8-whole": (1, "zero2", None, 1, "int8"),
}


@pytest.mark.multirank
@pytest.mark.embedded
@pytest.mark.parametrize("case", HELD.values(), ids=HELD.keys())
def test_predicted_memory_is_within_a_tenth_of_the_measured_peak(case, tmp_path, embedded_models, monkeypatch) -> None:
    world, base, size, ep_size, quantisation = case
    if quantisation != "none":
        pytest.importorskip("bitsandbytes")
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.setenv(name, "65536")
    work = Work(sequences=4, length=96, kept=96)
    path = recipe(
        tmp_path, embedded_models[0], adapters={"target_modules": ["q_proj", "v_proj"]},
        parallel={"deepspeed_config": grouped(tmp_path, base, size) if size else base, "ep_size": ep_size},
        model={"quantisation": quantisation},
    )  # fmt: skip
    measured = printed(
        ranks.run(world, [str(HERE / "helpers" / "measure_memory.py"), str(path), json.dumps(vars(work))], fresh=True)
    )
    plan = Planner(load_config(path), read_model_config(embedded_models[0]), 16).plan(world, work, Hardware())
    # All ranks do the same work. What is sampled can miss a peak, and never exceed it.
    peaks = [rank["peak"] for rank in measured]
    assert plan.total_memory == pytest.approx(max(peaks), rel=0.1), (peaks, plan.memory)


def test_a_planner_counts_parameters_as_the_model_has_them(tmp_path) -> None:
    path = recipe(
        tmp_path,
        tmp_path,
        model={"dtype": "bfloat16"},
        adapters={"num_experts": 8, "lora_r": 8, "target_modules": ["q_proj"]},
    )
    plan = Planner(load_config(path), read_model_config(LLAMA_8B), 384).plan(8, Work(1, 512, 1), Hardware())
    assert plan.backbone_parameters == 8_030_261_248  # Llama 3.1 8B
    assert plan.memory["backbone"] == pytest.approx(2 * 8_030_261_248 / 8, rel=1e-6)
    experts, router = 32 * 8 * 8 * (4096 + 4096), 32 * 8 * (4096 + 384)
    assert plan.trained_parameters == experts + router
    assert plan.memory["adapters"] == 4 * (experts // 2 + router)
    assert plan.memory["live layer"] == 2 * 128256 * 4096


def test_the_largest_micro_batch_fits_and_one_more_does_not(tmp_path) -> None:
    planner = Planner(
        load_config(recipe(tmp_path, tmp_path, model={"dtype": "bfloat16"})), read_model_config(LLAMA_8B), 384
    )
    hardware = Hardware(memory=24e9)
    most = planner.plan(8, Work(1, 1024, 1024), hardware).max_micro_batch
    assert most >= 1
    assert planner.plan(8, Work(most, 1024, 1024), hardware).fits
    assert not planner.plan(8, Work(most + 1, 1024, 1024), hardware).fits


def test_offloaded_state_moves_to_the_host(tmp_path) -> None:
    offload = tmp_path / "offload.json"
    offload.write_text(
        json.dumps(
            {
                "frozen_backbone": {"sharded": True, "offload": "cpu"},
                "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            }
        )
    )
    config = read_model_config(LLAMA_8B)
    work = Work(1, 256, 1)
    near_recipe = recipe(tmp_path, tmp_path)
    near = Planner(load_config(near_recipe), config, 384).plan(8, work, Hardware())
    far_recipe = recipe(tmp_path, tmp_path, parallel={"deepspeed_config": str(offload)})
    far = Planner(load_config(far_recipe), config, 384).plan(8, work, Hardware())
    assert far.host_memory == {"backbone": near.memory["backbone"], "optimizer": near.memory["optimizer"]}
    assert near.total_memory - far.total_memory == sum(far.host_memory.values())


def test_an_ep_size_that_does_not_divide_the_gpus_is_refused(tmp_path, tiny_llama) -> None:
    planner = Planner(load_config(recipe(tmp_path, tiny_llama)), read_model_config(tiny_llama), 16)
    with pytest.raises(TopologyError, match="ep_size is 2, which does not divide 3 GPUs"):
        planner.plan(3, Work(1, 8, 1), Hardware())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "broken JSON"),
        ("[]", "model_type"),
        ('{"model_type": "no-such-kind"}', "no-such-kind"),
        (None, "cannot read"),
    ],
)
def test_a_broken_model_configuration_is_one_line(text, message, tmp_path) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ModelError, match=message) as error:
        read_model_config(path)
    assert "\n" not in str(error.value)


def test_the_launcher_prints_tables_json_and_a_picture(tmp_path, launch, tiny_llama) -> None:
    arguments = [
        "--config",
        str(recipe(tmp_path, tiny_llama)),
        "--model-config",
        str(tiny_llama),
        "--gpus",
        "2",
        "4",
        "--kept-logits",
        "1",
    ]
    tables = launch("plan", *arguments)
    assert tables.code == 0, tables.err
    assert "GB per GPU at the peak" in tables.out
    picture = tmp_path / "plan.png"
    values = json.loads(launch("plan", *arguments, "--json", "--plot", str(picture)).out)
    (rows,) = values.values()
    assert [row["gpus"] for row in rows] == [2, 4]
    assert rows[0]["total_memory"] == sum(rows[0]["memory"].values())
    assert picture.read_bytes().startswith(b"\x89PNG")
    micro = load_config(arguments[1]).training.micro_batch_size
    (pairs,) = json.loads(launch("plan", *arguments, "--json", "--set", "training.objective=dpo").out).values()
    (twice,) = json.loads(launch("plan", *arguments, "--json", "--micro-batch", str(2 * micro)).out).values()
    for key in ("memory", "wire", "seconds"):  # of a step; a whole run of pairs has a reference, too
        assert [row[key] for row in pairs] == [row[key] for row in twice]
    bad = launch("plan", *arguments[:4], "--gpus", "3")
    assert bad.code == 2
    assert bad.err.count("\n") == 1
    assert "ep_size is 2" in bad.err
