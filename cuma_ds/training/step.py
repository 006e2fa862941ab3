"""One optimizer step of any objective: forward and backward of its micro batches, and sums over them and over all
ranks.

Shapes: R routers, E experts.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cuma_ds.config import RunConfig
from cuma_ds.incident import alive
from cuma_ds.parallel.engine import AdapterEngine
from cuma_ds.parallel.topology import Topology
from cuma_ds.parallel.watch import stop_requested
from cuma_ds.training.inputs import TrainingInputs
from cuma_ds.training.schedule import learning_rate

Fault = Literal["loss", "gradient", "update"]


class StepResult(NamedTuple):
    """What one optimizer step did, over all micro batches and ranks.

    Attributes:
        rate: learning rate.
        weight: what sums of the objective are divided by for the mean over the global batch.
        tokens: real tokens.
        people: answers or conversations behind the examples.
        sums: tensors on the device, float64. ``loss`` and the objective's metrics; ``balance``, the load-balance loss
            summed over ranks; and with routers ``load_RE`` (top-k assignments), ``entropy_R`` (gate entropy in nats)
            and ``routed`` (tokens).
        means: [2] float64 each, a sum and the number of what was summed; see :class:`Loss`.
        bytes_sent: by this rank, see :meth:`AdapterEngine.take_bytes_sent`.
        loss: mean over the global batch.
        fault: what is not finite: the ``loss``, the ``gradient`` (the update has been left out then), or trained
            parameters and moments after the ``update``; None where all is well. Equal on all ranks.
        stopping: a rank was told to stop. Equal on all ranks.
    """

    rate: float
    weight: float
    tokens: float
    people: float
    sums: dict[str, Tensor]
    means: dict[str, Tensor]
    bytes_sent: dict[str, int]
    loss: float
    fault: Fault | None
    stopping: bool


def run_step(config: RunConfig, engine: AdapterEngine, inputs: TrainingInputs, step: int) -> StepResult:
    """Learn from the batches of one step (from 0); all ranks call it together."""
    topology, objective = engine.topology, inputs.objective
    batches, rate = inputs.batches.step(step), learning_rate(step, config.training)
    own = [
        sum(objective.weight(batch) for batch in batches),
        sum(batch.real_tokens for batch in batches),
        float(sum(inputs.people[row] for batch in batches for row in batch.rows)),
    ]
    weight, tokens, people = topology.sum_over_ranks(
        torch.tensor(own, dtype=torch.float64, device=topology.device)
    ).tolist()
    weight = weight or 1.0  # nothing is learned, e.g. because all completions are masked
    # DeepSpeed takes the mean over micro steps and ranks; what is multiplied by their number is a sum in the end.
    parts = topology.world * len(batches)
    sums: dict[str, Tensor] = {}
    means: dict[str, Tensor] = {}
    for micro_step, batch in enumerate(batches):
        torch.manual_seed(dropout_seed(config.run.seed, step, micro_step, topology.rank))
        out = engine.forward(batch, inputs.table)
        found = objective.loss(out.logits, batch.to(topology.device))
        loss = found.sum * (parts / weight)
        balance = out.balance_loss
        if balance is not None:
            if config.adapters.balance_scope == "run":
                # A mean over this micro batch's tokens; weighted by them it becomes the mean over the step's.
                balance = balance * (parts * batch.real_tokens / tokens)
            loss = loss + config.adapters.balance_weight * balance
            _add(sums, "balance", balance / len(batches))
        engine.backward(loss)
        engine.step(rate)
        for name, value in {"loss": found.sum, **found.metrics}.items():
            _add(sums, name, value)
        for name, value in found.means.items():
            _add(means, name, value)
        if out.routing is not None:
            _add(sums, "load_RE", out.routing.load_RE.double())
            _add(sums, "entropy_R", out.routing.entropy_R.double())
            _add(sums, "routed", out.routing.tokens.double())
        alive()
    # What ranks must agree on travels with the sums.
    sums["told_to_stop"] = torch.tensor(float(stop_requested()), device=topology.device)
    sums["broken"] = (~engine.trained_state_is_finite()).float()
    sums, means = _over_ranks(sums, topology), _over_ranks(means, topology)
    loss, told_to_stop, broken = torch.stack([sums[name] for name in ("loss", "told_to_stop", "broken")]).tolist()
    del sums["told_to_stop"], sums["broken"]
    fault = _fault(loss, engine.left_update_out and config.model.dtype != "float16", broken > 0)
    if fault is None:
        engine.model.end_step(sums.get("load_RE"))
    sent, stopping = engine.take_bytes_sent(), told_to_stop > 0
    return StepResult(rate, weight, tokens, people, sums, means, sent, loss / weight, fault, stopping)


def _fault(loss: float, left_out: bool, broken: bool) -> Fault | None:
    """What is not finite. In float16 an update that is left out is none: so the loss scale is found."""
    if not math.isfinite(loss):
        return "loss"
    if left_out:
        return "gradient"
    return "update" if broken else None


def dropout_seed(run_seed: int, step: int, micro_step: int, rank: int) -> int:
    """Seed of torch's generators before one micro batch, so that resuming needs no generator state.

    It is the first 63 bits that ``numpy.random.SeedSequence([run_seed, step, micro_step, rank])`` generates: a fixed
    mix of the four integers, the same on every machine, in every version of numpy and of Python.
    """
    return int(
        np.random.SeedSequence([run_seed, step, micro_step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1)
    )


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    value = value.detach()
    sums[name] = sums[name] + value if name in sums else value


def _over_ranks(sums: dict[str, Tensor], topology: Topology) -> dict[str, Tensor]:
    """The same tensors in float64, each summed over all ranks, with one collective."""
    if not sums:
        return {}
    total = topology.sum_over_ranks(torch.cat([value.double().flatten() for value in sums.values()]))
    parts = total.split([value.numel() for value in sums.values()])
    return {name: part.view_as(value) for (name, value), part in zip(sums.items(), parts, strict=True)}
