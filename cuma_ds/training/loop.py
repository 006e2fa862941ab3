"""One training run, from a recipe to checkpoints: the only loop.

Shapes: B sequences of a micro batch, N distinct profiles of it, P profile width, R routers, E experts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cuma_ds.adapters import CumaConfig, RoutingStatistics
from cuma_ds.adapters.inject import find_targets
from cuma_ds.config import RunConfig
from cuma_ds.data import PreparedData, load_data
from cuma_ds.data.batch import Batch, encode_example
from cuma_ds.data.lengths import fitting
from cuma_ds.data.rendering import Renderer
from cuma_ds.data.stream import Draw, Stream
from cuma_ds.errors import ConfigError, CumaError, DataError
from cuma_ds.files import write_atomically
from cuma_ds.identity import base_fact
from cuma_ds.learned_settings import fingerprint
from cuma_ds.parallel.agreement import agreement
from cuma_ds.parallel.backbone import full_bytes, load_tokenizer, resident_bytes, skeleton
from cuma_ds.parallel.checkpoint import load_checkpoint, save_checkpoint
from cuma_ds.parallel.ds_config import DeepSpeedSettings, read_deepspeed_config
from cuma_ds.parallel.engine import AdapterEngine
from cuma_ds.parallel.stored import State, check_checkpoint, find_checkpoint, has_checkpoint
from cuma_ds.parallel.topology import Topology, wait_for_peers_at_most
from cuma_ds.profiles import ProfileEncoder, ProfileTable
from cuma_ds.profiles.groups import group_mask
from cuma_ds.runs import Run
from cuma_ds.telemetry.throughput import Throughput
from cuma_ds.telemetry.writer import MetricsWriter
from cuma_ds.training.objectives.sft import sft_loss
from cuma_ds.training.optimizer import make_optimizer
from cuma_ds.training.packing import tells_examples_apart
from cuma_ds.training.schedule import learning_rate

# In the manifest of a run's own data: the max_length that all its prompts are known to fit.
PROMPTS_CHECKED = "prompts_fit"


@dataclass(frozen=True)
class TrainingInputs:
    """What a run trains on: this rank's batches, and the table of who may ask.

    profiles: rows of the table that training examples have.  people: [rows] answers (choice) or conversations (chat) behind each
    training example.  group_mask: [profiles, E] of ``gradient_mask: groups``, or None.
    """

    stream: Stream
    table: ProfileTable | None
    profiles: np.ndarray
    people: np.ndarray
    group_mask: Tensor | None


def train(config: RunConfig, topology: Topology, say: Callable[[str], None] = print) -> Path:
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
    tell = say if topology.is_main else (lambda _: None)
    run = Run(config.run_dir)
    config = run.as_started(config)
    with agreement():
        if topology.is_main:
            prepare_run(config)
    with agreement():
        if topology.local_rank == 0 and not topology.is_main:
            run.check_backbone(config, run.identity())  # each machine may hold a copy of its own
        inputs = load_inputs(config, topology)
        settings = read_deepspeed_config(
            config, inputs.stream.draw.micro, inputs.stream.draw.accumulation, topology.world
        )
        adapters = with_profile_width(config.adapters, inputs.table)
        find_targets(skeleton(config.model), adapters.target_modules)
        if has_checkpoint(run.checkpoints):
            newest, known = find_checkpoint(run.checkpoints), run.known_fingerprints(config)
            check_checkpoint(newest, known, run.identity(), content=topology.is_main)
        if topology.is_main:
            write_atomically(run.deepspeed, json.dumps(settings.engine, indent=2) + "\n")
    engine = build_engine(config, adapters, settings, topology)
    wait_for_peers_at_most(config.parallel.timeout_seconds)
    if inputs.table is not None:
        engine.model.set_profile_standardisation(inputs.table.embeddings[inputs.profiles], config.profiles.standardise)
    start = _resume(run, engine, tell)
    if config.data.packing:
        _check_packing(config, engine, inputs)
    _describe(config, engine, inputs, tell)
    if start >= config.training.steps:
        tell(f"{run.folder} is complete at step {start}; nothing to do (raise training.steps to go on)")
        return run.folder
    steps = range(start, config.training.steps)
    with MetricsWriter(run.metrics, run.tensorboard, config.telemetry, topology.is_main, steps) as writer:
        _steps(config, engine, inputs, start, writer, tell)
    return run.folder


def prepare_run(config: RunConfig) -> None:
    """Open the run folder and put the data and the embedded profiles there, once; the main rank does it for all."""
    run, source = Run(config.run_dir), None
    if not run.has_data:
        # Before there is a folder: a recipe that is refused can be corrected and started under the same name.
        source = check_prompts(load_data(config.data, config.profiles.template), config, started=False)
    Run.create(config)
    data = run.data() if source is None else source.save(run.data_folder)
    if source is None and PROMPTS_CHECKED not in data.manifest:
        check_prompts(data, config, started=True)
    table = None
    if config.adapters.uses_profiles and run.profiles_file.is_file():
        table = run.profiles(config)
    elif config.adapters.uses_profiles:
        assert config.profiles.encoder is not None
        encoder = ProfileEncoder(config.profiles.encoder, batch_size=config.profiles.batch_size)
        # A prepared folder may hold the embeddings already; the run's copy of its data does not.
        table = (source or data).profile_table(encoder, config.profiles.cache_dir)
        table.save(run.profiles_file)
    run.check_own_data(data, table, run.identity())
    run.record_identity(config, data, table)


def check_prompts(data: PreparedData, config: RunConfig, started: bool) -> PreparedData:
    """The data without rows that are too long to be read whole, as ``data.on_long_prompt`` says; see :func:`fitting`.

    Args:
        started: the run has been started by release 0.1.0, which cut such rows. It cannot leave them out now.

    Raises:
        CumaError: rows are too long and are not to be skipped, or ``data.max_length`` is more than the model can read.
    """

    def advice(needed: int) -> str:
        if started:
            return f"release 0.1.0 cut them; start a new run (run.name) with data.max_length {needed}, or data.on_long_prompt: skip"
        return f"raise data.max_length to {needed}, or leave them out with data.on_long_prompt: skip"

    section = config.data
    if section.option_order == "average":
        raise ConfigError(
            "data.option_order: average is for evaluation; train with fixed or reversed, and evaluate with --set data.option_order=average"
        )
    longest = base_fact(skeleton(config.model).config, "max_position_embeddings")
    if longest and section.max_length > longest and not started:
        raise ConfigError(
            f"data.max_length is {section.max_length}, but {config.model.path} reads at most {longest} tokens; lower it"
        )
    renderer = Renderer.of(load_tokenizer(config.model), section)
    section = section.model_copy(update={"on_long_prompt": "refuse"}) if started else section
    fits = fitting(data, renderer, section, ["train", *data.evaluation_splits], advice)
    return dataclasses.replace(fits, manifest={**fits.manifest, PROMPTS_CHECKED: section.max_length})


def load_inputs(config: RunConfig, topology: Topology) -> TrainingInputs:
    """Tokenizer, data and profiles from the run folder, as this rank's stream of batches."""
    run = Run(config.run_dir)
    data, table = run.data(), run.profiles(config)
    tokenizer = load_tokenizer(config.model)
    renderer = Renderer.of(tokenizer, config.data)
    if data.kind == "preference":
        raise DataError(
            "the data holds preferences, but objective sft learns from answers or conversations; prepare it with --kind chat"
        )
    rows, sentences = data.splits["train"], data.sentences
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    draw = Draw(
        len(rows),
        config.training.global_batch_size,
        config.training.micro_batch_size,
        config.run.seed,
        topology.rank,
        topology.world,
    )
    stream = Stream(
        draw,
        lambda row: (encode_example(rows[row], renderer, sentences, config.data),),
        pad_id or 0,
        config.data.max_length if config.data.packing else None,
    )
    fields, groups = [profile["fields"] for profile in data.profiles], config.adapters.gradient_groups
    mask = None if groups is None else group_mask(fields, groups, config.adapters.num_experts)
    return TrainingInputs(stream, table, np.unique(rows.numbers("profile")), rows.answers(), mask)


