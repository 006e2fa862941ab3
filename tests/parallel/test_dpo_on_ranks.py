"""Objective dpo on any number of ranks, in any placement: what one process learns by hand."""

from __future__ import annotations

import pytest
from pairs import LearnedPairs, pair_recipe
from ranks import run_recipes
from single_process import train_single
from small_runs import assert_same_training

from cuma_ds.config import load_config

pytestmark = pytest.mark.multirank
SHARDED = {"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2}
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
