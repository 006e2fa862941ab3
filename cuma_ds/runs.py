"""The folder of one run. No other file knows what is in it.

A run folder holds::

    config.yaml                    the recipe with every default written out
    identity.json                  hashes of the models and data it was started with; runs of release 0.1.0 have none
    deepspeed.json                 what DeepSpeed was given
    data/, profiles.safetensors    the prepared data and the embedded profiles
    embedded/                      profiles embedded so far, until all are
    start/                         the trained model it started from (model.init_from), see
                                   :mod:`cuma_ds.parallel.stored`
    reference.safetensors          what the reference says of the training pairs (objective dpo)
    checkpoints/                   step-N/ and latest, see :mod:`cuma_ds.parallel.checkpoint`
    metrics.jsonl, tensorboard/    the numbers of each step
    completions.jsonl              some completions of each rollout with their rewards (objective grpo)
    evaluation/                    the report
    outcome.json                   how the last start ended; none where it was killed
    errors/                        tracebacks of errors that nobody expected
    logs/rank-N.log                what libraries printed on a rank
    .lock                          who writes there now, see :mod:`cuma_ds.locks`
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cuma_ds.config import DataSection, RunConfig
from cuma_ds.data.prepared import PreparedData, is_prepared, read_manifest
from cuma_ds.data.sources.files import find_input
from cuma_ds.errors import CheckpointError, ConfigError, DataError
from cuma_ds.files import is_hub_id, remove_leftovers, write_atomically
from cuma_ds.identity import Identity, changed_part, content_sha256, file_sha256, seal_holds, sealed
from cuma_ds.learned_settings import fingerprint, first_difference, with_started_defaults
from cuma_ds.locks import LOCK_FILE, locked
from cuma_ds.parallel.backbone import backbone_fingerprint
from cuma_ds.parallel.stored import State, find_checkpoint, newest_whole, read_adapters, read_state, start_sha256
from cuma_ds.profiles import ProfileTable, encoder_of
from cuma_ds.recipe import load_started


@dataclass(frozen=True)
class TrainedRun:
    """One checkpoint of a run with the data and embedded profiles behind it.

    Attributes:
        checkpoint: its folder.
        adapters: its tensors, see :func:`~cuma_ds.parallel.stored.read_adapters`.
        identity: what it was trained with; empty in checkpoints of release 0.1.0.
        data: the run's own data.
        table: the embedded profiles; None for methods without profiles.
        start: reads the tensors of the model that the run started from; None where that is the bare backbone.
    """

    checkpoint: Path
    adapters: dict[str, Tensor]
    identity: Identity
    data: PreparedData
    table: ProfileTable | None
    start: Callable[[], dict[str, Tensor]] | None


class Run:
    """The folder of one run, which need not exist yet.

    Attributes:
        folder: ``run.output_dir/run.name`` of the recipe.
        recipe, deepspeed, metrics, completions, outcome: files in it.
        data_folder, checkpoints, tensorboard, report_folder, errors, logs: folders in it.
        profiles_file: the embedded profiles.
        embedded: vectors of some of them, while they are made, see :mod:`cuma_ds.profiles.embedding`.
        start: the trained model that the run started from; there is none without ``model.init_from``.
        reference_file: log-probabilities of the training pairs under the reference.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.recipe = self.folder / "config.yaml"
        self.deepspeed = self.folder / "deepspeed.json"
        self.data_folder = self.folder / "data"
        self.profiles_file = self.folder / "profiles.safetensors"
        self.embedded = self.folder / "embedded"
        self.start = self.folder / "start"
        self.reference_file = self.folder / "reference.safetensors"
        self.checkpoints = self.folder / "checkpoints"
        self.metrics = self.folder / "metrics.jsonl"
        self.completions = self.folder / "completions.jsonl"
        self.tensorboard = self.folder / "tensorboard"
        self.report_folder = self.folder / "evaluation"
        self.errors = self.folder / "errors"
        self.logs = self.folder / "logs"
        self.outcome = self.folder / "outcome.json"
        self._identity_file = self.folder / "identity.json"

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """A run that has been started.

        Raises:
            CheckpointError: the folder is none of a run.
        """
        run = cls(folder)
        if not run.recipe.is_file():
            raise CheckpointError(
                f"{folder} is no run folder: there is no config.yaml; expected what launchers/train.py leaves"
            )
        return run

    @classmethod
    def create(cls, config: RunConfig) -> Run:
        """Create the run folder, or check that the one there belongs to this recipe. Rank 0 calls it.

        Raises:
            ConfigError: the folder holds a run of another recipe; names the first setting that differs.
            CheckpointError: the folder holds something else, cannot be written, or was started with another model,
                encoder or data.
        """
        run = cls(config.run_dir)
        if run.recipe.is_file():
            run._check_recipe(config)
            run._check_started_with(config)
        elif run.folder.exists() and (not run.folder.is_dir() or set(run.folder.iterdir()) - {run.folder / LOCK_FILE}):
            raise CheckpointError(
                f"{run.folder} exists and is no run folder (it has no config.yaml); choose another run.name"
            )
        try:
            write_atomically(run.recipe, config.to_yaml())
        except OSError as error:
            raise CheckpointError(f"cannot write the run folder {run.folder}: {error.strerror}") from None
        return run

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process trains in this folder; what killed ones left half written is removed.

        Raises:
            CheckpointError: another one does; names its host, process and start.
        """
        with locked(self.folder):
            for folder in (self.folder, self.checkpoints):
                remove_leftovers(folder)
            for partial in self.checkpoints.glob("step-*.partial"):
                shutil.rmtree(partial)
            yield

    def config(self, overrides: Sequence[str] = ()) -> RunConfig:
        """The recipe the run was started with, and ``section.key=value`` on top of it."""
        return load_started(self.recipe, list(overrides))

    def as_started(self, config: RunConfig) -> RunConfig:
        """A recipe with the defaults of the release that started the run; ``config`` itself for a new run."""
        if not self.recipe.is_file():
            return config
        try:
            return with_started_defaults(config, self.config())
        except ConfigError:
            return config  # create() refuses it

    @property
    def has_data(self) -> bool:
        """Whether the run has its own copy of the data."""
        return is_prepared(self.data_folder)

    def data(self) -> PreparedData:
        """The run's own copy of its data."""
        return PreparedData.load(self.data_folder)

    def profiles(self, config: RunConfig) -> ProfileTable | None:
        """The embedded profiles; None for methods without profiles."""
        return ProfileTable.load(self.profiles_file) if config.adapters.uses_profiles else None

    def identity(self) -> Identity:
        """What the run was started with; empty for a run of release 0.1.0.

        Raises:
            CheckpointError: the file is damaged.
        """
        file = self._identity_file
        if not file.exists():
            return {}
        try:
            identity: Identity = json.loads(file.read_text(encoding="utf-8"))
            whole = seal_holds(identity)
        except (OSError, ValueError, AttributeError):
            whole = False
        if not whole:
            raise CheckpointError(
                f"{file} is damaged: it has changed since it was written; restore it from a copy of the run folder"
            )
        return identity

    def record_identity(self, config: RunConfig, data: PreparedData, table: ProfileTable | None) -> None:
        """Write down what the run was started with, unless that has been done. Rank 0 calls it.

        A run that release 0.1.0 started is taken as it is found, with a warning.

        Args:
            config: the recipe.
            data: the run's own copy.
            table: the run's own embedded profiles.
        """
        if self.identity():
            return
        identity: Identity = {
            "backbone": backbone_fingerprint(config.model),
            "encoder": None if table is None else table.fingerprint,
            "source": source_hashes(config.data) if is_prepared(config.data.path) else data.manifest["inputs"],
            "data": content_sha256(data.manifest["hashes"]),
            "profiles": None if table is None else table.sha256,
        }
        if config.model.init_from is not None:
            identity["start"] = start_sha256(read_state(self.start))
        if any(self.checkpoints.glob("step-*")):
            identity["fingerprint_0_1_0"] = fingerprint(config, names=True)
            warnings.warn(
                f"{self.folder} was started by release 0.1.0, which wrote no hashes: "
                "model, encoder and data are taken as they are now and checked from here on",
                stacklevel=2,
            )
        write_atomically(self._identity_file, json.dumps(sealed(identity), indent=2, ensure_ascii=False) + "\n")

    def check_start(self, content: bool = True) -> State | None:
        """``state.json`` of the model that the run started from; None for a run that started from none.

        Args:
            content: also hash its tensors; one rank of several does it for all.

        Raises:
            CheckpointError: it is missing, damaged, or another one.
        """
        known = self.identity().get("start")
        if known is None:
            return None
        state = read_state(self.start, content)
        if start_sha256(state) != known:
            raise CheckpointError(
                f"{self.start} is not what this run started from; restore it from a copy of the run folder"
            )
        return state

    def start_adapters(self) -> dict[str, Tensor]:
        """Tensors of the model that the run started from, see :func:`~cuma_ds.parallel.stored.read_adapters`.

        Raises:
            CheckpointError: as :meth:`check_start`.
        """
        return read_adapters(self.start, self.check_start())

    def known_fingerprints(self, config: RunConfig) -> set[str]:
        """Fingerprints of the checkpoints this run may go on from: its own, and those that release 0.1.0 gave it."""
        return {fingerprint(config), self.identity().get("fingerprint_0_1_0", "")} - {""}

    def trained(self, config: RunConfig, step: int | None = None) -> TrainedRun:
        """Read one checkpoint with its data and profiles. All of them and the backbone must be those of training.

        Args:
            config: the recipe of the run; its ``model.path`` is the backbone that will be used.
            step: which checkpoint; by default the newest that is whole.

        Raises:
            CumaError: something is missing, damaged, or not what the run was trained with; one line says what.
        """
        if step is None:
            checkpoint, state = newest_whole(self.checkpoints)
        else:
            checkpoint = find_checkpoint(self.checkpoints, step)
            state = read_state(checkpoint)
        identity = state.get("identity") or self.identity()
        data, table = self.data(), self.profiles(config)
        if table is not None and table.sentences != data.sentences:
            raise DataError(
                f"{self.folder}: {self.profiles_file.name} and data/ hold different profiles; "
                "this run folder was put together from two runs"
            )
        self.check_own_data(data, table, identity)
        self.check_backbone(config, identity)
        start = self.start_adapters if "start" in identity else None
        return TrainedRun(checkpoint, read_adapters(checkpoint, state), identity, data, table, start)

    def check_backbone(self, config: RunConfig, identity: Identity) -> None:
        """Raise a CheckpointError if ``model.path`` holds another model than the run was trained on.

        Args:
            config: the recipe.
            identity: of the run or a checkpoint; nothing is checked where it names no backbone.
        """
        known = identity.get("backbone")
        change = known and changed_part(config.model.path, known, backbone_fingerprint(config.model))
        if change:
            raise CheckpointError(
                f"model.path: {change} than {self.folder} was trained with; "
                "restore the folder, or start a run of another run.name"
            )

    def check_own_data(self, data: PreparedData, table: ProfileTable | None, identity: Identity) -> None:
        """Raise a DataError if data and profiles in the run folder are not those of its identity, or not finite."""
        if table is not None and not (finite_N := table.embeddings.isfinite().all(dim=1)).all():
            row = int((~finite_N).nonzero()[0])
            raise DataError(
                f"{self.folder}: the embedding of profile {row} is not finite; profiles.encoder gives it so, or the "
                "folder profiles.cache_dir holds a damaged one: mend or change that, and start a new run"
            )
        for place, known, now in (
            ("data/", identity.get("data"), content_sha256(data.manifest["hashes"])),
            (self.profiles_file.name, identity.get("profiles"), None if table is None else table.sha256),
        ):
            if known is not None and now is not None and known != now:
                raise DataError(
                    f"{self.folder}: {place} is not what this run was trained with; "
                    "restore it from a copy of the run folder"
                )

    def _check_recipe(self, config: RunConfig) -> None:
        try:
            changed = first_difference(self.config(), config, names=not self.identity())
        except ConfigError as error:
            raise CheckpointError(
                f"{self.folder} holds a run whose recipe cannot be read ({error}); choose another run.name"
            ) from None
        if changed is not None:
            raise ConfigError(
                f"{self.folder} holds a run with {changed.key}: {changed.started}, but this recipe says {changed.now}; "
                "choose another run.name, or restore the recipe to resume"
            )

    def _check_started_with(self, config: RunConfig) -> None:
        """Refuse another model, encoder or data than the run was started with.

        The run no longer needs encoder and data, so a warning is enough where they are gone. Of a run of release 0.1.0
        only the hashes of raw files are known.
        """
        encoder, data, identity = config.profiles.encoder, config.data, self.identity()
        self.check_backbone(config, identity)
        known_encoder = identity.get("encoder")
        if encoder is not None and known_encoder is not None and not self._is_gone("profiles.encoder", encoder):
            folder = Path(encoder).expanduser()
            if folder.is_dir() and encoder_of(config.profiles).fingerprint != known_encoder:
                raise CheckpointError(
                    f"profiles.encoder: {encoder} is another encoder than {self.folder} was started with; "
                    "restore it, or choose another run.name"
                )
        known = identity.get("source")
        if known is None and not is_prepared(data.path) and self.has_data:
            known = read_manifest(self.data_folder)["inputs"]
        if not known or data.path is None or self._is_gone("data.path", data.path):
            return
        now = source_hashes(data, known)
        changed = sorted(
            name for name in (known.keys() | now.keys() if now else ()) if known.get(name) != now.get(name)
        )
        if changed:
            what = "is new" if changed[0] not in known else "is missing" if changed[0] not in now else "has changed"
            raise CheckpointError(
                f"data.path: {changed[0]} in {data.path} {what} since {self.folder} was started, and the run keeps "
                "the data it was started with; restore it to resume, or choose another run.name to train on the data "
                "as it is now"
            )

    def _is_gone(self, key: str, place: str) -> bool:
        """Whether a place on this machine no longer exists, with a warning. Hub ids are never gone."""
        gone = not Path(place).expanduser().exists() and not is_hub_id(place)
        if gone:
            warnings.warn(
                f"{key}: there is nothing at {place} any more; {self.folder} goes on with what it was started with",
                stacklevel=2,
            )
        return gone


def source_hashes(data: DataSection, known: Iterable[str] = ()) -> dict[str, str]:
    """SHA-256 of each file at ``data.path``, by its name; empty for a hub id, and where nothing is there.

    Args:
        data: the recipe's data section. Of a prepared folder these are the hashes its manifest holds.
        known: names of a benchmark's files to look for; the files of your own records are found without.
    """
    if data.path is None or not Path(data.path).exists():
        return {}
    place = Path(data.path)
    if is_prepared(place):
        return dict(read_manifest(place)["hashes"])
    if data.source == "jsonl":
        return find_input(place).identity
    files = [place] if place.is_file() else [file for file in sorted(place.rglob("*")) if file.is_file()]
    files += [Path(data.map)] if data.map is not None and Path(data.map).is_file() else []
    return {file.name: file_sha256(file) for file in files if file.name in known}
