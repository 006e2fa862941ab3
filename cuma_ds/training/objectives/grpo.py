"""Group relative policy optimisation: the model's own answers, each compared with the others to the same prompt.

The definitions are those of TRL's ``GRPOTrainer``. Its means are taken over one device's micro batch; the denominators
here are those of the whole step, so that the loss does not depend on how it is cut.

Shapes: B sequences, K kept positions, V vocabulary, L labels (tokens of completions).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cuma_ds.config import RunConfig
from cuma_ds.data.asked import encode_asked
from cuma_ds.data.batch import Batch, EncodedExample, Unit
from cuma_ds.data.prepared import PreparedData
from cuma_ds.data.rendering import Renderer
from cuma_ds.data.rows import Row
from cuma_ds.data.stream import Draw
from cuma_ds.training.objectives.protocol import Begin, Loss, Objective
from cuma_ds.training.rollout.rewards import Rewards
from cuma_ds.training.rollout.rollouts import Rollouts

if TYPE_CHECKING:
    from cuma_ds.training.inputs import BatchSource


class Grpo(Objective):
    """Learns from rewards of the model's own answers; a unit is one completion.

    ``Batch.extras`` holds, for each label, ``completion_L`` (int64, its completion's number in the batch; -1 for
    fillers), ``advantage_L``, with several iterations ``old_L`` (log-probabilities before the first of them), and with
    a KL weight ``reference_L`` (those under the reference). Label weights are 1, and 0 for completions that are masked.
    """

    reads: Sequence[str] = ("choice", "chat", "preference")

    def __init__(self, config: RunConfig) -> None:
        assert config.grpo is not None
        assert config.rollout is not None
        self._grpo, self._rollout = config.grpo, config.rollout
        self._limit = config.data.max_length - config.rollout.max_new_tokens
        self._rollouts: Rollouts | None = None

    def check(self, config: RunConfig, data: PreparedData, renderer: Renderer) -> None:
        """See :class:`Objective`. Whether a judge answers is asked later, at each start."""
        super().check(config, data, renderer)
        Rewards(config, data, renderer)

    def unit(self, row: Row, renderer: Renderer, sentences: Sequence[str]) -> Unit:
        """The row's prompt, with nothing to learn yet."""
        profile = int(row["profile"])
        ids = encode_asked(row, renderer, sentences[profile], self._limit)
        return (EncodedExample(ids, [len(ids) - 1], [0], [0.0], profile),)

    def layout(self, draw: Draw) -> tuple[int, int]:
        """Completions of each micro batch and the number of micro batches. A prompt stays on one rank."""
        completions = -(-draw.global_batch_size // draw.world) * self._grpo.group_size
        accumulation = -(-completions // draw.micro_batch_size)
        return -(-completions // accumulation), accumulation

    def begin(self, begin: Begin) -> BatchSource:
        """Rollouts of the policy in the engine."""
        self._rollouts = Rollouts(begin, self.layout(begin.inputs.draw))
        return self._rollouts

    def weight(self, batch: Batch) -> float:
        """Tokens of completions (dapo), completions (grpo), or completions times their longest length (dr_grpo)."""
        if self._grpo.loss == "dapo":
            return batch.weight_sum
        completions = float(batch.extras["completion_L"].max()) + 1
        return completions if self._grpo.loss == "grpo" else completions * self._rollout.max_new_tokens

    def loss(self, logits_BKV: Tensor, batch: Batch) -> Loss:
        """Sum over tokens of the clipped policy loss and the weighted KL divergence, see :func:`clipped_loss`."""
        log_p_L, entropy_L = batch.targets.scores(logits_BKV, self._rollout.temperature)
        mask_L, extras = batch.targets.weight_L.to(log_p_L.dtype), batch.extras
        ratio_L = (log_p_L - extras.get("old_L", log_p_L.detach())).exp()
        low, high = 1 - self._grpo.epsilon, 1 + (self._grpo.epsilon_high or self._grpo.epsilon)
        loss_L = clipped_loss(ratio_L, extras["advantage_L"], low, high)
        seen: dict[str, Tensor] = {"entropy": entropy_L}
        if self._grpo.kl_weight:
            seen["kl"] = k3(log_p_L, extras["reference_L"])
            loss_L = loss_L + self._grpo.kl_weight * seen["kl"]
        share_L = mask_L
        if self._grpo.loss == "grpo":
            share_L = mask_L / tokens_of_completion(mask_L, extras["completion_L"]).clamp(min=1)
        seen["clip_ratio/low_mean"] = (ratio_L < low) & (extras["advantage_L"] < 0)
        seen["clip_ratio/high_mean"] = (ratio_L > high) & (extras["advantage_L"] > 0)
        seen["clip_ratio/region_mean"] = seen["clip_ratio/low_mean"] | seen["clip_ratio/high_mean"]
        tokens = mask_L.sum()
        means = {name: torch.stack([(value_L * mask_L).sum(), tokens]).detach() for name, value_L in seen.items()}
        return Loss((loss_L * share_L).sum(), means=means)

    def report(self) -> Mapping[str, float]:
        """Numbers of the rollout that the step learned from, and how long each part took."""
        return {} if self._rollouts is None else self._rollouts.report()

    def state(self) -> dict[str, Tensor]:
        """What the advantages remember of earlier rollouts."""
        return {} if self._rollouts is None else self._rollouts.advantages.state()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """See :meth:`Objective.load_state`."""
        assert self._rollouts is not None
        self._rollouts.advantages.load_state(tensors)


def clipped_loss(ratio_L: Tensor, advantage_L: Tensor, low: float, high: float) -> Tensor:
    """[L] -min(r A, clip(r, low, high) A), the clipped surrogate of PPO (Schulman et al. 2017, equation 7).

    Args:
        ratio_L: probability of each token under the policy, divided by that when it was sampled.
        advantage_L: of its completion.
        low, high: limits of the ratio.
    """
    return -torch.min(ratio_L * advantage_L, ratio_L.clamp(low, high) * advantage_L)


def k3(log_p_L: Tensor, reference_L: Tensor) -> Tensor:
    """[L] estimate of the KL divergence from the reference: exp(d) - d - 1 with d = reference - policy (GRPO, Shao et
    al. 2024, equation 4).
    """
    difference_L = reference_L - log_p_L
    return difference_L.exp() - difference_L - 1


def tokens_of_completion(mask_L: Tensor, completion_L: Tensor) -> Tensor:
    """[L] number of unmasked tokens in the completion of each token."""
    place_L = completion_L.clamp(min=0)  # fillers have weight 0 wherever they are counted
    return mask_L.new_zeros(int(place_L.max()) + 1).index_add(0, place_L, mask_L)[place_L]
