"""Advantages against TRL's own lines, independent loops and what a history or robust weights say they are."""

from __future__ import annotations

import ast
import json
import math
import statistics
import textwrap
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import run

from cuma_ds.config import GrpoSection
from cuma_ds.parallel.topology import Topology
from cuma_ds.training.groups import Groups
from cuma_ds.training.rollout.advantage import Advantages, History, Robust, by_prompt, weighted_sum

ALONE = Topology(world=1, rank=0, local_rank=0, device=torch.device("cpu"))
NAN = math.nan


def trl_file(name: str) -> str:
    spec = find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("trl, a test dependency, is not installed")
    assert version("trl") == "1.16.0"
    return (Path(spec.submodule_search_locations[0]) / "trainer" / name).read_text()


@pytest.fixture(scope="module")
def trl() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """The lines of TRL's GRPOTrainer between its rewards and its advantages, run on float64 tensors as they stand."""
    utils = ast.parse(trl_file("utils.py"))
    nanstd = next(node for node in utils.body if isinstance(node, ast.FunctionDef) and node.name == "nanstd")
    source = trl_file("grpo_trainer.py")
    begin = source.index("        unscorable_mask = torch.isnan(rewards_per_func)")
    end = source.index("\n", source.index("advantages = torch.nan_to_num(advantages, nan=0.0)"))
    lines = textwrap.dedent(source[begin:end])

    def run(rewards_NF: np.ndarray, weights: list[float], size: int, scale: str) -> tuple[np.ndarray, np.ndarray]:
        trainer = SimpleNamespace(
            reward_weights=torch.tensor(weights, dtype=torch.float64),
            scale_rewards=scale,
            multi_objective_aggregation="sum_then_normalize",
        )
        names = {"torch": torch, "self": trainer, "device": "cpu", "num_generations": size}
        names["rewards_per_func"] = torch.tensor(rewards_NF, dtype=torch.float64)
        exec(ast.unparse(nanstd), names)
        exec(lines, names)
        return names["advantages"].numpy(), names["is_std_zero"].double().numpy()

    return run


def random_rewards(seed: int, prompts: int = 5, size: int = 4, columns: int = 3) -> np.ndarray:
    """Rewards with missing ones; one prompt with equal rewards, one with a single reward, one with none."""
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(prompts * size, columns))
    rewards[rng.random(rewards.shape) < 0.2] = NAN
    rewards[:size] = 0.5
    rewards[size : 2 * size - 1] = NAN
    rewards[2 * size : 3 * size] = NAN
    return rewards


def advantages(section: dict, groups: Groups | None = None, columns: int = 1, weights: list[float] | None = None):
    names = [f"r{column}" for column in range(columns)]
    return Advantages(GrpoSection(**section), names, weights or [1.0] * columns, groups, ALONE)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("seed", range(4))
def test_advantages_are_trls(trl, scale: str, seed: int) -> None:
    rewards, weights = random_rewards(seed), [1.0, 0.5, -2.0]
    expected, zero_std = trl(rewards, weights, 4, scale)
    found = advantages({"group_size": 4, "scale_rewards": scale}, None, 3, weights)(rewards, np.zeros(20, np.int64))
    # TRL takes n / (n - 1) in float32.
    np.testing.assert_allclose(found.advantage_M, expected, rtol=1e-7, atol=1e-12)
    assert found.numbers["frac_reward_zero_std"] == pytest.approx(zero_std.mean())


def test_advantages_are_those_of_a_loop() -> None:
    rewards = [[1.0, 3.0, 2.0], [NAN, 5.0, 1.0], [NAN, NAN, 7.0], [NAN, NAN, NAN], [2.0, 2.0, 2.0]]
    known = [value for row in rewards for value in row if value == value]
    for scale in ("group", "batch", "none"):
        expected = []
        for row in rewards:
            own = [value for value in row if value == value]
            spread = statistics.stdev(known) if scale == "batch" else statistics.stdev(own) if len(own) > 1 else 1.0
            for value in row:
                if value != value or len(own) < 2:
                    expected.append(0.0)
                else:
                    centred = value - statistics.mean(own)
                    expected.append(centred if scale == "none" else centred / (spread + 1e-4))
        found = by_prompt(np.array(rewards).reshape(-1), 3, scale)
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_sums_leave_out_what_a_completion_does_not_have() -> None:
    rewards = np.array([[1.0, 2.0], [NAN, 2.0], [NAN, NAN]])
    np.testing.assert_array_equal(weighted_sum(rewards, np.array([10.0, 0.5])), [11.0, 1.0, NAN])


