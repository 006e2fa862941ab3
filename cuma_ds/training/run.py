"""One training run, from a recipe to checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from cuma_ds.config import NOTHING_TRAINS, RunConfig
from cuma_ds.data.batch import Batch
from cuma_ds.errors import CheckpointError, ConfigError
from cuma_ds.files import write_atomically
from cuma_ds.incident import doing, ended, outcome_goes_to, tracebacks_go_to
from cuma_ds.learned_settings import fingerprint
from cuma_ds.methods import METHODS
from cuma_ds.parallel.agreement import agreement
from cuma_ds.parallel.backbone import full_bytes, resident_bytes, skeleton
from cuma_ds.parallel.checkpoint import load_checkpoint, load_start
from cuma_ds.parallel.ds_config import read_deepspeed_config
from cuma_ds.parallel.engine import AdapterEngine
from cuma_ds.parallel.stored import (
    check_checkpoint,
    find_checkpoint,
    has_checkpoint,
    newest_whole,
    read_beside,
    set_damaged_aside,
    write_untrained,
)
from cuma_ds.parallel.topology import Topology, wait_for_peers_at_most
from cuma_ds.profiles import ProfileTable
from cuma_ds.runs import Run
from cuma_ds.telemetry.progress import phase
from cuma_ds.telemetry.screen import libraries_go_to, say
from cuma_ds.telemetry.writer import last_step
from cuma_ds.training.inputs import TrainingInputs, load_inputs, prepare_run
from cuma_ds.training.loop import Loop, Say
from cuma_ds.training.objectives.protocol import Begin, Objective
from cuma_ds.training.optimizer import make_optimizer
from cuma_ds.training.packing import tells_examples_apart
from cuma_ds.training.schedule import with_steps
from cuma_ds.training.start import with_start


def train(config: RunConfig, topology: Topology, say: Say = say) -> Path:
    """Run (or resume) what the recipe says, on all ranks together.

    Args:
        config: the recipe.
        topology: of this rank, with expert-parallel groups.
        say: prints a line; called on the main rank alone.

    Returns:
        The run folder.

    Raises:
        CumaError: the same one line on every rank.
    """
    tell, run = say if topology.is_main else (lambda _: None), Run(config.run_dir)
    tracebacks_go_to(run.errors)
    doing("the preparation")
    with contextlib.ExitStack() as stack:
        with agreement():
            if topology.is_main:
                stack.enter_context(run.locked())
                outcome_goes_to(run.outcome)
        _train(config, run, topology, tell)
        ended("complete")
    return run.folder


def _train(config: RunConfig, run: Run, topology: Topology, tell: Say) -> None:
    with agreement():
        config = with_start(run.as_started(config))
    visible = topology.is_main and config.telemetry.progress
    with phase("preparing data and profiles", visible):
        prepare_run(config, topology, tell)
    if config.adapters.method in NOTHING_TRAINS:
        with agreement():
            if topology.is_main:
                _leave_untrained(config, run, tell)
        return
    libraries_go_to(run.logs / f"rank-{topology.rank}.log")
    with agreement():
        run.check_start(content=topology.is_main)
        if topology.local_rank == 0 and not topology.is_main:
            run.check_backbone(config, run.identity())  # each machine may hold a copy of its own
        inputs = load_inputs(config, topology)
        config = with_steps(config, inputs.draw.n_rows)
        settings = read_deepspeed_config(config, *inputs.objective.layout(inputs.draw), topology.world)
        sized = with_profile_width(config, inputs.table)
        METHODS[config.adapters.method].check(skeleton(config.model), sized)
        if topology.is_main:
            _check_newest(config, run)
            write_atomically(run.deepspeed, json.dumps(settings.engine, indent=2) + "\n")
    doing("loading the model")
    with phase("loading the model", visible):
        engine = AdapterEngine(sized, settings, topology, lambda groups: make_optimizer(groups, config.training))
    wait_for_peers_at_most(config.parallel.timeout_seconds)
    profiles_NP = None if inputs.table is None else inputs.table.embeddings[inputs.profiles]
    engine.model.prepare(profiles_NP, inputs.group_mask)
    if config.model.init_from is not None:
        load_start(engine, run.start)
        tell(f"starting from {config.model.init_from}, as it is in {run.start}")
    batches = inputs.objective.begin(Begin(config, engine, inputs, run, tell))
    inputs = dataclasses.replace(inputs, batches=batches)
    start = _resume(run, engine, inputs.objective, tell)
    if config.data.packing:
        _check_packing(config, engine, inputs)
    _describe(config, engine, inputs, tell)
    if (epochs := config.training.epochs) is not None:
        tell(f"{epochs:g} epochs of {inputs.draw.n_rows} training examples are {config.training.steps} steps")
    if start < config.training.steps:
        folder = Loop(config, engine, inputs, tell).run(range(start, config.training.steps))
        size, trained = sum(file.stat().st_size for file in folder.iterdir()), engine.trained_parameters
        tell(
            f"checkpoint {folder}: {size / 1e6:.1f} MB, {trained / 1e6:.2f} M trained parameters with two moments "
            f"in float32 are {12 * trained / 1e6:.1f} MB"
        )
    else:
        tell(f"{run.folder} is complete at step {start}; nothing to do (to go on, raise its steps or epochs)")


def _check_newest(config: RunConfig, run: Run) -> None:
    """See that there is a whole checkpoint of this run to go on from, or none at all. Newer ones are set aside."""
    if has_checkpoint(run.checkpoints):
        newest, _ = newest_whole(run.checkpoints)
        check_checkpoint(newest, run.known_fingerprints(config), run.identity(), content=False)
        set_damaged_aside(run.checkpoints, newest)
    elif 0 < config.checkpoint.every < (reached := last_step(run.metrics)):
        raise CheckpointError(
            f"{run.metrics} says that step {reached} was reached, but {run.checkpoints} holds no checkpoint; restore "
            "it from a copy, or choose another run.name"
        )


def _leave_untrained(config: RunConfig, run: Run, tell: Say) -> None:
    """Complete the folder of a run whose method trains nothing, so that it can be evaluated and asked like others."""
    if has_checkpoint(run.checkpoints):
        check_checkpoint(find_checkpoint(run.checkpoints), run.known_fingerprints(config), run.identity())
    else:
        write_untrained(run.checkpoints, {"fingerprint": fingerprint(config), "identity": run.identity()})
    tell(f"{run.folder} is complete: method {config.adapters.method} trains nothing (0 trained parameters)")


def with_profile_width(config: RunConfig, table: ProfileTable | None) -> RunConfig:
    """The recipe with ``adapters.profile_dim`` taken from the encoder.

    Raises:
        ConfigError: the recipe asks for another width.
    """
    width = 0 if table is None else table.embeddings.shape[1]
    if config.adapters.profile_dim not in (0, width):
        raise ConfigError(
            f"adapters.profile_dim is {config.adapters.profile_dim}, but the encoder's embeddings have width "
            f"{width}; leave it out"
        )
    return config.model_copy(update={"adapters": config.adapters.model_copy(update={"profile_dim": width})})


def _resume(run: Run, engine: AdapterEngine, objective: Objective, tell: Say) -> int:
    """Load the newest checkpoint; the number of steps that are done."""
    if not has_checkpoint(run.checkpoints):
        return 0
    newest = find_checkpoint(run.checkpoints)
    step = load_checkpoint(engine, newest)
    objective.load_state(read_beside(newest))
    tell(f"resuming {run.folder} after step {step}")
    return step


def _check_packing(config: RunConfig, engine: AdapterEngine, inputs: TrainingInputs) -> None:
    """Refuse ``data.packing`` for a model that does not tell the examples of one row apart."""

    def logits_of(batch: Batch) -> Tensor:
        return engine.forward(batch, inputs.table).logits.cpu()

    engine.train(False)
    apart = tells_examples_apart(logits_of, inputs.probe, inputs.pad_id)
    engine.train()
    engine.take_bytes_sent()  # not of a step
    with agreement():
        if not apart:
            raise ConfigError(
                f"data.packing is true, but {config.model.path} does not tell the examples of one row apart "
                "(measured: behind another example, one is answered otherwise than alone); set data.packing: false"
            )


def _describe(config: RunConfig, engine: AdapterEngine, inputs: TrainingInputs, tell: Say) -> None:
    base, (micro, accumulation) = engine.model.backbone, inputs.objective.layout(inputs.draw)
    held, full = resident_bytes(base), full_bytes(base)
    trained, numbers = engine.trained_parameters, engine.backbone_parameters
    tell(
        f"method {config.adapters.method}: {trained:,} trained parameters, {trained / numbers:.2%} of the backbone's "
        f"{numbers:,}"
    )
    tell(
        f"{engine.topology}, ZeRO stage {engine.stage}; backbone {held / 1e6:.1f} MB of {full / 1e6:.1f} MB per rank; "
        f"experts {engine.expert_bytes / 1e6:.2f} MB per rank; {inputs.draw.n_rows} training examples; "
        f"{accumulation} x {micro} examples per rank and step"
    )
    dist.barrier()
