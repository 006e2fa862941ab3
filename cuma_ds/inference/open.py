"""A model ready to be asked, opened from a run, an exported folder, a PEFT adapter or a bare model folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cuma_ds.adapters import CumaModel
from cuma_ds.config import NOTHING_TRAINS, ModelSection, ProfilesSection, RunConfig
from cuma_ds.data.prepared import PreparedData
from cuma_ds.data.rendering import Renderer
from cuma_ds.errors import CheckpointError, ConfigError, ModelError
from cuma_ds.files import first_line, full_path, quiet_bitsandbytes
from cuma_ds.identity import base_fact
from cuma_ds.inference.decoding import settle_generation
from cuma_ds.inference.forward import pad_id_of
from cuma_ds.inference.generate import Decoder
from cuma_ds.inference.modeling import ProfileFacts, ProfileReader, load_exported
from cuma_ds.inference.peers import ALONE, Peers
from cuma_ds.inference.running import ModelForward, measured_batch
from cuma_ds.methods import METHODS
from cuma_ds.methods.cuma import CumaMethod
from cuma_ds.methods.model import AdaptedModel
from cuma_ds.parallel.backbone import load_backbone, load_tokenizer
from cuma_ds.parallel.ds_config import FrozenBackbone, read_deepspeed_config
from cuma_ds.parallel.engine import AdapterEngine, place_model
from cuma_ds.parallel.topology import Topology
from cuma_ds.profiles import ProfileTable, wording_of
from cuma_ds.recipe import make_config
from cuma_ds.runs import Run, TrainedRun

# Where a model does not say how far it can look back.
_LONGEST = 2048


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model with its tokenizer, and how it is asked.

    Attributes:
        name: of the run or the folder.
        checkpoint: which state of it.
        model: in eval mode; called like a backbone, and a :class:`CumaModel` where it has adapters of this package.
        renderer: of its tokenizer, with the prompts it was trained with.
        config: how it was trained, or what is known of that.
        reader: makes raw embeddings of profiles; None for a model that takes none.
        untrained: makes the model its own backbone for a while; None for a model that has nothing added.
        started: makes the model the start policy of its run for a while; None where that is the backbone, or not known.
        peers: the ranks that hold the model together.
    """

    name: str
    checkpoint: str
    model: nn.Module
    renderer: Renderer
    config: RunConfig
    reader: ProfileReader | None = None
    untrained: Callable[[], AbstractContextManager[None]] | None = None
    started: Callable[[], AbstractContextManager[None]] | None = None
    peers: Peers = ALONE

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def backbone(self) -> PreTrainedModel:
        """The model that transformers made, or PEFT's wrapper of it, which answers for it."""
        return cast("PreTrainedModel", self.model.base_model if isinstance(self.model, CumaModel) else self.model)

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer together that the model can look back over."""
        return int(base_fact(self.backbone.config, "max_position_embeddings") or _LONGEST)

    @property
    def embedded_tokens(self) -> int:
        """Number of tokens that the model has an embedding for."""
        weight = cast("Tensor", self.backbone.get_input_embeddings().weight)
        return int(getattr(weight, "ds_shape", weight.shape)[0])  # DeepSpeed's shape of a sharded parameter

    def decoder(self, most: int, scores: bool = False) -> Decoder:
        """What continues prompts of this model (arguments as in :class:`Decoder`)."""
        end_ids, pad_id = settle_generation(self.model, self.renderer), pad_id_of(self.renderer.tokenizer)
        batch, most = measured_batch(ModelForward(self.model, self.peers.announce), pad_id, most)
        return Decoder(batch, most, end_ids, scores)


def open_run(
    folder: str | Path,
    step: int | None = None,
    overrides: Sequence[str] = (),
    topology: Topology | None = None,
) -> Opened:
    """One checkpoint of a run.

    Args:
        folder: a run folder as training leaves it.
        step: which checkpoint; the newest complete one by default.
        overrides: ``section.key=value`` on top of the run's recipe.
        topology: as in :func:`open_trained`.

    Raises:
        CumaError: the folder, its checkpoint, data or model cannot be used; says which and why.
    """
    run = Run.open(folder)
    config = run.config(overrides)
    return open_trained(config, run.trained(config, step), topology)


def open_trained(config: RunConfig, trained: TrainedRun, topology: Topology | None = None) -> Opened:
    """One checkpoint of a run that was read already.

    Args:
        config: the recipe.
        trained: the checkpoint.
        topology: of ranks that hold the model together as the recipe's section ``parallel`` says, with expert-parallel
            groups. All of them call this. None loads the model whole, as every rank does with a method that is no
            mixture.
    """
    table, start = trained.table, trained.start
    sized = _with_width(config, table)
    if topology is None or not issubclass(METHODS[config.adapters.method], CumaMethod):
        method, peers = _loaded(sized, trained.adapters), ALONE
    else:
        method, peers = _placed(sized, trained.adapters, topology)
    width = sized.adapters.profile_dim
    return Opened(
        name=config.run.name,
        checkpoint=trained.checkpoint.name,
        model=method.inference_model,
        renderer=Renderer.of(load_tokenizer(config.model), config.data),
        config=config,
        reader=ProfileReader(profile_facts(config, trained.data, table), width) if width else None,
        untrained=_untrained(method, config),
        started=None if start is None else lambda: _holding(method, lambda: _own_part(method, start(), topology)),
        peers=peers,
    )


def open_engine(engine: AdapterEngine, config: RunConfig, renderer: Renderer) -> Opened:
    """The model that an engine trains, to generate with between two of its steps. All its ranks call this.

    ``engine.train(False)`` comes before generating and ``engine.train()`` after it.

    Args:
        engine: of the run.
        config: the recipe.
        renderer: of the model's tokenizer.
    """
    return Opened(
        name=config.run.name,
        checkpoint="now",
        model=engine.model.inference_model,
        renderer=renderer,
        config=config,
        untrained=engine.model.disabled if engine.model.switches_off else None,
        peers=Peers.of(engine.topology, engine.dispatcher),
    )


def open_export(
    folder: str | Path,
    base: str | None = None,
    encoder: str | None = None,
    overrides: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> Opened:
    """A folder made by ``launchers/export.py --format hf``.

    Args:
        folder: the export.
        base, encoder: its base model and sentence encoder, if they have moved.
        overrides: of the sections ``data`` and ``evaluation``.
        trust_remote_code: allow code that comes with the base model.
    """
    model = load_exported(folder, base_model=base, encoder=encoder, trust_remote_code=trust_remote_code)
    export, reader = model.export, model.embed_profiles
    # What an export does not say about prompts is as it was in release 0.1.0.
    prompt = {"prompt_style": "metadata", "max_length": _LONGEST} | {
        key: one for key, one in export["prompt"].items() if one is not None
    }
    adapters = {key: value for key, value in export["adapters"].items() if key != "profile_dim"}
    about = profiles_section(export["profiles"]).model_dump(exclude_unset=True)
    profiles = {**about, "encoder": reader.encoder_path or ""}
    place = str(base or export["base_model_name_or_path"])
    values = {"model": {"path": place}, "data": prompt, "adapters": adapters, "profiles": profiles}
    config = make_config(values, list(overrides))
    tokenizer = load_tokenizer(ModelSection(path=str(folder), trust_remote_code=trust_remote_code))
    return Opened(
        name=Path(folder).name,
        checkpoint="export",
        model=model,
        renderer=Renderer.of(tokenizer, config.data),
        config=config,
        reader=reader if model.config.profile_dim else None,
        untrained=model.adapters_disabled,
    )


def open_peft(folder: str | Path, base: str | None = None, overrides: Sequence[str] = ()) -> Opened:
    """An adapter in the format of the ``peft`` library, e.g. one profile exported as plain LoRA.

    Args:
        folder: the adapter.
        base: its base model, if it has moved.
        overrides: as in :func:`open_export`.
    """
    quiet_bitsandbytes()
    try:
        from peft import PeftModel
    except ImportError:
        raise ConfigError("--adapter needs the package peft, which is not installed; pip install peft") from None

    folder = Path(folder)
    try:
        about = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        place = base or about["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{folder} is no PEFT adapter: adapter_config.json is missing or names no base model"
        ) from None
    if str(about.get("peft_type")).upper() == "CUMA":
        raise CheckpointError(f"{folder} is an export of cuma-ds, not a PEFT adapter; evaluate it with --export")
    bare = open_model(place, overrides)
    try:
        model = PeftModel.from_pretrained(bare.model, str(folder)).eval()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ModelError(f"the adapter {folder} does not load on {place}: {first_line(error)}") from None
    return dataclasses.replace(
        bare, name=folder.name, checkpoint="adapter", model=model, untrained=model.disable_adapter
    )


def open_model(path: str, overrides: Sequence[str] = ()) -> Opened:
    """A causal language model as it is.

    Args:
        path: a folder or a hub id.
        overrides: as in :func:`open_export`.
    """
    # A method without profiles: no encoder is asked for.
    config = make_config({"model": {"path": str(path)}, "adapters": {"method": "lora"}}, list(overrides))
    renderer = Renderer.of(load_tokenizer(config.model), config.data)
    model = load_backbone(config.model)
    return Opened(name=Path(path).name, checkpoint="as it is", model=model, renderer=renderer, config=config)


def load_trained(config: RunConfig, adapters: dict[str, Tensor], table: ProfileTable | None) -> CumaModel:
    """The backbone with trained adapters, in eval mode.

    Args:
        config: the recipe.
        adapters: as :func:`cuma_ds.parallel.stored.read_adapters` returns them.
        table: embedded profiles; None for methods without profiles.
    """
    method = _loaded(_with_width(config, table), adapters)
    assert isinstance(method, CumaMethod)
    return method.cuma


def _loaded(config: RunConfig, tensors: dict[str, Tensor]) -> AdaptedModel:
    """A whole trained model in eval mode."""
    method = METHODS[config.adapters.method](load_backbone(config.model), config)
    method.load(tensors)
    return method.eval()


def _untrained(method: AdaptedModel, config: RunConfig) -> Callable[[], AbstractContextManager[None]] | None:
    """What makes a model its own backbone for a while; None where nothing was trained."""
    if config.adapters.method in NOTHING_TRAINS:
        return None
    return method.disabled if method.switches_off else lambda: _holding(method, lambda: _bare(config))


def _bare(config: RunConfig) -> dict[str, Tensor]:
    """The parameters that a backbone had before it trained, by name."""
    return {name: parameter.detach() for name, parameter in load_backbone(config.model).named_parameters()}


def _placed(config: RunConfig, adapters: dict[str, Tensor], topology: Topology) -> tuple[CumaMethod, Peers]:
    """This rank's part of a trained model, in eval mode."""
    settings = read_deepspeed_config(config, 1, 1, topology.world)
    if settings.stage == 3:  # also shards adapters, for their optimizer's sake
        settings = dataclasses.replace(settings, stage=2, backbone=FrozenBackbone(sharded=True))
    placed = place_model(config, settings, topology)
    method = placed.model
    assert isinstance(method, CumaMethod)
    method.load(_own_part(method, adapters, topology))
    return method.eval(), Peers.of(topology, placed.dispatcher)