def with_profile_width(adapters: CumaConfig, table: ProfileTable | None) -> CumaConfig:
    """The adapters' configuration with P taken from the encoder.

    Raises:
        ConfigError: the recipe asks for another width.
    """
    width = 0 if table is None else table.embeddings.shape[1]
    if adapters.profile_dim not in (0, width):
        raise ConfigError(
            f"adapters.profile_dim is {adapters.profile_dim}, but the encoder's embeddings have width {width}; leave it out"
        )
    return adapters.model_copy(update={"profile_dim": width})


def build_engine(
    config: RunConfig, adapters: CumaConfig, settings: DeepSpeedSettings, topology: Topology
) -> AdapterEngine:
    """The engine with the recipe's optimizer."""
    return AdapterEngine(config, adapters, settings, topology, lambda groups: make_optimizer(groups, config.training))


def model_inputs(
    batch: Batch, table: ProfileTable | None, device: torch.device, group_mask: Tensor | None = None
) -> dict[str, Any]:
    """Keyword arguments of the adapted model for one batch.

    Args:
        batch: on any device.
        table: the run's profiles; None for a method without profiles.
        group_mask: [profiles, E] gradient mask of each row of the table.
    """
    inputs: dict[str, Any] = {**batch.to(device).inputs}
    if table is not None:
        inputs["profile_embeddings"] = table.embeddings[batch.profile_rows_N].to(device)
    profile_BS = batch.profile_BS
    if table is None and batch.position_ids_BS is not None:
        # The model counts a profile per row where it gets no embeddings. Packed rows without profiles take no mask.
        profile_BS = profile_BS.clamp(max=0)
    inputs["profile_index"] = profile_BS.to(device)
    if group_mask is not None:
        inputs["gradient_mask"] = group_mask[batch.profile_rows_N].to(device)
    return inputs


