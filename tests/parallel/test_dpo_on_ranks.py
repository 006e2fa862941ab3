"""Objective dpo on any number of ranks, in any placement: what one process learns by hand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from commands import TRAIN, all_tensors, one_line
from pairs import LearnedPairs, pair_recipe, write_pairs
from ranks import run, run_recipes
from safetensors.torch import load_file
from single_process import train_single
from small_runs import assert_same_training, metrics
from torch import Tensor

from cuma_ds.parallel.stored import find_checkpoint
from cuma_ds.recipe import load_config
from cuma_ds.runs import Run

pytestmark = pytest.mark.multirank
SHARDED = {"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2}
ONE_STEP = {"steps": 1, "warmup_steps": 0}
PLACEMENTS = {
    1: {"whole": {"deepspeed_config": "zero1"}, "zero3": {"deepspeed_config": "zero3"}},
    2: {"tokens": SHARDED | {"dispatch": "all_to_all"}, "experts": SHARDED | {"dispatch": "gather_experts"},
        "zero1": {"deepspeed_config": "zero1"}, "zero3": {"deepspeed_config": "zero3"}},
    4: {"sharded": SHARDED},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture(scope="module")
def expected(folder, tiny_llama, tiny_encoder):
    single = train_single(load_config(pair_recipe(folder, tiny_llama, tiny_encoder, "single")), learns=LearnedPairs)
    assert single.losses[0] == pytest.approx(0.6931472)
    assert single.losses[-1] < 0.6
    return single


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_placement_equals_pairs_learned_by_hand(world, folder, tiny_llama, tiny_encoder, expected) -> None:
    recipes = [
        pair_recipe(folder, tiny_llama, tiny_encoder, f"w{world}-{name}", parallel=parallel)
        for name, parallel in PLACEMENTS[world].items()
    ]
    run_recipes(world, recipes)
    for path in recipes:
        assert_same_training(path, expected)


VARIANTS = {
    "ipo": {"dpo": {"loss": "ipo", "length_normalised": True}},
    "hinge": {"dpo": {"loss": "hinge", "beta": 2.0, "margin": "weight"}},
    "robust": {"dpo": {"loss": "robust", "label_smoothing": 0.1, "ld_alpha": 0.4, "sft_weight": 0.3}},
    "shift": {"dpo": {"margin": "shift", "margin_scale": 0.2, "length_normalised": True, "ld_alpha": 0.0}},
    "soft": {"dpo": {"soft_labels": True, "label_smoothing": 0.2}, "training": {"micro_batch_size": 1}},
    "base": {"dpo": {"reference": "base"}, "adapters": {"dropout": 0.0}, "model": {"gradient_checkpointing": True}},
    "packed": {"data": {"packing": True, "max_length": 128}, "training": {"global_batch_size": 5}},
}  # fmt: skip


def test_variants_on_two_ranks_equal_pairs_learned_by_hand(folder, tiny_llama, tiny_encoder) -> None:
    paths = {
        name: pair_recipe(folder, tiny_llama, tiny_encoder, name, parallel=SHARDED, **changes)
        for name, changes in VARIANTS.items()
    }
    run_recipes(2, list(paths.values()))
    for name, path in paths.items():
        micro_steps = 3 if name == "soft" else 1
        assert_same_training(path, train_single(load_config(path), micro_steps, LearnedPairs))


def reference_of(path: Path) -> Tensor:
    return load_file(Run(load_config(path).run_dir).reference_file)["log_probabilities"]


def test_kill_9_in_the_reference_and_in_an_update_changes_nothing(folder, tiny_llama, tiny_encoder) -> None:
    changes = {"parallel": SHARDED, "checkpoint": {"every": 2}, "training": {"micro_batch_size": 2}}
    whole, killed = (
        pair_recipe(folder, tiny_llama, tiny_encoder, name, **changes) for name in ("undisturbed", "killed")
    )
    run_recipes(2, [whole])
    expected = reference_of(whole)
    unknown = []
    # Two forwards a step; five steps of reference, then updates.
    for method, number in (("forward", 4), ("forward", 6), ("step", 3), ("backward", 8), ("step", 0)):
        how = json.dumps([str(killed), ("AdapterEngine", method), number])
        results = run(2, ["tests/helpers/train_and_die.py", how])
        assert [code for code, _ in results] == ([-9, -9] if number else [0, 0]), results
        unknown.append(int(reference_of(killed).isnan().sum()))
    assert unknown[0] > unknown[1] > unknown[2] == unknown[-1] == int(expected.isnan().sum())
    assert torch.equal(reference_of(killed).nan_to_num(1), expected.nan_to_num(1))
    own, other = (all_tensors(find_checkpoint(Run(load_config(path).run_dir).checkpoints)) for path in (whole, killed))
    assert own.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in own.items())


def test_bad_input_is_one_line_on_every_rank(folder, tiny_llama, tiny_encoder) -> None:
    whole = pair_recipe(folder, tiny_llama, tiny_encoder, "bad", parallel=SHARDED, training=ONE_STEP)
    run_recipes(2, [whole])
    file = Run(load_config(whole).run_dir).reference_file
    file.write_bytes(file.read_bytes()[:-3] + b"abc")
    command = [TRAIN, "--config", str(whole), "--set", "training.steps=2"]
    one_line(run(2, command), "reference.safetensors is damaged", "remove it, and it will be computed again")
    file.unlink()
    without = folder / "no-margins.jsonl"
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    without.write_text("\n".join(json.dumps({**line, "margin": None}) for line in lines) + "\n")
    for number, (setting, reason) in enumerate(
        {
            "training.group_field=contry": "no profile has the field 'contry' (did you mean 'country'?)",
            "dpo.margin=weight": "training pairs have no margin; set dpo.margin: ignore",
            "data.path=tests/data/opinions.jsonl": "objective dpo learns from preferences",
        }.items()
    ):
        settings = [f"data.path={without}", f"run.name=bad-{number}", setting]
        one_line(run(2, [TRAIN, "--config", str(whole), "--set", *settings]), reason)


def test_groups_that_are_large_enough_have_metrics_of_their_own(folder, tiny_llama, tiny_encoder) -> None:
    data = {"path": str(write_pairs(folder / "many.jsonl", people=61)), "test_fraction": 0.1, "heldout_fraction": 0.0}
    path = pair_recipe(
        folder, tiny_llama, tiny_encoder, "grouped", parallel=SHARDED, data=data,
        training=ONE_STEP | {"group_field": "country", "global_batch_size": 100, "micro_batch_size": 25},
        evaluation={"min_answers": 26},
    )  # fmt: skip
    run_recipes(2, [path])
    data = Run(load_config(path).run_dir).data()
    sizes = Counter(data.splits["train"]["group"])
    named = {name for name, size in sizes.items() if size >= 26}
    assert 0 < len(named) < len(sizes) == 3
    (row,) = metrics(load_config(path))
    assert {name.removeprefix("rewards/margins/") for name in row if name.startswith("rewards/margins/")} == named
    for name in named:
        assert row[f"rewards/margins/{name}"] == pytest.approx(0, abs=1e-5)
        assert 0 <= row[f"rewards/accuracies/{name}"] <= 1
    assert {"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl", "balance"} <= row.keys()


@pytest.mark.sixteen_bit
def test_half_precision_backbones_stay_near_pairs_learned_by_hand(folder, tiny_llama, tiny_encoder, expected) -> None:
    """Within 5 % in every loss; and at the start policy and reference agree to rounding."""
    paths = [
        pair_recipe(folder, tiny_llama, tiny_encoder, dtype, parallel=SHARDED, model={"dtype": dtype})
        for dtype in ("bfloat16", "float16")
    ]
    run_recipes(2, paths)
    for path in paths:
        rows = metrics(load_config(path))
        assert rows[0]["kl"] == pytest.approx(0, abs=1e-3)
        assert [row["loss"] for row in rows] == pytest.approx(expected.losses, rel=5e-2)
