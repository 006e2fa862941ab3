"""The load-balance loss over the run: equal for any micro batch and number of ranks, and it revives unused experts."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import run_recipes
from safetensors.torch import load_file
from single_process import SingleRun, train_single
from small_runs import assert_same_training, metrics, recipe
from torch import nn

from cuma_ds.adapters import CumaConfig, inject_adapters
from cuma_ds.parallel.stored import find_checkpoint
from cuma_ds.recipe import load_config
from cuma_ds.runs import Run

STEPS = {"steps": 12, "global_batch_size": 12}
WEIGHT = {"balance_weight": 0.01}
WIDTH = 256
SHARDED = {"deepspeed_config": "zero2_sharded_backbone"}


@pytest.fixture(scope="module")
def expected(tmp_path_factory, tiny_llama, tiny_encoder) -> SingleRun:
    """Twelve steps in one process without DeepSpeed, the whole batch in one forward."""
    folder = tmp_path_factory.mktemp("single")
    return train_single(
        load_config(recipe(folder, tiny_llama, tiny_encoder, "single", training=STEPS, adapters=WEIGHT))
    )


@pytest.mark.multirank
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_micro_batch_on_any_ranks_learns_the_same(world, tmp_path, tiny_llama, tiny_encoder, expected) -> None:
    paths = []
    for micro in (1, 2, 6):
        parallel = {**SHARDED, "ep_size": min(world, 2)}
        training = {**STEPS, "micro_batch_size": micro}
        paths.append(
            recipe(
                tmp_path,
                tiny_llama,
                tiny_encoder,
                f"micro-{micro}",
                training=training,
                adapters=WEIGHT,
                parallel=parallel,
            )
        )
    run_recipes(world, paths)
    balances = []
    for path in paths:
        assert_same_training(path, expected)
        balances.append([row["balance"] for row in metrics(load_config(path))])
    for balance in balances[1:]:
        assert balance == pytest.approx(balances[0], rel=1e-5)


@pytest.mark.multirank
def test_the_released_balance_depends_on_the_micro_batch(tmp_path, tiny_llama, tiny_encoder) -> None:
    """What the default mends: the same run with other micro batches is another run."""
    released = {"balance_weight": 0.5, "balance_probability": "gate", "balance_scope": "micro_batch"}
    paths = [
        recipe(
            tmp_path,
            tiny_llama,
            tiny_encoder,
            f"released-{micro}",
            training={**STEPS, "micro_batch_size": micro},
            adapters=released,
        )
        for micro in (1, 12)
    ]
    run_recipes(1, paths)
    one, whole = ([row["balance"] for row in metrics(load_config(path))] for path in paths)
    assert one[0] != pytest.approx(whole[0], rel=1e-3)


@pytest.mark.multirank
def test_a_run_stopped_in_the_middle_goes_on_with_its_shares_on_other_ranks(
    tmp_path, tiny_llama, tiny_encoder, expected
) -> None:
    first = recipe(
        tmp_path, tiny_llama, tiny_encoder, "moving", training={**STEPS, "micro_batch_size": 2}, adapters=WEIGHT,
        parallel={**SHARDED, "ep_size": 2}, checkpoint={"every": 5, "keep_last": 5},
    )  # fmt: skip
    run_recipes(2, [first])
    run_dir = load_config(first).run_dir
    saved = load_file(find_checkpoint(Run(run_dir).checkpoints, 5) / "shared.safetensors")["balance/expert_share"]
    assert saved.shape == (4, 4)  # 2 layers with a router for q and v and one for up
    torch.testing.assert_close(saved.sum(dim=1), torch.ones(4))
    assert (saved - 0.25).abs().max() > 1e-3
    for world in (1, 4):
        name = f"moved-{world}"
        path = recipe(
            tmp_path,
            tiny_llama,
            tiny_encoder,
            name,
            training={**STEPS, "micro_batch_size": 6},
            adapters=WEIGHT,
            parallel=SHARDED,
        )
        copy_until(run_dir, load_config(path).run_dir, step=5)
        run_recipes(world, [path])
        assert_same_training(path, expected)


def copy_until(source: Path, target: Path, step: int) -> None:
    """Copy a run as it was after ``step``."""
    shutil.copytree(source, target)
    for folder in (target / "checkpoints").glob("step-*"):
        if folder.name != f"step-{step}":
            shutil.rmtree(folder)
    (target / "checkpoints" / "latest").write_text(f"step-{step}\n")
    rows = (target / "metrics.jsonl").read_text().splitlines(keepends=True)
    (target / "metrics.jsonl").write_text("".join(rows[:step]))


class Linear(nn.Module):
    """A backbone of one linear, to be adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(hidden=self.q_proj(inputs_embeds))


def used_experts(steps: int, **options: str) -> list[set[int]]:
    """Train a router that starts with two experts for every token. Returns the experts with 1% of the tokens, by step.

    The experts stay as they start (B = 0) and float64 leaves no rounding, so that only the balance loss moves the
    router.
    """
    torch.manual_seed(0)
    config = CumaConfig(num_experts=8, lora_r=2, profile_dim=4, target_modules=["q_proj"], **options)
    model = inject_adapters(Linear(), config).double().train()
    router = {name: parameter for name, parameter in model.adapter_parameters() if ".router." in name}
    with torch.no_grad():
        router["q_proj.router.weight_h"][:2] += 10 / WIDTH  # the inputs have mean 1
    optimizer = torch.optim.AdamW(router.values(), lr=1e-3, weight_decay=0.0)
    generator, used = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        x = 1 + torch.randn(8, 16, WIDTH, generator=generator, dtype=torch.float64)
        out = model(inputs_embeds=x, profile_embeddings=torch.randn(8, 4, generator=generator, dtype=torch.float64))
        load_E = model.routing_statistics().load_RE[0]
        used.append(set(torch.nonzero(load_E >= 0.01 * load_E.sum()).flatten().tolist()))
        optimizer.zero_grad()
        (out.hidden.square().mean() + model.config.balance_weight * out.balance_loss).backward()
        optimizer.step()
    return used


def test_a_router_that_uses_two_experts_is_revived_by_the_default_and_not_by_the_released_gate() -> None:
    revived = used_experts(50)
    assert revived[0] == {0, 1}
    assert set().union(*revived) == set(range(8))
    assert len(revived[-1]) > 2
    released = used_experts(50, balance_probability="gate", balance_scope="micro_batch")
    assert released == [{0, 1}] * 50
