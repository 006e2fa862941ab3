"""What is evaluated: a model and the data it is asked about."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cuma_ds.config import RunConfig
from cuma_ds.data import load_data
from cuma_ds.data.prepared import PreparedData, is_prepared
from cuma_ds.data.shots import Shots
from cuma_ds.errors import DataError
from cuma_ds.inference.open import Opened, open_trained
from cuma_ds.parallel.agreement import together
from cuma_ds.parallel.topology import ALONE, Topology
from cuma_ds.profiles import ProfileTable, encoder_of, wording_of
from cuma_ds.profiles.embedding import EmbeddingStore, embed
from cuma_ds.runs import Run
from cuma_ds.telemetry.progress import bar


@dataclass(frozen=True, kw_only=True)
class Subject(Opened):
    """A model and the data it is asked about.

    Attributes:
        data: splits and profiles; sections ``data`` and ``evaluation`` of ``config`` say how it is asked.
        embeddings_NP: raw embeddings of ``data.profiles``; None for a model that takes none.
    """

    data: PreparedData
    embeddings_NP: Tensor | None


def run_subject(
    folder: str | Path,
    step: int | None = None,
    data: str | Path | None = None,
    overrides: Sequence[str] = (),
    topology: Topology | None = None,
) -> Subject:
    """One checkpoint of a run on its own data, or on other data.

    Args:
        folder: a run folder as training leaves it.
        step: which checkpoint; the newest complete one by default.
        data: a prepared folder or a file of records instead of the run's own data.
        overrides: ``section.key=value`` on top of the run's recipe, e.g. ``evaluation.min_answers=50``.
        topology: as in :func:`cuma_ds.inference.open.open_trained`.

    Raises:
        CumaError: the folder, its checkpoint, data or model cannot be used; says which and why.
    """
    run = Run.open(folder)
    config = run.config(overrides)
    trained = run.trained(config, step)
    opened = open_trained(config, trained, topology)
    prepared, table = trained.data, trained.table
    embeddings_NP = None if table is None else table.embeddings
    if data is not None:
        prepared = read_data(data, config)
        if table is not None:
            embeddings_NP = _embedded(prepared, config, table.fingerprint, topology or ALONE)
    if config.adapters.method == "few_shot":
        shots = Shots(prepared, config.evaluation.few_shot, config.run.seed)
        shots.warn(prepared)
        opened = dataclasses.replace(opened, renderer=opened.renderer.with_shots(shots))
    return Subject(**vars(opened), data=prepared, embeddings_NP=embeddings_NP)


def _embedded(data: PreparedData, config: RunConfig, fingerprint: str, topology: Topology) -> Tensor:
    """Raw embeddings of the profiles of other data. All ranks share what neither the data nor the cache holds.

    Args:
        fingerprint: of the encoder that the run was trained with.

    Raises:
        DataError: the encoder is another one, or cannot tell the profiles apart.
    """
    encoder, cache_dir = encoder_of(config.profiles), config.profiles.cache_dir
    if encoder.fingerprint != fingerprint:
        what = f"the sentence encoder {config.profiles.encoder}"
        raise DataError(f"{what} is not the one this run was trained with; restore it")
    table = data.stored_table(encoder)
    if table is None:
        store = EmbeddingStore(cache_dir, fingerprint)
        with bar("embedding profiles", topology.is_main and config.telemetry.progress) as told:
            together(lambda: embed(data.sentences, encoder, store, topology.rank, topology.world, told))
        table = ProfileTable.build(data.sentences, encoder, cache_dir)
    return table.embeddings


def subject(opened: Opened, data: str | Path) -> Subject:
    """A model on data.

    Args:
        opened: what is no run.
        data: a prepared folder or a file of records.
    """
    prepared = read_data(data, opened.config)
    embeddings_NP = None if opened.reader is None else opened.reader(prepared.sentences)
    return Subject(**vars(opened), data=prepared, embeddings_NP=embeddings_NP)


def read_data(place: str | Path, config: RunConfig) -> PreparedData:
    """A prepared folder as it is, or records split as ``config.data`` says."""
    if is_prepared(place):
        return PreparedData.load(place).with_wording(wording_of(config.profiles))
    own = {"source": "jsonl", "path": str(place), "kind": None, "histogram_targets": True}
    own |= {"max_people": None, "max_examples": None}
    section = config.data.model_copy(update=own)
    return load_data(section, wording_of(config.profiles))
