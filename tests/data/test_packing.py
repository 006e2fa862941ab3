"""Several examples in one row: none sees another, and what is learned is what single rows teach."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import run_recipes
from single_process import train_single
from small_runs import assert_same_training, recipe

from cuma_ds.adapters import CumaConfig, inject_adapters
from cuma_ds.data.batch import EncodedExample, as_filler, collate, pack
from cuma_ds.data.stream import Draw, Stream
from cuma_ds.errors import ConfigError
from cuma_ds.methods.cuma import model_inputs
from cuma_ds.profiles import ProfileTable
from cuma_ds.recipe import load_config
from cuma_ds.training.objectives.sft import label_losses

DATA = Path(__file__).parents[1] / "data"


def example(name: int, length: int, targets: int = 1) -> EncodedExample:
    ids = [10 + name] * length
    weights = [1.0 + name] * targets
    return EncodedExample(ids, list(range(length - targets, length)), [name] * targets, weights, 10 + name)


def test_rows_are_filled_longest_first_and_positions_start_again():
    batch = pack([example(0, 2), example(1, 5), example(2, 3), example(3, 1)], pad_id=7, length=8)
    assert batch.input_ids_BS.tolist() == [[11, 11, 11, 11, 11, 12, 12, 12], [10, 10, 13, 7, 7, 7, 7, 7]]
    assert batch.position_ids_BS.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 0, 0, 1, 2, 3, 4]]
    assert batch.profile_BS.tolist() == [[1] * 5 + [2] * 3, [0, 0, 3, -1, -1, -1, -1, -1]]
    assert batch.profile_rows_N.tolist() == [10, 11, 12, 13]
    assert batch.attention_mask_BS.tolist() == [[1] * 8, [1, 1, 1, 0, 0, 0, 0, 0]]


def test_targets_point_at_the_kept_positions():
    examples = [example(0, 2), example(1, 5, targets=3), example(2, 3)]
    batch = pack(examples, pad_id=7, length=8)
    kept = batch.input_ids_BS[:, batch.keep]
    assert sorted(kept[batch.targets.row_L, batch.targets.position_L].tolist()) == [10, 11, 11, 11, 12]
    by_token = dict(zip(batch.targets.token_L.tolist(), batch.targets.weight_L.tolist(), strict=True))
    assert by_token == {0: 1.0, 1: 2.0, 2: 3.0}
    assert batch.weight_sum == pytest.approx(1 + 3 * 2 + 3)


def test_an_example_longer_than_a_row_has_one_of_its_own_and_fillers_stay_out():
    batch = pack([example(0, 9), as_filler(example(1, 2))], pad_id=0, length=4)
    assert batch.input_ids_BS.shape == (2, 9)
    assert batch.profile_BS[1].unique().tolist() == [-1]
    assert batch.weight_sum == 1.0


@pytest.mark.parametrize(("world", "batch"), [(1, 7), (2, 7), (3, 2)])
def test_the_stream_packs_what_it_would_show_unpacked(world, batch):
    def stream(rank, **options):
        return Stream(Draw(40, batch, 3, 5, rank, world), lambda row: (example(row, 1 + row % 6),), 0, **options)

    for rank in range(world):
        for plain, packed in zip(stream(rank).step(3), stream(rank, pack_length=12).step(3), strict=True):
            real = plain.profile_rows_N[plain.profile_BS[:, 0] >= 0]
            shown = packed.profile_BS[packed.profile_BS >= 0].unique()
            assert packed.profile_rows_N[shown].sort().values.tolist() == sorted(real.tolist())
            assert packed.rows == plain.rows
            assert packed.weight_sum == plain.weight_sum


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["cuma", "mixlora"])
def test_loss_balance_and_gradients_are_those_of_single_rows(tiny_llama, attention, method):
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(4)
    width = 6 if method == "cuma" else 0
    config = CumaConfig(
        method=method,
        num_experts=4,
        top_k=2,
        lora_r=4,
        profile_dim=width,
        target_modules=["q_proj", "v_proj", "up_proj"],
    )
    model = inject_adapters(
        AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, attn_implementation=attention), config
    )
    model.shares_per_forward = False
    model.expert_share = torch.randn(model.expert_share.shape, generator=generator).softmax(dim=-1)
    for _, parameter in model.adapter_parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    table = ProfileTable([f"p{i}" for i in range(5)], torch.randn(5, 6, generator=generator)) if width else None
    examples = []
    for number, length in enumerate((9, 4, 13, 6, 7)):
        ids = torch.randint(6, 100, (length,), generator=generator).tolist()
        examples.append(EncodedExample(ids, [length - 3, length - 1], ids[:2], [0.5, 1.0 + number], number))
    found = []
    for batch in (collate(examples, pad_id=0), pack(examples, pad_id=0, length=20)):
        model.train().zero_grad()
        out = model(**model_inputs(batch, table, torch.device("cpu")))
        loss = label_losses(out.logits, batch.targets).sum()
        # The mean over all targets, as in training.
        (loss / batch.weight_sum + 0.1 * out.balance_loss).backward()
        gradients = torch.cat([parameter.grad.flatten() for _, parameter in model.adapter_parameters()])
        found.append((loss.detach(), out.balance_loss.detach(), gradients))
    assert len(pack(examples, 0, 20).input_ids_BS) == 2
    assert found[0][2].abs().max() > 1e-2
    found = [(loss / 30, balance, gradients / gradients.norm()) for loss, balance, gradients in found]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.multirank
def test_packed_runs_on_two_ranks_equal_one_process_without_packing(tmp_path, tiny_llama, tiny_encoder):
    parallel = {"deepspeed_config": "zero2_sharded_backbone", "ep_size": 2}
    chats = {"source": "jsonl", "path": str(DATA / "chats.jsonl"), "heldout_fraction": 0.0}
    cases = {
        "choice": {"data": {"max_length": 300}},
        "chat": {"data": {**chats, "max_length": 220}, "model": {"attention": "eager"}},
        "odd": {
            "data": {**chats, "max_length": 220},
            "model": {"gradient_checkpointing": True},
            "training": {"global_batch_size": 7},
        },
    }
    plain, packed = {}, {}
    for name, changes in cases.items():
        plain[name] = recipe(tmp_path, tiny_llama, tiny_encoder, f"{name}-plain", **changes)
        changes = {**changes, "data": {**changes["data"], "packing": True}}
        packed[name] = recipe(tmp_path, tiny_llama, tiny_encoder, f"{name}-packed", parallel=parallel, **changes)
    run_recipes(2, list(packed.values()))
    for name in cases:
        assert_same_training(packed[name], train_single(load_config(plain[name])))


def test_packing_needs_profiles_to_mask_gradients(tmp_path, tiny_llama, tiny_encoder):
    path = recipe(
        tmp_path,
        tiny_llama,
        tiny_encoder,
        "no",
        data={"packing": True},
        adapters={"method": "mixlora", "gradient_mask": "dominant"},
    )
    with pytest.raises(ConfigError, match=r"data\.packing is true, but adapters\.gradient_mask dominant"):
        load_config(path)
