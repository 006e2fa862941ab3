"""What a run trains on: the data and the embedded profiles in its folder, as this rank's batches.

Shapes: N examples of a micro batch, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from cuma_ds.config import NOTHING_TRAINS, RunConfig
from cuma_ds.data import PreparedData, load_data
from cuma_ds.data.batch import Batch, EncodedExample
from cuma_ds.data.lengths import Reading, fitting
from cuma_ds.data.rendering import Renderer
from cuma_ds.data.shots import Shots
from cuma_ds.data.stream import Draw, Stream
from cuma_ds.errors import ConfigError
from cuma_ds.files import move_folder, remove_folder
from cuma_ds.identity import base_fact
from cuma_ds.methods import METHODS
from cuma_ds.parallel.agreement import agreement
from cuma_ds.parallel.backbone import check_quantisation, check_weights, load_tokenizer, skeleton
from cuma_ds.parallel.ds_config import read_deepspeed_config
from cuma_ds.parallel.stored import write_start
from cuma_ds.parallel.topology import ALONE, Topology
from cuma_ds.profiles import ProfileTable, encoder_of, wording_of
from cuma_ds.profiles.groups import group_mask
from cuma_ds.runs import Run
from cuma_ds.telemetry.progress import progress_of
from cuma_ds.training.embedding import embed_profiles, take_known_profiles
from cuma_ds.training.objectives import OBJECTIVES, Objective
from cuma_ds.training.schedule import with_steps
from cuma_ds.training.start import check_same_start, open_origin, start_bytes

# In the manifest of a run's own data: the max_length that all its prompts are known to fit.
PROMPTS_CHECKED = "prompts_fit"


class BatchSource(Protocol):
    """Where micro batches come from. A stream of rows is one; rollouts of the model itself are another."""

    def step(self, number: int) -> list[Batch]:
        """This rank's micro batches of step ``number`` (from 0), equally many on every rank."""


@dataclass(frozen=True)
class TrainingInputs:
    """What a run trains on.

    Attributes:
        objective: what is learned.
        batches: this rank's micro batches.
        draw: how the rows of the split are dealt out to steps and ranks.
        table: the run's profiles; None for methods without profiles.
        profiles: rows of the table that training examples have.
        people: [rows] answers (choice) or conversations (chat) behind each row of the split.
        group_mask: [profiles, E] of ``gradient_mask: groups``, or None.
        probe: any example, to measure on the model what packing does.
        pad_id: token id of padding.
        data: the run's own copy.
        renderer: of the model's tokenizer.
    """

    objective: Objective
    batches: BatchSource
    draw: Draw
    table: ProfileTable | None
    profiles: np.ndarray
    people: np.ndarray
    group_mask: Tensor | None
    probe: EncodedExample
    pad_id: int
    data: PreparedData
    renderer: Renderer


def prepare_run(config: RunConfig, topology: Topology = ALONE, tell: Callable[[str], object] = print) -> None:
    """Put the data and the embedded profiles into the run folder, once, and write down what the run starts with.

    All ranks call it. All of them embed profiles; the main rank does the rest.

    Raises:
        CumaError: the same one line on every rank.
    """
    run = Run(config.run_dir)
    with agreement():
        if topology.is_main:
            data = _open_run(config, run, topology)
            if config.adapters.uses_profiles and (missing := take_known_profiles(config, run, data)):
                tell(f"embedding {missing:,} of {len(data.profiles):,} profiles")
    if config.adapters.uses_profiles:
        embed_profiles(config, run, topology)
    with agreement():
        if topology.is_main:
            if not config.profiles.keep_text:
                forget_texts(run)
            data, table = run.data(), run.profiles(config)
            run.check_own_data(data, table, run.identity())
            run.record_identity(config, data, table)
            run.check_start()


def _open_run(config: RunConfig, run: Run, topology: Topology) -> PreparedData:
    """Open the run folder and put the data there; the data, which of a prepared folder comes with its embeddings."""
    source = None
    check_quantisation(config.model)
    if not run.has_data:
        # Before there is a folder: a recipe that is refused can be corrected and started under the same name.
        _check_models(config)
        loaded = load_data(config.data, wording_of(config.profiles), progress_of("reading"))
        source = check_prompts(loaded, config, started=False)
        _check_objective(config, source, topology)
    origin = None
    if config.model.init_from is not None and not run.identity():
        origin = open_origin(config.model.init_from)
        origin.check(config, (source or run.data()).manifest)
    check_same_start(config)
    Run.create(config)
    if source is not None and not config.profiles.keep_text:
        run.profiles_file.unlink(missing_ok=True)  # a killed start may have numbered other profiles
    data = run.data() if source is None else source.save(run.data_folder)
    if origin is not None:
        write_start(run.start, start_bytes(origin.tensors()))
    if source is None and PROMPTS_CHECKED not in data.manifest:
        check_prompts(data, config, started=True)
    return source or data


def _check_models(config: RunConfig) -> None:
    """Raise a CumaError for a backbone or an encoder that is damaged or that the method cannot take. No weights are
    read.
    """
    check_weights(config.model)
    METHODS[config.adapters.method].check(skeleton(config.model), config)
    if config.adapters.uses_profiles and config.profiles.encoder is not None:
        encoder_of(config.profiles).check_files()