def test_numbers_of_a_rollout() -> None:
    groups = Groups(("Ghana", "Norway"), np.array([0, 1, 2]))
    rewards = np.array([[1.0, NAN], [2.0, 4.0], [NAN, NAN], [6.0, 1.0], [3.0, NAN], [3.0, NAN]])
    made = advantages({"group_size": 2}, groups, 2, [1.0, 0.5])
    found = made(rewards, np.array([0, 0, 1, 1, 2, 2]))
    np.testing.assert_array_equal(found.reward_M, [1.0, 4.0, NAN, 6.5, 3.0, 3.0])
    expected = {
        "reward": 3.5, "reward_std": statistics.stdev([1, 4, 6.5, 3, 3]),
        "rewards/r0/mean": 3.0, "rewards/r0/std": statistics.stdev([1, 2, 6, 3, 3]), "rewards/r0/none": 1 / 6,
        "rewards/r1/mean": 2.5, "rewards/r1/std": statistics.stdev([4, 1]), "rewards/r1/none": 4 / 6,
        "frac_reward_zero_std": 2 / 6, "completions/left_out": 1 / 6, "completions/without_others": 2 / 6,
        "reward/Ghana": 2.5, "reward/Norway": 6.5,
    }  # fmt: skip
    assert found.numbers == pytest.approx(expected), "what nobody knows is not there, and small groups have no name"


def test_a_rollout_without_rewards_moves_nothing() -> None:
    found = advantages({"group_size": 2})(np.full((4, 1), NAN), np.zeros(4, np.int64))
    np.testing.assert_array_equal(found.advantage_M, np.zeros(4))
    shares = {"completions/left_out": 1.0, "completions/without_others": 1.0, "rewards/r0/none": 1.0}
    assert found.numbers == {"frac_reward_zero_std": 0.0, **shares}