def _steps(
    config: RunConfig, engine: AdapterEngine, inputs: TrainingInputs, start: int, writer: MetricsWriter, tell: Callable
) -> None:
    topology, training, stream, run = engine.topology, config.training, inputs.stream, Run(config.run_dir)
    identity, throughput = run.identity(), Throughput(topology.device)
    for step in range(start, training.steps):
        # Dropout is a function of (seed, step, rank): resuming needs no generator state.
        torch.manual_seed(hash((config.run.seed, step, topology.rank)) % 2**63)
        batches = stream.step(step)
        rate = learning_rate(step, training)
        totals = _run_step(config, engine, inputs, batches, rate)
        done = step + 1
        totals.people = float(sum(inputs.people[row] for batch in batches for row in batch.rows))
        totals = totals.over_ranks(topology)
        if totals.load_RE is not None:
            engine.model.update_shares(totals.load_RE)
        _log(writer, engine, done, rate, totals, throughput)
        if done == training.steps or (config.checkpoint.every and done % config.checkpoint.every == 0):
            state: State = {"step": done, "fingerprint": fingerprint(config), "identity": identity}
            folder = save_checkpoint(engine, run.checkpoints, state, config.checkpoint.keep_last)
            if done == training.steps:
                size = sum(file.stat().st_size for file in folder.iterdir())
                trained = engine.trained_parameters
                tell(
                    f"checkpoint {folder}: {size / 1e6:.1f} MB, {trained / 1e6:.2f} M trained parameters with two moments "
                    f"in float32 are {12 * trained / 1e6:.1f} MB"
                )


@dataclass
class _Totals:
    """Sums of one step, of this rank's micro batches at first.

    weight, tokens: of all ranks together, known before the first forward.  loss: weighted negative log-likelihood, nats.
    balance: load-balance loss.  people: answers or conversations behind the examples.
    load_RE, entropy_R, routed: top-k assignments, summed gate entropy (nats) and tokens of the routers; None without routers.
    """

    weight: float
    tokens: float
    loss: Tensor
    balance: Tensor
    people: float = 0.0
    load_RE: Tensor | None = None
    entropy_R: Tensor | None = None
    routed: Tensor | None = None

    def add_routing(self, routing: RoutingStatistics | None) -> None:
        """Count the routers of one more forward."""
        if routing is None:
            return
        load_RE, entropy_R, routed = routing.load_RE.double(), routing.entropy_R.double(), routing.tokens.double()
        if self.load_RE is None or self.entropy_R is None or self.routed is None:
            self.load_RE, self.entropy_R, self.routed = load_RE, entropy_R, routed
        else:
            self.load_RE, self.entropy_R, self.routed = (
                self.load_RE + load_RE,
                self.entropy_R + entropy_R,
                self.routed + routed,
            )

    def over_ranks(self, topology: Topology) -> _Totals:
        """The same of all ranks: one sum over them."""
        parts = [self.loss.double(), self.balance.double(), self.loss.new_tensor(self.people, dtype=torch.float64)]
        packed = [torch.stack(parts)]
        if self.load_RE is not None and self.entropy_R is not None and self.routed is not None:
            packed += [self.load_RE.flatten(), self.entropy_R, self.routed[None]]
        total = topology.sum_over_ranks(torch.cat(packed))
        summed = _Totals(self.weight, self.tokens, total[0], total[1] / topology.world, float(total[2]))
        if self.load_RE is not None:
            loads = 3 + self.load_RE.numel()
            summed.load_RE, summed.entropy_R, summed.routed = (
                total[3:loads].view_as(self.load_RE),
                total[loads:-1],
                total[-1],
            )
        return summed