def _own_part(method: AdaptedModel, adapters: dict[str, Tensor], topology: Topology | None) -> dict[str, Tensor]:
    """The tensors of a whole state that this rank's model holds: of per-expert ones those of its own experts."""
    if topology is None or not isinstance(method, CumaMethod):
        return adapters
    first, count = topology.experts(method.cuma.config.num_experts)
    return {
        name: adapters[name][first : first + count] if own.shape != adapters[name].shape else adapters[name]
        for name, own in method.tensors().items()
    }


@contextlib.contextmanager
def _holding(method: AdaptedModel, read: Callable[[], dict[str, Tensor]]) -> Iterator[None]:
    """Inside, the model has other trained tensors, which are read when they are needed."""
    own = {name: tensor.clone() for name, tensor in method.tensors().items()}
    method.load(read())
    try:
        yield
    finally:
        method.load(own)


def _with_width(config: RunConfig, table: ProfileTable | None) -> RunConfig:
    """The recipe with the width of the embedded profiles; 0 for methods without profiles."""
    width = table.embeddings.shape[1] if table is not None else 0
    return config.model_copy(update={"adapters": config.adapters.model_copy(update={"profile_dim": width})})


def profile_facts(config: RunConfig, data: PreparedData, table: ProfileTable | None) -> ProfileFacts:
    """How a run makes embeddings of profiles."""
    section, wording = config.profiles, wording_of(config.profiles)
    facts: ProfileFacts = {"encoder": None, "template": section.template, "fields": []}
    if section.format is not None:
        facts["format"] = section.format
    if section.fields is not None:
        facts["only_fields"] = list(section.fields)
    if table is not None:
        facts |= {
            "encoder": full_path(str(section.encoder)),
            "fingerprint": table.fingerprint,
            "fields": [name for name in data.field_names if wording.reads(name)],
        }
        facts |= _encoder_settings(section)
    return facts


def _encoder_settings(section: ProfilesSection) -> ProfileFacts:
    """How vectors are made of token vectors, where it is not the usual way."""
    facts: ProfileFacts = {}
    if section.pooling != "auto":
        facts["pooling"] = section.pooling
    if not section.normalise:
        facts["normalise"] = False
    if section.max_tokens is not None:
        facts["max_tokens"] = section.max_tokens
    return facts


def profiles_section(facts: ProfileFacts) -> ProfilesSection:
    """What :func:`profile_facts` says, as the section of a recipe."""
    known = {key: value for key, value in facts.items() if key in ProfilesSection.model_fields and key != "fields"}
    return ProfilesSection.model_validate(
        {**known, **({"fields": facts["only_fields"]} if "only_fields" in facts else {})}
    )
