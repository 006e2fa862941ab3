"""Direct preference optimisation, conditional on the profile (DPO, arXiv 2305.18290, Eq. 7).

Of each pair the model reads both answers in one forward, for the same profile. delta is the difference of the two
log-ratios between policy and reference, and z = beta * delta the logit of the probability that the person prefers the
chosen answer::

    delta = (log p(chosen) - log r(chosen)) - (log p(rejected) - log r(rejected)) - shift / beta
    loss  = label * l(delta) + (1 - label) * l(-delta)

    sigmoid   l = -log s(z), with label_smoothing e: -(1 - e) log s(z) - e log s(-z) (conservative DPO)
    robust    l = (-(1 - e) log s(z) + e log s(-z)) / (1 - 2 e)                      (arXiv 2403.00409)
    hinge     l = max(0, 1 - z)                                                       (arXiv 2309.06657, as TRL)
    ipo       l = (delta - 1 / (2 beta))^2                                            (arXiv 2310.12036, Eq. 17)

The label is 1, but for soft labels. With ``length_normalised`` each log-ratio is divided by the tokens of its answer.
TRL divides always for ipo (which the authors of IPO confirmed to it), and calls the divided sigmoid ``sigmoid_norm``.

Shapes: B sequences, K kept positions, V vocabulary, P pairs, M rows of split train.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cuma_ds.config import DpoSection, RunConfig
from cuma_ds.data.batch import Batch, Unit, encode_pair
from cuma_ds.data.prepared import PreparedData
from cuma_ds.data.rendering import Renderer
from cuma_ds.data.rows import Row
from cuma_ds.parallel.agreement import agreement
from cuma_ds.training.groups import Groups
from cuma_ds.training.objectives.pairs import pair_values
from cuma_ds.training.objectives.protocol import Begin, Loss, Objective
from cuma_ds.training.objectives.reference import answer_log_probabilities, reference_log_probabilities

if TYPE_CHECKING:
    from cuma_ds.training.inputs import BatchSource


class Dpo(Objective):
    """Learns from pairs of answers; a unit is the chosen and the rejected answer."""

    reads: Sequence[str] = ("preference",)

    def __init__(self, config: RunConfig) -> None:
        assert config.dpo is not None
        self._dpo = config.dpo
        self._groups: Groups | None = None

    def check(self, config: RunConfig, data: PreparedData, renderer: Renderer) -> None:
        """See :class:`Objective`."""
        super().check(config, data, renderer)
        pair_values(data, config)

    def unit(self, row: Row, renderer: Renderer, sentences: Sequence[str]) -> Unit:
        """The chosen and the rejected answer, see :func:`~cuma_ds.data.batch.encode_pair`."""
        return encode_pair(row, renderer, sentences)

    def begin(self, begin: Begin) -> PairBatches:
        """The stream of pairs, with what the reference says of each. It is computed first where it is not known."""
        with agreement():
            self._groups = Groups.of(begin.config, begin.inputs.data)
            values = pair_values(begin.inputs.data, begin.config)
        bare = self._dpo.reference == "base"
        reference_M2 = reference_log_probabilities(begin, bare, self._log_probabilities)
        return PairBatches(begin.inputs.batches, {**values, "reference": reference_M2})

    def weight(self, batch: Batch) -> float:
        """Sum of the weights of the pairs: their number, but with ``dpo.margin: weight``."""
        return float(batch.extras["weight"].sum(dtype=torch.float64))

    def loss(self, logits_BKV: Tensor, batch: Batch) -> Loss:
        """The loss of the pairs of a batch of :class:`PairBatches`, and metrics with TRL's names.

        ``rewards/*`` are beta times the log-ratios of policy and reference, summed over tokens. ``kl`` is the mean of
        the log-ratios over both answers of the data: an estimate of how far the policy went, on answers that it did not
        write itself. All metrics are means over pairs that count alike.
        """
        dpo, pairs = self._dpo, len(batch.rows)
        log_p_L, given = batch.targets.log_probabilities(logits_BKV), batch.extras
        log_p_P2, length_P2 = answer_log_probabilities(log_p_L, batch.targets, pairs, dpo.ld_alpha)
        ratio_P2 = log_p_P2 - given["reference"]
        chosen_P, rejected_P = (ratio_P2 / length_P2 if dpo.length_normalised else ratio_P2).unbind(dim=1)
        loss_P = pair_loss(chosen_P - rejected_P - given["shift"] / dpo.beta, given["label"], dpo)
        metrics = _metrics(log_p_P2.detach(), ratio_P2.detach(), dpo.beta)
        if dpo.sft_weight:
            whole_P2 = answer_log_probabilities(log_p_L, batch.targets, pairs).log_p_P2
            sft_P = -whole_P2[:, 0] / length_P2[:, 0]
            loss_P = loss_P + dpo.sft_weight * sft_P
            metrics["sft_loss"] = sft_P.detach()
        number = log_p_P2.new_tensor(pairs)
        means = {name: torch.stack([value_P.sum(), number]) for name, value_P in metrics.items()}
        if self._groups is not None:
            profile_P = batch.profile_rows_N[: 2 * pairs : 2]
            for name in ("rewards/accuracies", "rewards/margins"):
                means |= self._groups.means(name, metrics[name], profile_P)
        return Loss((given["weight"] * loss_P).sum(), means=means)

    def _log_probabilities(self, logits_BKV: Tensor, batch: Batch) -> Tensor:
        """[P, 2] as the loss takes them of the policy."""
        log_p_L = batch.targets.log_probabilities(logits_BKV)
        return answer_log_probabilities(log_p_L, batch.targets, len(batch.rows), self._dpo.ld_alpha).log_p_P2


def pair_loss(delta_P: Tensor, label_P: Tensor, dpo: DpoSection) -> Tensor:
    """[P] loss of each pair, without gradients for the label; see the head of this file.

    Args:
        delta_P: [P] how much more the policy prefers the chosen answer than the reference does, in nats.
        label_P: [P] probability that the chosen answer is the preferred one.
        dpo: beta, loss and label_smoothing.
    """
    return label_P * _loss_of_sure(delta_P, dpo) + (1 - label_P) * _loss_of_sure(-delta_P, dpo)


def _loss_of_sure(delta_P: Tensor, dpo: DpoSection) -> Tensor:
    """[P] l(delta)."""
    z_P, noise = dpo.beta * delta_P, dpo.label_smoothing
    match dpo.loss:
        case "sigmoid":
            return -(1 - noise) * logsigmoid(z_P) - noise * logsigmoid(-z_P)
        case "robust":
            return (-(1 - noise) * logsigmoid(z_P) + noise * logsigmoid(-z_P)) / (1 - 2 * noise)
        case "hinge":
            return torch.relu(1 - z_P)
        case "ipo":
            return (delta_P - 1 / (2 * dpo.beta)) ** 2


def _metrics(log_p_P2: Tensor, ratio_P2: Tensor, beta: float) -> dict[str, Tensor]:
    """[P] each, by TRL's names."""
    (chosen_P, rejected_P), (log_p_chosen_P, log_p_rejected_P) = (beta * ratio_P2).T, log_p_P2.T
    return {
        "rewards/chosen": chosen_P,
        "rewards/rejected": rejected_P,
        "rewards/margins": chosen_P - rejected_P,
        "rewards/accuracies": (chosen_P > rejected_P).to(chosen_P.dtype),
        "logps/chosen": log_p_chosen_P,
        "logps/rejected": log_p_rejected_P,
        "kl": ratio_P2.mean(dim=1),
    }


class PairBatches:
    """The batches of a stream, with values of each pair in ``Batch.extras``.

    Args:
        stream: of pairs.
        values: [M, ...] of each row by name: ``reference`` [M, 2], and ``label``, ``weight`` and ``shift`` [M].
    """

    def __init__(self, stream: BatchSource, values: Mapping[str, Tensor]) -> None:
        self._stream, self._values = stream, values

    def step(self, number: int) -> list[Batch]:
        """This rank's micro batches of step ``number`` (from 0)."""
        return [self._with_values(batch) for batch in self._stream.step(number)]

    def _with_values(self, batch: Batch) -> Batch:
        extras = {name: value_M[list(batch.rows)] for name, value_M in self._values.items()}
        return dataclasses.replace(batch, extras={**batch.extras, **extras})
