"""Where the first number that is not finite came from: which micro batch and rows, which layer, which file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cuma_ds.config import RunConfig
from cuma_ds.data.batch import Batch
from cuma_ds.parallel import deepspeed_compat as compat
from cuma_ds.parallel.backbone import file_of_weight
from cuma_ds.parallel.engine import AdapterEngine
from cuma_ds.torch_compat import tensors_in
from cuma_ds.training.inputs import TrainingInputs
from cuma_ds.training.step import dropout_seed


class _Found(NamedTuple):
    """place: sorts what ranks found; the earliest counts.  what: in words."""

    place: tuple[int, int, int]
    what: str


def find_cause(engine: AdapterEngine, inputs: TrainingInputs, config: RunConfig, step: int, fault: str) -> str:
    """What is not finite, in words that hold no data; all ranks call it and get the same.

    The forwards of the step are run once more and every layer is looked at. The update of a step whose loss or
    gradient is not finite has been left out, so they see the same parameters.

    Args:
        engine: after the step.
        inputs: of the run.
        config: the recipe.
        step: from 0.
        fault: ``loss``, ``gradient`` or ``update``.
    """
    if fault == "update":
        return _broken_parameter(engine)
    own = None
    for micro_step, batch in enumerate(inputs.batches.step(step)):
        torch.manual_seed(dropout_seed(config.run.seed, step, micro_step, engine.topology.rank))
        found = _in_forward(engine, inputs, config, batch, micro_step)
        own = own or found
    engine.take_bytes_sent()  # not of a step
    every: list[_Found | None] = [None] * engine.topology.world
    dist.all_gather_object(every, own)
    known = sorted(one for one in every if one is not None)
    return known[0].what if known else f"the {fault} is not finite, although every layer's output is"


def _in_forward(
    engine: AdapterEngine, inputs: TrainingInputs, config: RunConfig, batch: Batch, micro_step: int
) -> _Found | None:
    """The first layer whose output is not finite, else the loss or its gradient."""
    stage_3, rows = engine.stage == 3, _rows(batch.rows)
    with _watching(engine.model) as seen:
        out = engine.forward_alone(batch, inputs.table)
        loss = inputs.objective.loss(out.logits, batch.to(engine.topology.device)).sum
    names, gradients = [one.name for one in engine.trained], []
    if not stage_3:
        parameters = [one.parameter for one in engine.trained]
        gradients = list(torch.autograd.grad(loss, parameters, allow_unused=True))
        engine.after_backward()
    if seen:
        name, module, order = seen[0]
        if config.training.objective == "sft" and not config.data.packing:  # one sequence a row
            rows = _rows([row for row, logits in zip(batch.rows, out.logits, strict=False) if not _finite(logits)])
        what = f"the output of {name} is not finite{_of_weights(module, name, config)}"
        return _Found((micro_step, 0, order), f"{what}, in {rows}")
    if not _finite(loss):
        return _Found((micro_step, 1, 0), f"the loss of {rows} is {loss.item()}, although the logits are finite")
    for place, (name, gradient) in enumerate(zip(names, gradients, strict=False)):
        if gradient is not None and not _finite(gradient):
            return _Found((micro_step, 2, place), f"the gradient of {name} is not finite, in {rows}")
    return None


@contextlib.contextmanager
def _watching(model: nn.Module) -> Iterator[list[tuple[str, nn.Module, int]]]:
    """Inside, the first module whose output is not finite is noted, with its name and its place in the forward."""
    seen: list[tuple[str, nn.Module, int]] = []
    order = 0

    def hook(name: str, module: nn.Module, output: object) -> None:
        nonlocal order
        order += 1
        if not seen and not all(_finite(tensor) for tensor in tensors_in(output) if tensor.is_floating_point()):
            seen.append((name, module, order))

    handles = [
        module.register_forward_hook(lambda module, _, output, name=name: hook(name, module, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _of_weights(module: nn.Module, name: str, config: RunConfig) -> str:
    """Whose own weights are not finite, and the file they came from."""
    for own, parameter in module.named_parameters():
        if not _finite(compat.held(parameter)):
            file = None if parameter.requires_grad else file_of_weight(config.model, f"{name}.{own}")
            where = "" if file is None else f", read from {file}"
            return f": its {own} is not finite{where}"
    return ""


def _broken_parameter(engine: AdapterEngine) -> str:
    """The first trained parameter, or Adam moment, that is not finite."""
    broken = []
    if engine.stage != 3:
        compat.link_moments(engine.engine)
    for trained in engine.trained:
        for moment in (None, *compat.MOMENTS):
            if not _finite(compat.whole_value(trained.parameter, moment)):
                broken.append(trained.name if moment is None else f"{moment} of {trained.name}")
    every: list[list[str]] = [[]] * engine.topology.world
    dist.all_gather_object(every, broken)
    first = next((names[0] for names in every if names), "a trained parameter")
    return f"the update made {first} not finite"


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.detach().isfinite().all())


def _rows(rows: list[int] | tuple[int, ...]) -> str:
    """Rows of the training split in words; the row of a merged example tells nothing about a person."""
    if not rows:
        return "a batch of fillers"
    shown = ", ".join(map(str, sorted(rows)[:5])) + (", ..." if len(rows) > 5 else "")
    return f"row{'s' if len(rows) > 1 else ''} {shown} of split train"