def _run_step(
    config: RunConfig, engine: AdapterEngine, inputs: TrainingInputs, batches: list[Batch], rate: float
) -> _Totals:
    device, world = engine.topology.device, engine.topology.world
    own = [sum(batch.weight_sum for batch in batches), sum(batch.real_tokens for batch in batches)]
    weight, tokens = engine.topology.sum_over_ranks(torch.tensor(own, dtype=torch.float64, device=device)).tolist()
    zero = torch.zeros((), device=device)
    totals = _Totals(weight, tokens, loss=zero, balance=zero)
    for batch in batches:
        out = engine.forward(**model_inputs(batch, inputs.table, device, inputs.group_mask))
        nll = sft_loss(out.logits, batch.targets.to(device))
        # DeepSpeed averages over micro steps and ranks; together with that this is the mean over the global batch.
        loss = nll * (world * len(batches) / weight)
        balance = getattr(out, "balance_loss", None)
        if balance is not None:
            if config.adapters.balance_scope == "run":
                # A mean over this micro batch's tokens; weighted by them it becomes the mean over the step's.
                balance = balance * (world * len(batches) * batch.real_tokens / tokens)
            loss = loss + config.adapters.balance_weight * balance
            totals.balance = totals.balance + balance.detach() / len(batches)
        engine.backward(loss)
        engine.step(rate)
        totals.loss = totals.loss + nll.detach()
        totals.add_routing(engine.model.routing_statistics())
    return totals


def _log(
    writer: MetricsWriter, engine: AdapterEngine, step: int, rate: float, totals: _Totals, throughput: Throughput
) -> None:
    """Stop on a loss that is no number, and write the row."""
    scalars = {"loss": float(totals.loss) / totals.weight, "lr": rate, "grad_norm": engine.grad_norm}
    scalars |= throughput.step(totals.tokens, totals.people)
    if not np.isfinite(scalars["loss"]):
        raise CumaError(
            f"the loss became {scalars['loss']} at step {step}; lower training.learning_rate or check the data"
        )
    if totals.load_RE is not None:
        scalars["balance"] = float(totals.balance)
    if engine.loss_scaler is not None:
        scalars["loss_scale"] = float(engine.loss_scaler.loss_scale)
    if engine.dispatcher is not None:
        scalars |= {f"bytes_sent/{name}": float(count) for name, count in engine.dispatcher.take_bytes_sent().items()}
    writer.log(step, scalars)
    if totals.load_RE is not None and totals.entropy_R is not None and totals.routed is not None:
        share_RE = totals.load_RE / totals.load_RE.sum(dim=1, keepdim=True).clamp(min=1)
        writer.log_routing(step, engine.model.router_names, share_RE, totals.entropy_R / totals.routed.clamp(min=1))


def _resume(run: Run, engine: AdapterEngine, tell: Callable[[str], None]) -> int:
    if not has_checkpoint(run.checkpoints):
        return 0
    step = load_checkpoint(engine, find_checkpoint(run.checkpoints))
    tell(f"resuming {run.folder} after step {step}")
    return step


def _check_packing(config: RunConfig, engine: AdapterEngine, inputs: TrainingInputs) -> None:
    """Refuse ``data.packing`` for a model that does not tell the examples of one row apart."""

    def logits_of(batch: Batch) -> Tensor:
        return engine.forward(**model_inputs(batch, inputs.table, engine.topology.device)).logits.cpu()

    engine.engine.eval()
    apart = tells_examples_apart(logits_of, inputs.stream.unit_of(0)[0], inputs.stream.pad_id)
    engine.engine.train()
    if engine.dispatcher is not None:
        engine.dispatcher.take_bytes_sent()  # not of a step
    with agreement():
        if not apart:
            raise ConfigError(
                f"data.packing is true, but {config.model.path} does not tell the examples of one row apart (measured: behind another "
                "example, one is answered otherwise than alone); set data.packing: false"
            )


def _describe(config: RunConfig, engine: AdapterEngine, inputs: TrainingInputs, tell: Callable[[str], None]) -> None:
    base = engine.model.base_model
    held, full = resident_bytes(base), full_bytes(base)
    tell(
        f"{engine.topology}, ZeRO stage {engine.stage}; backbone {held / 1e6:.1f} MB of {full / 1e6:.1f} MB per rank; "
        f"experts {engine.expert_bytes / 1e6:.2f} MB per rank; {inputs.stream.draw.n_rows} training examples; "
        f"{inputs.stream.draw.accumulation} x {inputs.stream.draw.micro} examples per rank and step"
    )
    dist.barrier()
