"""Generating with the training engine between two steps, with a sharded backbone and with one that is gathered once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import run as run_ranks
from small_runs import recipe
from transformers import AutoModelForCausalLM

from cuma_ds.parallel.stored import find_checkpoint, read_adapters
from cuma_ds.recipe import load_config
from cuma_ds.runs import Run

HELPER = "tests/helpers/train_with_rollouts.py"
SHARDED = {"deepspeed_config": "zero2_sharded_backbone"}
PREFETCHED = {"deepspeed_config": "zero2_sharded_overlap"}
STAGE_3 = {"deepspeed_config": "zero3"}
STEPS = 3


def trained(path: Path) -> dict[str, torch.Tensor]:
    return read_adapters(find_checkpoint(Run(load_config(path).run_dir).checkpoints))


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=0)


class Runs:
    """Small runs on ranks, by their name: recipes, and what each rank wrote before each step."""

    def __init__(self, folder: Path, tiny_llama: Path, tiny_encoder: Path) -> None:
        self.folder, self.models = folder, (tiny_llama, tiny_encoder)
        self.paths: dict[str, Path] = {}
        self.said: dict[str, list[list[dict]]] = {}

    def train(self, world: int, dropout: float = 0.0, **jobs: tuple[dict, str | None]) -> None:
        """Train jobs of (section parallel, how rollouts hold the backbone; None generates nothing)."""
        changes = {"training": {"steps": STEPS, "warmup_steps": 0}, "adapters": {"dropout": dropout}}
        for name, (parallel, _) in jobs.items():
            self.paths[name] = recipe(self.folder, *self.models, name, parallel=parallel, **changes)
        listed = [{"recipe": str(self.paths[name]), "backbone": how} for name, (_, how) in jobs.items()]
        for code, output in run_ranks(world, [HELPER, json.dumps(listed)]):
            assert code == 0, output[-3000:]
        for name in jobs:
            files = [Path(f"{self.paths[name]}.rank{rank}.json") for rank in range(world)]
            self.said[name] = [json.loads(file.read_text()) for file in files]

    def written(self, name: str) -> list[list[tuple[list[int], list[float]]]]:
        """Step by step, the tokens of every completion and their log-probabilities."""
        ranks = self.said[name]
        return [
            [ranks[number % len(ranks)][step]["written"][number // len(ranks)] for number in range(3)]
            for step in range(STEPS)
        ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_llama, tiny_encoder) -> Runs:
    made = Runs(tmp_path_factory.mktemp("gathered"), tiny_llama, tiny_encoder)
    made.train(1, alone=({"deepspeed_config": "zero2"}, "sharded"))
    made.train(
        2,
        plain=(SHARDED, None),
        sharded=(SHARDED, "sharded"),
        gathered=(SHARDED, "gathered"),
        prefetched=(PREFETCHED, "gathered"),
        whole=({"deepspeed_config": "zero2"}, "gathered"),
        stage_3_plain=(STAGE_3, None),
        stage_3=(STAGE_3, "gathered"),
    )
    return made


@pytest.mark.multirank
@pytest.mark.parametrize("name", ["sharded", "gathered", "prefetched", "whole", "stage_3"])
def test_two_ranks_write_what_one_process_writes(name, runs) -> None:
    tokens: list[list[int]] = []
    for found, expected in zip(runs.written(name), runs.written("alone"), strict=True):
        for (found_tokens, found_scores), (expected_tokens, expected_scores) in zip(found, expected, strict=True):
            assert found_tokens == expected_tokens
            assert found_scores == pytest.approx(expected_scores, abs=1e-4)
            tokens.append(found_tokens)
    assert tokens[:3] != tokens[-3:], "what was learned must matter for this test to mean something"


@pytest.mark.multirank
def test_what_is_learned_is_as_without_generating(runs) -> None:
    for name in ("sharded", "gathered", "prefetched"):
        assert_equal(trained(runs.paths["plain"]), trained(runs.paths[name]))
    assert_equal(trained(runs.paths["stage_3_plain"]), trained(runs.paths["stage_3"]))


@pytest.mark.multirank
def test_what_is_learned_is_as_without_generating_with_experts_on_other_ranks(
    tmp_path, tiny_llama, tiny_encoder
) -> None:
    runs, parallel = Runs(tmp_path, tiny_llama, tiny_encoder), {**SHARDED, "ep_size": 2}
    runs.train(4, dropout=0.1, plain=(parallel, None), sharded=(parallel, "sharded"), gathered=(parallel, "gathered"))
    assert runs.written("sharded") == runs.written("gathered")
    for name in ("sharded", "gathered"):
        assert_equal(trained(runs.paths["plain"]), trained(runs.paths[name]))


@pytest.mark.multirank
def test_a_gathered_backbone_is_sent_once_for_a_rollout_and_a_sharded_one_for_each_token(runs, tiny_llama) -> None:
    backbone = AutoModelForCausalLM.from_pretrained(tiny_llama)
    shards = {name: -(-parameter.numel() // 2) * 4 for name, parameter in backbone.named_parameters()}
    once = sum(shards.values())
    tied = backbone.get_input_embeddings().weight is backbone.get_output_embeddings().weight
    per_forward = once + tied * shards["model.embed_tokens.weight"]  # which is gathered for the embedding and the head
    for rank in range(2):
        for name in ("gathered", "prefetched"):
            assert {step["all_gather"] for step in runs.said[name][rank]} == {once}
        assert {step["all_gather"] for step in runs.said["whole"][rank]} == {0}
        for step in runs.said["sharded"][rank]:
            assert step["forwards"] > 6
            assert step["all_gather"] == step["forwards"] * per_forward


@pytest.mark.multirank
def test_the_memory_of_a_gathered_backbone_is_given_back(runs, tiny_llama) -> None:
    full = sum(parameter.numel() * 4 for parameter in AutoModelForCausalLM.from_pretrained(tiny_llama).parameters())
    for rank in range(2):
        for name in ("gathered", "prefetched", "stage_3"):
            assert [step["live"] for step in runs.said[name][rank]] == [[0, full, 0]] * STEPS
        assert [step["live"] for step in runs.said["sharded"][rank]] == [[0, 0, 0]] * STEPS


@pytest.mark.multirank
def test_the_whole_backbone_is_gathered_where_every_rank_has_room_for_it(runs) -> None:
    for rank in range(2):
        assert [step["room"] for step in runs.said["sharded"][rank]] == [[True, False, False]] * STEPS
