"""Spikes of the loss, and experts that nothing reaches, are counted and said once with what to change."""

from __future__ import annotations

import random

import torch

from cuma_ds.training.health import Health


def test_spikes_are_counted_and_said_once_and_usual_losses_are_none() -> None:
    said: list[str] = []
    health, generator = Health([], 2, said.append), random.Random(0)
    for step in range(1, 101):
        health.add_loss(step, 2.0 - step / 100 + generator.gauss(0, 0.1))
    assert (health.loss_spikes, said) == (0, [])
    for step in (101, 110, 120):
        health.add_loss(step, 9.0)
    assert health.loss_spikes == 3
    assert len(said) == 1
    assert "step 101: the loss is 9" in said[0]
    assert "training.learning_rate" in said[0]
    assert health.row() == {"health/loss_spikes": 3.0}


def loads(*shares: list[int]) -> torch.Tensor:
    return torch.tensor(shares, dtype=torch.float64)


def test_an_expert_without_tokens_and_a_collapsed_router_are_told_apart() -> None:
    said: list[str] = []
    health = Health(["one", "two"], 2, said.append)
    for step in range(1, 25):
        health.add_load(step, loads([50, 50, 50, 50], [60, 70, 70, 0]))
    assert (health.dead_experts, health.collapsed_routers) == (1, 0)
    assert len(said) == 1
    assert "router two sends next to no tokens to some of its experts" in said[0]
    assert "adapters.balance_weight" in said[0]
    for step in range(25, 50):
        health.add_load(step, loads([100, 100, 0, 0], [60, 70, 70, 0]))
    assert (health.dead_experts, health.collapsed_routers) == (3, 1)
    assert "router one sends nearly all tokens to the same experts (1 of 2 routers do" in said[1]
    assert health.row() == {"health/dead_experts": 3.0, "health/collapsed_routers": 1.0}


def test_few_rows_and_routers_that_use_all_experts_say_nothing() -> None:
    said: list[str] = []
    health = Health(["one"], 2, said.append)
    for step in range(1, 15):
        health.add_load(step, loads([100, 100, 0, 0]))
    all_active = Health(["one"], 4, said.append)
    for step in range(1, 50):
        all_active.add_load(step, loads([100, 100, 0, 0]))
    assert (health.row(), all_active.row(), said) == ({}, {}, [])
