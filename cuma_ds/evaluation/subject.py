"""What can be evaluated: a run, an exported folder, a PEFT adapter, or a bare model; each opened into one shape."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cuma_ds.adapters import CumaModel, inject_adapters
from cuma_ds.config import ModelSection, RunConfig, make_config
from cuma_ds.data import load_data
from cuma_ds.data.prepared import PreparedData, is_prepared
from cuma_ds.data.rendering import Renderer
from cuma_ds.errors import CheckpointError, ConfigError, DataError, ModelError
from cuma_ds.files import first_line
from cuma_ds.parallel.backbone import load_backbone, load_tokenizer
from cuma_ds.profiles import ProfileEncoder, ProfileTable
from cuma_ds.runs import Run


@dataclass(frozen=True)
class Subject:
    """A model and the data it is asked about.

    Attributes:
        name: of the run or the folder.
        checkpoint: which state of it.
        model: in eval mode; called like a backbone, with ``profile_embeddings`` where ``embeddings_NP`` is given.
        renderer: of its tokenizer, with the prompts it was trained with.
        config: how it was trained, or what is known of that; sections ``data`` and ``evaluation`` say how it is asked.
        data: splits and profiles.
        embeddings_NP: raw embeddings of ``data.profiles``; None for a model that takes none.
        untrained: makes the model its own backbone for a while; None for a model that has nothing added.
    """

    name: str
    checkpoint: str
    model: Any
    renderer: Renderer
    config: RunConfig
    data: PreparedData
    embeddings_NP: Tensor | None
    untrained: Callable[[], AbstractContextManager[Any]] | None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


def open_run(
    run_dir: str | Path, step: int | None = None, data: str | Path | None = None, overrides: Sequence[str] = ()
) -> Subject:
    """One checkpoint of a run.

    Args:
        run_dir: a run folder as training leaves it.
        step: which checkpoint; the newest complete one by default.
        data: a prepared folder or a file of rows instead of the run's own data.
        overrides: ``section.key=value`` on top of the run's recipe, e.g. ``evaluation.min_answers=50``.

    Raises:
        CumaError: the folder, its checkpoint, data or model cannot be used; says which and why.
    """
    run = Run.open(run_dir)
    config = run.config(overrides)
    trained = run.trained(config, step)
    prepared, table = trained.data, trained.table
    model = load_trained(config, trained.adapters, table)
    embeddings_NP = None if table is None else table.embeddings
    if data is not None:
        prepared = read_data(data, config)
        if table is not None:
            encoder = ProfileEncoder(str(config.profiles.encoder), batch_size=config.profiles.batch_size)
            if encoder.fingerprint != table.fingerprint:
                raise DataError(
                    f"the sentence encoder {config.profiles.encoder} is not the one this run was trained with; restore it"
                )
            embeddings_NP = prepared.profile_table(encoder, config.profiles.cache_dir).embeddings
    name, checkpoint = config.run.name, trained.checkpoint.name
    return Subject(name, checkpoint, model, _renderer(config), config, prepared, embeddings_NP, model.adapters_disabled)


def open_export(
    folder: str | Path,
    data: str | Path,
    base: str | None = None,
    encoder: str | None = None,
    overrides: Sequence[str] = (),
) -> Subject:
    """A folder made by ``launchers/export.py --format hf``.

    Args:
        folder: the export.
        data: a prepared folder or a file of rows.
        base, encoder: its base model and sentence encoder, if they have moved.
        overrides: of the sections ``data`` and ``evaluation``.
    """
    from cuma_ds.export.modeling import load_exported

    model = load_exported(folder, base_model=base, encoder=encoder)
    prompt = {"prompt_style": "metadata"} | {
        key: value for key, value in model.export["prompt"].items() if value is not None
    }
    adapters = {key: value for key, value in model.export["adapters"].items() if key != "profile_dim"}
    profiles = {"encoder": model.encoder_path or "", "template": model.export["profiles"]["template"]}
    place = str(base or model.export["base_model_name_or_path"])
    values = {"model": {"path": place}, "data": prompt, "adapters": adapters, "profiles": profiles}
    config = make_config(values, list(overrides))
    prepared = read_data(data, config)
    embeddings_NP = model.embed_profiles(prepared.sentences) if model.config.profile_dim else None
    renderer = _renderer(config, str(folder))
    return Subject(
        Path(folder).name, "export", model, renderer, config, prepared, embeddings_NP, model.adapters_disabled
    )


def open_peft(folder: str | Path, data: str | Path, base: str | None = None, overrides: Sequence[str] = ()) -> Subject:
    """An adapter in the format of the ``peft`` library, e.g. one profile exported as plain LoRA (arguments as in :func:`open_export`)."""
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
    config = _bare_config(place, overrides)
    backbone = load_backbone(config.model)
    try:
        model = PeftModel.from_pretrained(backbone, str(folder)).eval()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ModelError(f"the adapter {folder} does not load on {place}: {first_line(error)}") from None
    prepared = read_data(data, config)
    return Subject(folder.name, "adapter", model, _renderer(config), config, prepared, None, model.disable_adapter)


def open_model(path: str, data: str | Path, overrides: Sequence[str] = ()) -> Subject:
    """A causal language model as it is (a folder or a hub id; other arguments as in :func:`open_export`)."""
    config = _bare_config(path, overrides)
    model = load_backbone(config.model)
    return Subject(Path(path).name, "as it is", model, _renderer(config), config, read_data(data, config), None, None)


def load_trained(config: RunConfig, adapters: dict[str, Tensor], table: ProfileTable | None) -> CumaModel:
    """The backbone with trained adapters, in eval mode.

    Args:
        adapters: as :func:`cuma_ds.parallel.stored.read_adapters` returns them.
        table: embedded profiles; None for methods without profiles.
    """
    width = table.embeddings.shape[1] if table is not None else 0
    model = inject_adapters(load_backbone(config.model), config.adapters.model_copy(update={"profile_dim": width}))
    model.load_adapter_state(adapters)
    return model.eval()


def read_data(place: str | Path, config: RunConfig) -> PreparedData:
    """A prepared folder as it is, or rows split as ``config.data`` says."""
    if is_prepared(place):
        return PreparedData.load(place).with_template(config.profiles.template)
    section = config.data.model_copy(update={"source": "jsonl", "path": str(place), "histogram_targets": True})
    return load_data(section, config.profiles.template)


def _bare_config(path: str, overrides: Sequence[str]) -> RunConfig:
    adapters = {"method": "lora"}  # no encoder is asked for
    return make_config({"model": {"path": str(path)}, "adapters": adapters}, list(overrides))


def _renderer(config: RunConfig, place: str | None = None) -> Renderer:
    tokenizer = load_tokenizer(config.model if place is None else ModelSection(path=place))
    return Renderer.of(tokenizer, config.data)
