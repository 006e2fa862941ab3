"""Profiles that training hides or blurs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cuma_ds.adapters import CumaConfig
from cuma_ds.adapters.blur import blurred
from cuma_ds.data.batch import PROFILE_SEED, EncodedExample
from cuma_ds.data.stream import Draw, Stream
from cuma_ds.errors import ConfigError
from cuma_ds.recipe import make_config

SEEDS = torch.arange(4000)


def profiles() -> torch.Tensor:
    return 3 * torch.randn(len(SEEDS), 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_profile_is_hidden_with_the_probability_asked_for_and_else_untouched() -> None:
    before = profiles()
    after = blurred(before, SEEDS, CumaConfig(profile_dropout=0.2), 3.0)
    hidden = (after == 0).all(dim=1)
    assert float(hidden.double().mean()) == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / len(SEEDS)) ** 0.5)
    assert torch.equal(after[~hidden], before[~hidden])
    assert torch.equal(before, profiles())


def test_noise_has_the_deviation_asked_for_in_units_of_the_rms() -> None:
    before = profiles()
    noise = blurred(before, SEEDS, CumaConfig(profile_noise=0.5), 3.0) - before
    assert float(noise.std()) == pytest.approx(1.5, rel=0.02)
    assert float(noise.mean()) == pytest.approx(0, abs=4 * 1.5 / noise.numel() ** 0.5)


def test_what_happens_to_a_profile_depends_on_its_seed_alone() -> None:
    before, config = profiles(), CumaConfig(profile_dropout=0.2, profile_noise=0.5)
    after = blurred(before, SEEDS, config, 3.0)
    order = torch.randperm(len(SEEDS), generator=torch.Generator().manual_seed(1))
    assert torch.equal(blurred(before[order], SEEDS[order], config, 3.0), after[order])
    assert not torch.equal(blurred(before, SEEDS + 1, config, 3.0), after)


def seeds(world: int, micro: int, step: int, examples: int = 1) -> dict[int, set[int]]:
    """Row of the split -> seeds of its examples, over all ranks."""
    found: dict[int, set[int]] = {}
    example = EncodedExample([1, 2, 3], [2], [4], [1.0], 0)
    for rank in range(world):
        draw = Draw(32, 8, micro, 5, rank, world)
        stream = Stream(draw, lambda row: (dataclasses.replace(example, profile=row),) * examples, 0)
        for batch in stream.step(step):
            rows = [row for row in batch.rows for _ in range(examples)]
            for row, seed in zip(rows, batch.extras[PROFILE_SEED].tolist(), strict=False):
                found.setdefault(row, set()).add(seed)
    return found


@pytest.mark.parametrize(("world", "micro"), [(1, 3), (2, 4), (3, 2), (5, 8)])
def test_seeds_are_the_same_for_any_cut_of_a_step(world, micro) -> None:
    assert seeds(world, micro, 2) == seeds(1, 8, 2)


def test_rows_and_steps_have_seeds_of_their_own_and_the_examples_of_a_unit_share_one() -> None:
    first, later = seeds(1, 8, 0, examples=2), seeds(1, 8, 1, examples=2)
    assert all(len(own) == 1 for own in [*first.values(), *later.values()])
    every = [seed for own in [*first.values(), *later.values()] for seed in own]
    assert len(set(every)) == len(every) == 16


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        (
            {"adapters": {"method": "mixlora", "profile_dropout": 0.1}},
            r"need profiles, which method 'mixlora' does not",
        ),
        (
            {"adapters": {"profile_noise": 0.1}, "profiles": {"encoder": "e", "standardise": None}},
            r"standardise is null",
        ),
        (
            {"adapters": {"profile_dropout": 0.1}, "profiles": {"encoder": "e"}, "training": {"objective": "grpo"}},
            r"profile_noise are for objectives sft and dpo",
        ),
        ({"adapters": {"method": "lora"}, "training": {"router_learning_rate": 0.1}}, r"method 'lora' has no routers"),
        ({"adapters": {"profile_dropout": 1.0}}, r"adapters.profile_dropout is 1.0"),
    ],
)
def test_blurring_that_means_nothing_is_refused(sections, problem) -> None:
    with pytest.raises(ConfigError, match=problem):
        make_config({"model": {"path": "m"}, **sections})
