"""A frozen backbone that groups of ranks hold between them, instead of all ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run
from safetensors.torch import load_file
from small_runs import recipe

from cuma_ds.errors import TopologyError
from cuma_ds.parallel.ds_config import DS_CONFIGS
from cuma_ds.parallel.shard_group import divide_ranks, ranks_of_machines
from cuma_ds.parallel.stored import find_checkpoint, read_adapters
from cuma_ds.recipe import load_config
from cuma_ds.runs import Run

WORLD, PER_MACHINE, STEPS = 4, 2, 2
SIZES = {"world": 4, 1: 1, 2: 2}
# A run stops after its first step and goes on with another shard group.
REGROUPED = [("world", 2, 2, "all_to_all"), (2, 1, 4, "gather_experts")]
PLACEMENTS = [(1, "auto"), *((ep, how) for ep in (2, 4) for how in ("all_to_all", "gather_experts", "auto"))]


@pytest.mark.parametrize(
    ("machines", "size", "groups"),
    [
        ([4, 4], "world", [(0, 8)]),
        ([4, 4], "machine", [(0, 4), (4, 8)]),
        ([4, 2], "machine", [(0, 4), (4, 6)]),
        ([4, 4], 2, [(0, 2), (2, 4), (4, 6), (6, 8)]),
        ([2, 2, 2, 2], 4, [(0, 4), (4, 8)]),
        ([4], 1, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        ([3, 3], 6, [(0, 6)]),
    ],
)
def test_ranks_are_divided_into_groups(machines, size, groups) -> None:
    assert divide_ranks(machines, size) == [range(*group) for group in groups]


@pytest.mark.parametrize(
    ("machines", "size", "problem", "fitting"),
    [
        ([4], 3, "which does not divide the 4 ranks", "1, 2, 4, machine, world"),
        ([4], 8, "which does not divide the 4 ranks", "1, 2, 4, machine, world"),
        ([6, 6], 4, "ranks 4 to 7 would be one group, on 2 machines of 6 and 6 ranks", "1, 2, 3, 6, 12, machine"),
        ([4, 8], 3, "ranks 3 to 5 would be one group, on 2 machines of 4 and 8 ranks", "1, 2, 4, 12, machine"),
        ([4, 8], 6, "ranks 0 to 5 would be one group, on 2 machines of 4 and 8 ranks", "1, 2, 4, 12, machine"),
    ],
)
def test_groups_that_cannot_be_made_are_refused_with_what_fits(machines, size, problem, fitting) -> None:
    with pytest.raises(TopologyError, match=rf"frozen_backbone\.shard_group is {size}, ") as error:
        divide_ranks(machines, size)
    assert problem in str(error.value)
    assert f"what fits: {fitting}" in str(error.value)


def test_machines_are_what_the_launcher_told_each_rank() -> None:
    assert ranks_of_machines([2, 2, 4, 4, 4, 4]) == [2, 4]
    assert ranks_of_machines([1, 1]) == [1, 1]
    for told in ([2, 1, 1], [4, 4], [0, 0], [2, 2, 2]):
        with pytest.raises(TopologyError, match="LOCAL_WORLD_SIZE"):
            ranks_of_machines(told)


class Runs:
    """Small runs on 4 ranks of 2 pretended machines, by name."""

    def __init__(self, folder: Path, tiny_llama: Path, tiny_encoder: Path) -> None:
        self.folder, self.models, self.paths = folder, (tiny_llama, tiny_encoder), {}

    def add(self, name: str, size: object, parallel: dict, base: str = "zero2_sharded_backbone", **sections) -> None:
        settings = json.loads((DS_CONFIGS / f"{base}.json").read_text())
        settings["frozen_backbone"]["shard_group"] = size
        file = self.folder / f"{base}-{size}.json"
        file.write_text(json.dumps(settings))
        sections = {"training": {"steps": STEPS, "warmup_steps": 0}} | sections
        parallel = {"deepspeed_config": str(file), **parallel}
        self.paths[name] = recipe(self.folder, *self.models, name, parallel=parallel, **sections)

    def train(self) -> None:
        arguments = [json.dumps([str(path) for path in self.paths.values()]), str(PER_MACHINE)]
        for code, output in run(WORLD, ["tests/helpers/train_on_machines.py", *arguments], timeout=900):
            assert code == 0, output[-3000:]

    def said(self, name: str) -> list[dict]:
        return [json.loads(Path(f"{self.paths[name]}.rank{rank}.json").read_text()) for rank in range(WORLD)]

    def trained(self, name: str) -> dict[str, torch.Tensor]:
        return read_adapters(find_checkpoint(Run(load_config(self.paths[name]).run_dir).checkpoints))

    def assert_equal(self, name: str, other: str) -> None:
        expected = self.trained(other)
        for key, tensor in self.trained(name).items():
            torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-6, msg=f"{name} {key}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_llama, tiny_encoder) -> Runs:
    made = Runs(tmp_path_factory.mktemp("groups"), tiny_llama, tiny_encoder)
    for size in SIZES:
        for ep_size, dispatch in PLACEMENTS:
            made.add(f"{size}-ep{ep_size}-{dispatch}", size, {"ep_size": ep_size, "dispatch": dispatch})
    for before, after, ep_size, dispatch in REGROUPED:
        name, parallel = f"{before}-then-{after}", {"ep_size": ep_size, "dispatch": dispatch}
        half = {"steps": 1, "schedule_steps": STEPS, "warmup_steps": 0}
        made.add(f"{name}-half", before, parallel, run={"name": name}, training=half)
        made.add(name, after, parallel, training=half | {"steps": STEPS})
    made.add("machine", "machine", {"ep_size": 4, "dispatch": "all_to_all"})
    made.add("offload", 2, {"ep_size": 2, "dispatch": "all_to_all"}, "zero2_sharded_offload_backbone")
    made.add("overlap", 2, {"ep_size": 4, "dispatch": "all_to_all"}, "zero2_sharded_overlap")
    pickled = made.folder / "pickled"
    shutil.copytree(tiny_llama, pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    model = {"path": str(pickled), "dtype": "float32"}
    made.add("pickled", 2, {"ep_size": 2, "dispatch": "all_to_all"}, model=model)
    made.add("refused", 3, {})
    made.train()
    return made


@pytest.mark.multirank
@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda placement: "ep{}-{}".format(*placement))
def test_what_is_learned_does_not_depend_on_the_shard_group(placement, runs) -> None:
    ep_size, dispatch = placement
    for size in SIZES:
        runs.assert_equal(f"{size}-ep{ep_size}-{dispatch}", f"world-ep{ep_size}-{dispatch}")


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("machine", "world-ep4-all_to_all"),
        ("offload", "world-ep2-all_to_all"),
        ("overlap", "world-ep4-all_to_all"),
        ("pickled", "world-ep2-all_to_all"),
    ],
)
def test_groups_work_with_offload_gathering_ahead_and_the_loading_of_transformers(name, other, runs) -> None:
    runs.assert_equal(name, other)


@pytest.mark.multirank
@pytest.mark.parametrize(("before", "after", "ep_size", "dispatch"), REGROUPED)
def test_a_run_goes_on_with_another_shard_group(before, after, ep_size, dispatch, runs) -> None:
    name = f"{before}-then-{after}"
    for half, size in ((f"{name}-half", before), (name, after)):
        for said in runs.said(half):
            (step,) = said["steps"]
            assert step["held"] * SIZES[size] == step["full"], half
    runs.assert_equal(name, f"world-ep{ep_size}-{dispatch}")


@pytest.mark.multirank
def test_a_rank_holds_its_part_of_a_group_and_sends_nothing_of_the_backbone_to_another_group(runs) -> None:
    """Counted at the process group, below the functions of torch.distributed."""
    per_gather = None
    for name, size in {"1-ep1-auto": 1, "2-ep2-all_to_all": 2, "2-ep4-all_to_all": 2, "machine": 2}.items():
        for rank, said in enumerate(runs.said(name)):
            group = list(range(rank // size * size, rank // size * size + size))
            for step in said["steps"]:
                assert step["held"] * size == step["full"]
                crossing = [moved for ranks, moved in step["all_gather"] if not set(ranks) <= set(group)]
                inside = sum(moved for ranks, moved in step["all_gather"] if set(ranks) <= set(group))
                assert sum(crossing) == 0, name
                assert inside == step["told"]["backbone"], name
                if size > 1:
                    per_gather = per_gather or inside * size // (size - 1)
                    assert inside * size == per_gather * (size - 1) > 0
                else:
                    assert inside == 0
    for said in runs.said("world-ep1-auto"):
        assert all(step["held"] * WORLD == step["full"] for step in said["steps"])
        sent = {sum(moved for _, moved in step["all_gather"]) for step in said["steps"]}
        assert sent == {per_gather * 3 // 4} == {step["told"]["backbone"] for step in said["steps"]}


@pytest.mark.multirank
def test_bytes_are_told_by_link(runs) -> None:
    for size in SIZES:
        for ep_size, dispatch in PLACEMENTS:
            for said in runs.said(f"{size}-ep{ep_size}-{dispatch}"):
                for step in said["steps"]:
                    told = dict(step["told"])
                    inside, between = told.pop("inside_shard_group"), told.pop("between_shard_groups")
                    assert inside + between == sum(told.values())
                    experts = sum(told.values()) - told["backbone"]
                    assert (between > 0) == (ep_size > SIZES[size]), "experts alone are sent between groups"
                    if ep_size <= SIZES[size]:
                        assert inside == told["backbone"] + experts
                    elif size == 1:
                        assert inside == 0
                    elif dispatch == "gather_experts":
                        assert between * 3 == experts * 2, "two of three peers are in the other group"


@pytest.mark.multirank
def test_a_group_gathers_its_backbone_to_generate_between_steps(runs) -> None:
    for name in runs.paths.keys() - {"refused"}:
        assert all(step["gathered_apart"] < 1e-5 for said in runs.said(name) for step in said["steps"]), name


@pytest.mark.multirank
def test_a_trained_model_is_asked_on_ranks_with_shard_groups(runs) -> None:
    for name in ("2-ep1-auto", "2-ep4-all_to_all", "1-ep2-gather_experts", "machine", "pickled"):
        assert all(said["apart"] < 1e-4 for said in runs.said(name)), name


@pytest.mark.multirank
def test_a_group_that_does_not_fit_is_one_line_on_every_rank(runs) -> None:
    for said in runs.said("refused"):
        problem = "frozen_backbone.shard_group is 3, which does not divide the 4 ranks"
        assert said["error"] == f"{problem}; what fits: 1, 2, 4, machine, world"