def _check_objective(config: RunConfig, data: PreparedData, topology: Topology) -> None:
    """Raise a CumaError for data that the objective cannot learn from, or that these ranks cannot share."""
    objective, rows = OBJECTIVES[config.training.objective](config), len(data.splits["train"])
    renderer = Renderer.of(load_tokenizer(config.model), config.data)
    objective.check(config, data, renderer)
    if data.kind == "choice":
        renderer.letter_ids(2)  # a template that shows no answers is refused
    config = with_steps(config, rows)
    if config.adapters.method not in NOTHING_TRAINS:
        read_deepspeed_config(config, *objective.layout(_draw(config, rows, topology)), topology.world)


def _draw(config: RunConfig, rows: int, topology: Topology) -> Draw:
    """How so many rows are dealt out."""
    training = config.training
    return Draw(
        rows, training.global_batch_size, training.micro_batch_size, config.run.seed, topology.rank, topology.world
    )


def forget_texts(run: Run) -> None:
    """Put numbers in place of profiles and names of groups, once these are embedded. A killed start does it again."""
    data = run.data()
    if not data.keeps_text:
        return
    bare = data.without_texts()
    if run.profiles_file.is_file():
        table = ProfileTable.load(run.profiles_file)
        dataclasses.replace(table, sentences=bare.sentences).save(run.profiles_file)
    beside = run.folder / "data-without-texts"
    remove_folder(beside)
    bare.save(beside)
    remove_folder(run.data_folder)
    move_folder(beside, run.data_folder)


def check_prompts(data: PreparedData, config: RunConfig, started: bool) -> PreparedData:
    """The data without rows that are too long to be read whole, as ``data.on_long_prompt`` says; see :func:`fitting`.

    Args:
        data: all splits.
        config: the recipe.
        started: the run has been started by release 0.1.0, which cut such rows. It cannot leave them out now.

    Raises:
        CumaError: rows are too long and are not to be skipped, or ``data.max_length`` is more than the model can read.
    """

    def advice(needed: int) -> str:
        skip = "data.on_long_prompt: skip"
        if started:
            return f"release 0.1.0 cut them; start a new run (run.name) with data.max_length {needed}, or {skip}"
        return f"raise data.max_length to {needed}, or leave them out with {skip}"

    section = config.data
    if section.option_order == "average":
        raise ConfigError(
            "data.option_order: average is for evaluation; "
            "train with fixed or reversed, and evaluate with --set data.option_order=average"
        )
    longest = base_fact(skeleton(config.model).config, "max_position_embeddings")
    if longest and section.max_length > longest and not started:
        raise ConfigError(
            f"data.max_length is {section.max_length}, but {config.model.path} reads at most {longest} tokens; lower it"
        )
    tokenizer, rollout = load_tokenizer(config.model), config.rollout
    renderer = Renderer.of(tokenizer, section)
    splits = ["train", *data.evaluation_splits]
    if config.adapters.method == "few_shot":
        renderer = renderer.with_shots(Shots(data, config.evaluation.few_shot, config.run.seed))
        splits = data.evaluation_splits  # nobody is asked a training question
    section = section.model_copy(update={"on_long_prompt": "refuse"}) if started else section
    bar = config.telemetry.progress
    fits = fitting(data, Reading(renderer, bar=bar), section, splits, advice)
    if rollout is not None:
        limit = section.max_length - rollout.max_new_tokens
        asking = Reading(
            Renderer.of(tokenizer, section.model_copy(update={"max_length": limit})), prompts=True, bar=bar
        )
        fits = fitting(fits, asking, section, ["train"], lambda most: advice(most + rollout.max_new_tokens))
    return dataclasses.replace(fits, manifest={**fits.manifest, PROMPTS_CHECKED: section.max_length})


def load_inputs(config: RunConfig, topology: Topology) -> TrainingInputs:
    """Read the run folder and make this rank's stream of batches.

    Raises:
        DataError: something is missing or damaged.
    """
    run, training = Run(config.run_dir), config.training
    data, table, objective = run.data(), run.profiles(config), OBJECTIVES[training.objective](config)
    tokenizer, rows = load_tokenizer(config.model), data.splits["train"]
    renderer = Renderer.of(tokenizer, config.data)
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    draw = _draw(config, len(rows), topology)
    stream = Stream(
        draw,
        lambda row: objective.unit(rows[row], renderer, data.sentences),
        pad_id,
        pack_length=config.data.max_length if config.data.packing else None,
    )
    fields, groups = [profile["fields"] for profile in data.profiles], config.adapters.gradient_groups
    return TrainingInputs(
        objective,
        stream,
        draw,
        table,
        profiles=np.unique(rows.numbers("profile")),
        people=rows.answers(),
        group_mask=None if groups is None else group_mask(fields, groups, config.adapters.num_experts),
        probe=stream.unit_of(0)[0],
        pad_id=pad_id,
        data=data,
        renderer=renderer,
    )
