"""From rewards to advantages: what a completion is compared with, and how much its group of people weighs.

Shapes: N completions of all ranks (M of this one), F columns of rewards, S completions of one prompt, G groups of
people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from cuma_ds.config import GrpoSection
from cuma_ds.parallel.topology import Topology
from cuma_ds.training.groups import Groups

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
# Added to standard deviations, as in TRL.
_EPSILON = 1e-4


class Found(NamedTuple):
    """Advantages of one rollout.

    Attributes:
        advantage_M: float64, of this rank's completions; 0 for those that are left out.
        reward_M: float64, weighted sum of the rewards; nan for those that are left out.
        numbers: for the log, over all ranks, equal on all, where they are known: ``reward``, ``reward_std``,
            ``rewards/<name>/mean``, ``/std`` and ``/none`` (share of completions without it), ``frac_reward_zero_std``
            (share whose prompt's rewards are all equal), ``completions/left_out`` (share without any reward) and
            ``/without_others`` (whose prompt has less than two), ``reward/<group>``, ``robust_weight/<group>``.
    """

    advantage_M: Array
    reward_M: Array
    numbers: dict[str, float]


class Advantages:
    """Advantages of the completions of each rollout.

    Args:
        section: of the recipe.
        names, weights: of F columns of rewards.
        groups: of people; None without ``training.group_field``.
        topology: the ranks.
    """

    def __init__(
        self,
        section: GrpoSection,
        names: Sequence[str],
        weights: Sequence[float],
        groups: Groups | None,
        topology: Topology,
    ) -> None:
        self._section, self._names, self._groups, self._topology = section, names, groups, topology
        self._weights_F = np.array(weights, dtype=np.float64)
        size = 0 if groups is None else len(groups.names) + 1
        self.history = History(size) if section.advantage == "history" else None
        self.robust = Robust(size, section.robust_step) if section.robust == "groupdro" else None

    def __call__(self, rewards_MF: Array, profile_M: Indices) -> Found:
        """Compare completions with each other, or with the history of their group; all ranks call it together.

        Args:
            rewards_MF: nan where a reward gave none. The completions of one prompt stand together, all of them.
            profile_M: of who asked.
        """
        group_M = np.zeros_like(profile_M) if self._groups is None else self._groups.of_profile_N[profile_M]
        rewards_NF, group_N, own = self._of_all_ranks(rewards_MF, group_M)
        reward_N = weighted_sum(rewards_NF, self._weights_F)
        numbers = self._numbers(rewards_NF, reward_N, group_N)
        if self.history is None:
            advantage_N = by_prompt(reward_N, self._section.group_size, self._section.scale_rewards)
        else:
            self.history.add(reward_N, group_N)
            advantage_N = self.history.advantages(reward_N, group_N, self._section.scale_rewards)
        if self.robust is not None:
            advantage_N = advantage_N * self.robust.weights(reward_N, group_N)
            numbers |= self._by_group("robust_weight", self.robust.relative())
        known = {name: value for name, value in numbers.items() if value == value}
        return Found(advantage_N[own], reward_N[own], known)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by name; equal on all ranks."""
        found = {} if self.history is None else self.history.state()
        return found | ({} if self.robust is None else self.robust.state())

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what :meth:`state` gave."""
        for part in (self.history, self.robust):
            if part is not None:
                part.load_state(tensors)

    def _of_all_ranks(self, rewards_MF: Array, group_M: Indices) -> tuple[Array, Indices, slice]:
        """Rewards and groups of all completions, rank by rank, and which are this rank's."""
        if self._topology.world == 1:
            return rewards_MF, group_M, slice(None)
        parts: list[tuple[Array, Indices]] = [(rewards_MF, group_M)] * self._topology.world
        dist.all_gather_object(parts, (rewards_MF, group_M))
        start = sum(len(groups) for _, groups in parts[: self._topology.rank])
        rewards, groups = zip(*parts, strict=True)
        return np.concatenate(rewards), np.concatenate(groups), slice(start, start + len(group_M))

    def _numbers(self, rewards_NF: Array, reward_N: Array, group_N: Indices) -> dict[str, float]:
        numbers = {"reward": mean(reward_N), "reward_std": std(reward_N)}
        for name, column_N in zip(self._names, rewards_NF.T, strict=True):
            numbers |= {f"rewards/{name}/mean": mean(column_N), f"rewards/{name}/std": std(column_N)}
            numbers[f"rewards/{name}/none"] = float(np.isnan(column_N).mean())
        std_N = spread(reward_N, self._section.group_size, self._section.scale_rewards)
        numbers["frac_reward_zero_std"] = float(np.isclose(std_N, 0.0).mean())
        numbers["completions/left_out"] = float(np.isnan(reward_N).mean())
        if self.history is None:
            own_N = spread(reward_N, self._section.group_size, "group")
            numbers["completions/without_others"] = float(np.isnan(own_N).mean())
        if self._groups is not None:
            means_G = np.array([mean(reward_N[group_N == group]) for group in range(len(self._groups.names) + 1)])
            numbers |= self._by_group("reward", means_G)
        return numbers

    def _by_group(self, name: str, values_G: Array) -> dict[str, float]:
        """One number for each group that has a name."""
        names = () if self._groups is None else self._groups.names
        return {f"{name}/{group}": float(value) for group, value in zip(names, values_G, strict=False)}


def weighted_sum(rewards_NF: Array, weights_F: Array) -> Array:
    """[N] sum of the rewards that a completion has, times their weights; nan where it has none (as TRL)."""
    total_N = np.nansum(rewards_NF * weights_F, axis=1)
    total_N[np.isnan(rewards_NF).all(axis=1)] = np.nan
    return total_N


def by_prompt(reward_N: Array, size: int, scale: Literal["group", "batch", "none"]) -> Array:
    """Advantages by comparison with the other completions of a prompt (GRPO, arXiv 2402.03300; Dr. GRPO for ``none``).

    A = r - mean of its prompt, divided by s + 1e-4 with s the standard deviation (unbiased) of the prompt's rewards
    (``group``) or of all (``batch``). Completions left out count for nothing and get 0, as does one that has no other
    beside it.

    Args:
        reward_N: prompt by prompt, nan for completions left out.
        size: S.
        scale: what advantages are divided by.
    """
    reward_PS = reward_N.reshape(-1, size)
    advantage_N = (reward_PS - _mean(reward_PS)).reshape(-1)
    if scale != "none":
        advantage_N = advantage_N / (spread(reward_N, size, scale) + _EPSILON)
    return np.nan_to_num(advantage_N, nan=0.0)


def spread(reward_N: Array, size: int, scale: Literal["group", "batch", "none"]) -> Array:
    """[N] the standard deviation that belongs to each completion: of all rewards (``batch``), else of its prompt's; nan
    for less than two rewards.
    """
    rows = reward_N.reshape(1, -1) if scale == "batch" else reward_N.reshape(-1, size)
    return np.broadcast_to(_std(rows), rows.shape).reshape(-1)


class History:
    """Mean and variance of all rewards that each group of people has had so far (P-GRPO, arXiv 2603.10009).

    A reward is compared with those that its group is used to, on any prompt, instead of those of one prompt alone. So a
    group whose rewards hardly vary is not drowned by one whose rewards do. There is no forgetting, and nothing to set:
    the history changes ever more slowly, and while the policy still improves, it lags behind.

    Args:
        size: G.
    """

    def __init__(self, size: int) -> None:
        self.count_G, self.mean_G, self.square_G = np.zeros((3, size))

    def add(self, reward_N: Array, group_N: Indices) -> None:
        """Add rewards (nan: none) to the history of their groups, as Chan, Golub and LeVeque (1979) join two samples:
        squares of differences from the mean, never differences of squares.
        """
        for group in np.unique(group_N):
            new = reward_N[(group_N == group) & ~np.isnan(reward_N)]
            if not len(new):
                continue
            before, count = self.count_G[group], self.count_G[group] + len(new)
            gap = new.mean() - self.mean_G[group]
            self.mean_G[group] += gap * len(new) / count
            self.square_G[group] += np.square(new - new.mean()).sum() + gap**2 * before * len(new) / count
            self.count_G[group] = count

    def advantages(self, reward_N: Array, group_N: Indices, scale: Literal["group", "batch", "none"]) -> Array:
        """[N] A = (r - mean of its group so far) / (s + 1e-4).

        Args:
            reward_N: nan for completions left out, which get 0, as those of groups with less than two rewards so far.
            group_N: of each.
            scale: s is the standard deviation (unbiased) of the group so far (``group``) or of these N (``batch``);
                ``none`` divides by nothing.
        """
        count_N = self.count_G[group_N]
        advantage_N = np.where(count_N < 2, np.nan, reward_N - self.mean_G[group_N])
        if scale == "group":
            advantage_N = advantage_N / (np.sqrt(self.square_G[group_N] / np.maximum(count_N - 1, 1)) + _EPSILON)
        elif scale == "batch":
            advantage_N = advantage_N / (std(reward_N) + _EPSILON)
        return np.nan_to_num(advantage_N, nan=0.0)

    def state(self) -> dict[str, Tensor]:
        """Three float64 tensors [G]."""
        return {
            "history_count": torch.from_numpy(self.count_G.copy()),
            "history_mean": torch.from_numpy(self.mean_G.copy()),
            "history_square": torch.from_numpy(self.square_G.copy()),
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what :meth:`state` gave."""
        self.count_G, self.mean_G, self.square_G = (
            tensors[f"history_{name}"].cpu().numpy().copy() for name in ("count", "mean", "square")
        )


class Robust:
    """Weights of groups of people that grow where rewards are low (group DRO, arXiv 1911.08731, by exponentiated
    gradient).

    After each rollout q_g grows by a factor exp(step * loss_g) and is normalised, with loss_g minus the mean reward of
    the group in this rollout. A group without a reward keeps its q up to the normalisation.

    Args:
        size: G.
        step: step size.
    """

    def __init__(self, size: int, step: float) -> None:
        self.log_q_G = np.full(size, -np.log(size))
        self.step = step

    def weights(self, reward_N: Array, group_N: Indices) -> Array:
        """Learn from these rewards, then give the weight of each completion's advantage.

        Args:
            reward_N: nan for completions left out.
            group_N: of each.

        Returns:
            [N] q of its group, divided by the mean q of the completions that are not left out: their mean weight is 1,
            so that the size of a step does not change.
        """
        for group in np.unique(group_N):
            loss = -mean(reward_N[group_N == group])
            if loss == loss:
                self.log_q_G[group] += self.step * loss
        largest = self.log_q_G.max()
        self.log_q_G -= largest + np.log(np.exp(self.log_q_G - largest).sum())
        q_N = np.exp(self.log_q_G[group_N])
        known_N = ~np.isnan(reward_N)
        return q_N / q_N[known_N].mean() if known_N.any() else np.ones_like(q_N)

    def relative(self) -> Array:
        """[G] q times G: 1 where all groups weigh the same."""
        return np.exp(self.log_q_G) * len(self.log_q_G)

    def state(self) -> dict[str, Tensor]:
        """One float64 tensor [G]."""
        return {"robust_log_q": torch.from_numpy(self.log_q_G.copy())}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what :meth:`state` gave."""
        self.log_q_G = tensors["robust_log_q"].cpu().numpy().copy()


def mean(values: Array) -> float:
    """Mean of the numbers that are not nan; nan where there are none."""
    return float(_mean(values.reshape(1, -1))[0, 0])


def std(values: Array) -> float:
    """Standard deviation (unbiased) of the numbers that are not nan; nan for less than two."""
    return float(_std(values.reshape(1, -1))[0, 0])


def _mean(values_RS: Array) -> Array:
    known_RS = ~np.isnan(values_RS)
    count_R1 = known_RS.sum(axis=1, keepdims=True)
    total_R1 = np.where(known_RS, values_RS, 0.0).sum(axis=1, keepdims=True)
    return np.where(count_R1 > 0, total_R1 / np.maximum(count_R1, 1), np.nan)


def _std(values_RS: Array) -> Array:
    known_RS = ~np.isnan(values_RS)
    count_R1 = known_RS.sum(axis=1, keepdims=True)
    square_R1 = np.where(known_RS, np.square(values_RS - _mean(values_RS)), 0.0).sum(axis=1, keepdims=True)
    return np.where(count_R1 > 1, np.sqrt(square_R1 / np.maximum(count_R1 - 1, 1)), np.nan)