def rollouts(count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rewards of two prompts a rollout, and the groups of those who asked, of groups that differ in mean and spread."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        groups = np.repeat(rng.integers(0, 3, size=2), 4)
        rewards = rng.normal(size=8) * np.array([1.0, 0.01, 5.0])[groups] + np.array([0.0, 100.0, -3.0])[groups]
        rewards[rng.random(8) < 0.2] = NAN
        found.append((rewards, groups))
    return found


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_history_compares_with_all_rewards_of_the_group_so_far(scale: str) -> None:
    history, seen = History(3), {0: [], 1: [], 2: []}
    for rewards, groups in rollouts(6):
        history.add(rewards, groups)
        for value, group in zip(rewards, groups, strict=True):
            seen[group] += [value] if value == value else []
        batch = statistics.stdev([value for value in rewards if value == value])
        expected = []
        for value, group in zip(rewards, groups, strict=True):
            if value != value or len(seen[group]) < 2:
                expected.append(0.0)
                continue
            spread = {"group": statistics.stdev(seen[group]), "batch": batch}
            divisor = spread[scale] + 1e-4 if scale in spread else 1.0
            expected.append((value - statistics.mean(seen[group])) / divisor)
        np.testing.assert_allclose(history.advantages(rewards, groups, scale), expected, rtol=1e-9, atol=1e-12)


def test_history_keeps_its_digits_far_from_zero() -> None:
    rng, history = np.random.default_rng(0), History(1)
    values = 1e8 + rng.normal(size=4000)
    for part in np.split(values, 100):
        history.add(part, np.zeros(40, np.int64))
    assert history.square_G[0] / 3999 == pytest.approx(np.var(values, ddof=1), rel=1e-6)


def test_history_does_not_drown_a_group_whose_rewards_hardly_vary() -> None:
    """Within one prompt of each of two groups, advantages are of one size with the history, not without a scale."""
    history, groups = History(2), np.repeat([0, 1], 8)
    rng = np.random.default_rng(0)
    for _ in range(50):
        rewards = rng.normal(size=16) * np.where(groups == 0, 0.01, 3.0)
        history.add(rewards, groups)
    found = np.abs(history.advantages(rewards, groups, "group"))
    assert 0.5 < found[:8].mean() / found[8:].mean() < 2
    plain = np.abs(by_prompt(rewards, 8, "none"))
    assert plain[:8].mean() / plain[8:].mean() < 0.02


def test_robust_weights_grow_where_rewards_are_low() -> None:
    """Exponentiated gradient, in plain numbers."""
    robust, q = Robust(3, 0.5), [1 / 3] * 3
    for rewards, groups in rollouts(5, seed=1):
        rewards = rewards / 100
        found = robust.weights(rewards, groups)
        for group in range(3):
            own = [value for value, asked in zip(rewards, groups, strict=True) if asked == group and value == value]
            q[group] *= math.exp(-0.5 * statistics.mean(own)) if own else 1.0
        q = [one / sum(q) for one in q]
        known = [q[group] for value, group in zip(rewards, groups, strict=True) if value == value]
        np.testing.assert_allclose(found, [q[group] / statistics.mean(known) for group in groups], rtol=1e-10)
        assert found[~np.isnan(rewards)].mean() == pytest.approx(1.0)
    np.testing.assert_allclose(robust.relative(), 3 * np.array(q), rtol=1e-10)


def test_robust_weights_start_equal_and_multiply_advantages() -> None:
    groups = Groups(("a", "b"), np.array([0, 1]))
    rewards, profiles = np.array([[0.0], [1.0], [2.0], [5.0]]), np.array([0, 0, 1, 1])
    plain = advantages({"group_size": 2}, groups)(rewards, profiles)
    made = advantages({"group_size": 2, "robust": "groupdro", "robust_step": 0.2}, groups)
    found = made(rewards, profiles)
    low, high = math.exp(-0.2 * 0.5), math.exp(-0.2 * 3.5)
    weights = np.array([low, low, high, high]) / ((low + high) / 2)
    np.testing.assert_allclose(found.advantage_M, plain.advantage_M * weights, rtol=1e-12)
    assert found.numbers["robust_weight/a"] > 1 > found.numbers["robust_weight/b"]
    equal = Robust(2, 0.2).weights(np.full(4, 0.7), profiles)
    np.testing.assert_allclose(equal, 1.0)


def test_far_apart_rewards_leave_robust_weights_finite() -> None:
    robust = Robust(2, 1.0)
    for _ in range(3):
        found = robust.weights(np.array([-1000.0, 1000.0]), np.array([0, 1]))
    np.testing.assert_allclose(found, [2.0, 0.0])
    assert np.isfinite(robust.log_q_G).all()


def test_state_goes_on_where_it_was() -> None:
    """Three rollouts, then a new object with the state, then three more: as six without a stop, bit for bit."""
    section = {"group_size": 4, "advantage": "history", "robust": "groupdro"}
    groups = Groups(("a", "b"), np.array([0, 1, 2]))
    through, before, after = (advantages(section, groups) for _ in range(3))
    steps = rollouts(6, seed=2)
    expected = [through(rewards[:, None], asked) for rewards, asked in steps]
    for rewards, asked in steps[:3]:
        before(rewards[:, None], asked)
    state = before.state()
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()} == dict.fromkeys(
        ("history_count", "history_mean", "history_square", "robust_log_q"), (torch.float64, (3,))
    )
    after.load_state(state)
    before(*[steps[3][0][:, None], steps[3][1]])  # what it learns now is not part of the state that was taken
    for (rewards, asked), same in zip(steps[3:], expected[3:], strict=True):
        found = after(rewards[:, None], asked)
        assert found.advantage_M.tobytes() == same.advantage_M.tobytes()
        assert found.numbers == same.numbers
    assert advantages({"group_size": 4}).state() == {}


def test_ranks_with_different_shares_are_one_process() -> None:
    """Also a rank without completions, and a reward that fails on one rank alone is one line on both."""
    helper = str(Path(__file__).parents[2] / "helpers" / "rewards_on_ranks.py")
    finished = [*run(1, [helper]), *run(2, [helper])]
    assert [code for code, _ in finished] == [0, 0, 0], finished
    alone, *both = (json.loads(output.strip().splitlines()[-1]) for _, output in finished)
    assert both[0]["advantages"][0] == []
    for step in range(2):
        together = both[0]["advantages"][step] + both[1]["advantages"][step]
        np.testing.assert_allclose(together, alone["advantages"][step], rtol=1e-12, atol=1e-14)
    assert both[0]["numbers"] == both[1]["numbers"]
    assert both[0]["state"] == both[1]["state"]
    for found, expected in zip(both[0]["numbers"], alone["numbers"], strict=True):
        assert found == pytest.approx(expected)
    said = "reward mine:bad returned 'nan' for completion 0 of 1"
    assert [part["error"][0] for part in (alone, *both)] == ["RewardError"] * 3
    assert alone["error"][1].startswith(said)
    assert all(part["error"][1].startswith(f"rank 1: {said}") for part in both)
